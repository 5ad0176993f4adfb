# SPDX-License-Identifier: GPL-2.0-or-later
"""A stand-in for KVM: functions of this process, at which the BPF program runs."""

from __future__ import annotations

import ctypes
import os
import re
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import strategies as st
from known import KnownBtf, kernel_of, one_tree
from needs import ROOT_ALONE
from uprobe import attach_uprobe

from tracer.kernel.btf import Btf, BtfError
from tracer.kernel.symbols import Symbol, Symbols
from tracer.model.errors import MsrtraceError
from tracer.model.options import Options
from tracer.model.snapshot import Snapshot
from tracer.model.svm import SVM
from tracer.model.vendor import VCPU_CREATED, Layout, Vendor
from tracer.model.vmx import VMX
from tracer.program.compiler import build
from tracer.program.loading import Loaded
from tracer.program.program import Target, Variant
from tracer.program.resources import resource
from tracer.program.source import whole_text
from tracer.trace.engine import Engine
from tracer.trace.plan import variants
from tracer.trace.probes import Probes

SOURCE = resource("bpf/msrtrace.c")


TRIVIAL = "#include <uapi/linux/ptrace.h>\nint trivial(struct pt_regs *ctx)\n{\n\treturn 0;\n}\n"


#: Debian 12's BCC, the oldest that is to do, compiles against these; it may not be able to against newer ones.
MUST_COMPILE = ("bookworm", "trixie", "filter-only")


# BCC would rather have bytes of Python 3 too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:not a bytes object:DeprecationWarning"),
    pytest.mark.timeout(900),  # the first may download a kernel
]


NOTHING = Symbols.of([])


def loaded(source: Path | str, folder: Path, *functions: str, **definitions: int) -> Loaded:
    """Compile, and pass functions through the verifier."""
    if isinstance(source, str):
        (folder / "program.c").write_text(source)
        source = folder / "program.c"
    return build(source, [Variant("kprobe", definitions, dict.fromkeys(functions, Target("kprobe")))]).loaded


@contextmanager
def headers_of(host: str, tree: Path) -> Iterator[None]:
    """Makes BCC use the headers of one host's kernel, by TREE, which also has what is compiled meanwhile."""
    if os.geteuid():
        pytest.skip(ROOT_ALONE)
    one_tree(kernel_of(host) / "usr/src", tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BCC_KERNEL_SOURCE", str(tree))
        patch.setenv("CACHE_DIRECTORY", str(tree / "compiled"))
        try:
            loaded(TRIVIAL, tree, "trivial").close()
        except MsrtraceError as error:
            if host in MUST_COMPILE:
                raise
            pytest.skip(f"this machine's BCC cannot compile even an empty program against {host}'s headers: {error}")
        yield


def enumeration(name: str) -> list[str]:
    found = re.search(rf"^enum {name} {{(.*?)}};", whole_text(SOURCE), re.MULTILINE | re.DOTALL)
    assert found
    return re.findall(r"\b[A-Z_]+\b", re.sub(r"/\*.*?\*/", "", found[1]))


TABLES = [name.lower() for name in enumeration("table")]


TOGGLE = next(layout for layout in VMX.layouts if layout.name == "toggle")


RECALC = next(layout for layout in VMX.layouts if layout.name == "recalc")


PASS, SVM_RECALC = (next(layout for layout in SVM.layouts if layout.name == name) for name in ("pass", "recalc"))


HOOK, ENABLE, DISABLE = TOGGLE.update, "vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr"


CREATE, FREE = "vmx_vcpu_create", "vmx_vcpu_free"


OUTCOMES = ("changed_read", "changed_write", "refused", "redundant", "changed", "unknown")


READ, WRITE, BOTH = 1, 2, 3


STAND_IN = """
#include <stdbool.h>
#include <string.h>
struct vcpu { void *kvm; unsigned char *bitmap; unsigned long exits; };
unsigned char *next; /* what the bitmap is after a call */
unsigned char *other; /* the bitmap that is written, if it is not the vCPU's */
unsigned long size; /* of it */
void (*inside)(void);
int result;
#define KEPT __attribute__((noipa))
static void change(struct vcpu *vcpu) { if (next) memcpy(other ? other : vcpu->bitmap, next, size); }
KEPT void vmx_disable_intercept_for_msr(struct vcpu *vcpu, unsigned msr, int type) { change(vcpu); }
KEPT void vmx_enable_intercept_for_msr(struct vcpu *vcpu, unsigned msr, int type) { change(vcpu); }
KEPT void vmx_set_intercept_for_msr(struct vcpu *vcpu, unsigned msr, int type, bool set) { change(vcpu); }
KEPT void vmx_msr_filter_changed(struct vcpu *vcpu) { inside(); asm volatile(""); }
KEPT void vmx_recalc_intercepts(struct vcpu *vcpu) { inside(); asm volatile(""); }
KEPT void vmx_vcpu_free(struct vcpu *vcpu) { asm volatile(""); }
KEPT void vmx_update_msr_bitmap_x2apic(struct vcpu *vcpu) { asm volatile(""); change(vcpu); }
KEPT int vmx_vcpu_create(struct vcpu *vcpu) { inside(); asm volatile(""); return 0; }
KEPT void kvm_arch_vcpu_postcreate(struct vcpu *vcpu) { asm volatile(""); }
KEPT int kvm_vm_ioctl_set_msr_filter(void *kvm, void *filter) { inside(); return result; }
KEPT void svm_set_intercept_for_msr(struct vcpu *vcpu, unsigned msr, int type, bool set) { change(vcpu); }
KEPT void set_msr_interception_bitmap(struct vcpu *vcpu, void *msrpm, unsigned msr, int read, int write)
{ change(vcpu); }
KEPT void svm_msr_filter_changed(struct vcpu *vcpu) { inside(); asm volatile(""); }
KEPT void svm_recalc_intercepts(struct vcpu *vcpu) { inside(); asm volatile(""); }
KEPT void svm_vcpu_free(struct vcpu *vcpu) { asm volatile(""); }
KEPT void nested_svm_vmrun_msrpm(struct vcpu *vcpu) { asm volatile(""); change(vcpu); }
KEPT void svm_free_nested(struct vcpu *vcpu) { asm volatile(""); change(vcpu); asm volatile(""); }
KEPT int svm_vcpu_create(struct vcpu *vcpu) { inside(); asm volatile(""); return 0; }
#define SVM_CALLER(name) KEPT void name(struct vcpu *vcpu, unsigned msr, int type, unsigned enable, bool set) { \\
    if (set) svm_set_intercept_for_msr(vcpu, msr, type, enable); \\
    else set_msr_interception_bitmap(vcpu, other ? other : vcpu->bitmap, msr, !(enable & 1), !(enable & 2)); \\
    asm volatile(""); }
SVM_CALLER(svm_set_msr)
SVM_CALLER(svm_vcpu_after_set_cpuid)
#define CALLER(name) KEPT void name(struct vcpu *vcpu, unsigned msr, int type, unsigned enable, bool set) { \\
    if (set) vmx_set_intercept_for_msr(vcpu, msr, type, enable); \\
    else if (enable) vmx_enable_intercept_for_msr(vcpu, msr, type); \\
    else vmx_disable_intercept_for_msr(vcpu, msr, type); \\
    asm volatile(""); }
CALLER(vmx_set_msr)
CALLER(vmx_vcpu_after_set_cpuid)
"""


CALLERS = {"vmx_set_msr": "msr_write", "vmx_vcpu_after_set_cpuid": "cpuid_update"}
SVM_CALLERS = {"svm_set_msr": "msr_write", "svm_vcpu_after_set_cpuid": "cpuid_update"}


PAGE, MSRPM = 4096, 8192


class Vcpu(ctypes.Structure):
    _fields_ = (("kvm", ctypes.c_void_p), ("bitmap", ctypes.c_void_p), ("exits", ctypes.c_uint64))
    FILTER_OFFSET, BITMAP_OFFSET, EXITS_OFFSET = 0, 8, 16


class StandIn:
    """The library, an Engine on it, and what the two have counted since they were last asked."""

    def __init__(self, library: Path, layout: Layout) -> None:
        self.path, self.layout, self.library = library, layout, ctypes.CDLL(str(library))
        self.vendor: Vendor = SVM if layout in SVM.layouts else VMX
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(library))]
        self.base = min(int(line.partition("-")[0], 16) for line in mapped)
        self.size = MSRPM if self.vendor is SVM else PAGE
        self.page, self.next = ctypes.create_string_buffer(self.size), ctypes.create_string_buffer(self.size)
        self.vcpus: list[Vcpu] = []
        self.callers: dict[tuple[int, int, int], str] = {}
        self.inside(lambda: None)
        lives = (self.vendor.vcpu_create[0], VCPU_CREATED, self.vendor.vcpu_free[0])
        names = [*layout.functions, *lives, *layout.writers]
        names += SVM_CALLERS if self.vendor is SVM else CALLERS
        module = self.vendor.module
        self.symbols = Symbols.of(
            (Symbol(self.address(name), name, module) for name in names), module, vendor=self.vendor
        )

    def address(self, name: str) -> int:
        return int(ctypes.cast(self.library[name], ctypes.c_void_p).value or 0)

    def link(self, symbol: str, program: int, at_return: bool) -> int:
        return attach_uprobe(self.path, self.address(symbol) - self.base, program, at_return=at_return)

    def start(self, options: Options) -> None:
        self.engine = Engine(self.layout, self.symbols, options)
        self.last = self.taken()

    def taken(self) -> Snapshot:
        """A snapshot by another thread, while this one sleeps: so it is in none of the functions."""
        with ThreadPoolExecutor(1) as reader:
            return reader.submit(self.engine.snapshot, 5.0).result()

    def close(self) -> None:
        self.engine.close()

    def vcpu(self, bitmap: int | None = None, kvm: int = 0x1000) -> Vcpu:
        """A vCPU whose address no other has."""
        self.vcpus.append(Vcpu(kvm, ctypes.addressof(self.page) if bitmap is None else bitmap))
        return self.vcpus[-1]

    def inside(self, act: Callable[[], object]) -> None:
        """What update functions, and those that make something, do."""
        self._callback = ctypes.CFUNCTYPE(None)(lambda: (act(), None)[1])
        ctypes.c_void_p.in_dll(self.library, "inside").value = ctypes.cast(self._callback, ctypes.c_void_p).value

    def call(  # noqa: PLR0917 (as the function that it calls)
        self, caller: str, vcpu: Vcpu, msr: int, type_: int, enable: int, after: bytes | None = None
    ) -> None:
        """CALLER calls for MSR; AFTER is what the bitmap holds then, None: what it holds now.

        ENABLE is true or false or, for a call that names both directions, those that are to be intercepted.
        """
        self._will_be(after)
        arguments = (ctypes.c_uint32(msr), type_, ctypes.c_uint32(enable), ctypes.c_bool(self.layout.set_ is not None))
        self.library[caller](ctypes.byref(vcpu), *arguments)

    def _will_be(self, after: bytes | None) -> None:
        if after is not None:
            self.next.raw = after
        where = ctypes.addressof(self.next) if after is not None else None
        ctypes.c_void_p.in_dll(self.library, "next").value = where
        ctypes.c_ulong.in_dll(self.library, "size").value = self.size

    def update(self, vcpu: Vcpu) -> None:
        self.library[self.layout.update](ctypes.byref(vcpu))

    def free(self, vcpu: Vcpu) -> None:
        self.library[self.vendor.vcpu_free[0]](ctypes.byref(vcpu))

    def write(self, writer: str, vcpu: Vcpu, after: bytes) -> None:
        """WRITER writes the bitmap without a call."""
        self._will_be(after)
        self.library[writer](ctypes.byref(vcpu))

    @contextmanager
    def for_another(self, bitmap: ctypes.Array[ctypes.c_char]) -> Iterator[None]:
        """Calls change BITMAP, which is not the vCPU's own."""
        place = ctypes.c_void_p.in_dll(self.library, "other")
        place.value = ctypes.addressof(bitmap)
        try:
            yield
        finally:
            place.value = None

    def create(self, vcpu: Vcpu, then: Callable[[], object] = lambda: None, *, fails: bool = False) -> None:
        """The vendor's part does what `inside` was given, THEN KVM does more. The end of one that FAILS is not seen."""
        self.library[self.vendor.vcpu_create[0]](ctypes.byref(vcpu))
        then()
        if not fails:
            self.library[VCPU_CREATED](ctypes.byref(vcpu))

    def set_filter(self, kvm: int = 0x1000, result: int = 0) -> None:
        ctypes.c_int.in_dll(self.library, "result").value = result
        self.library["kvm_vm_ioctl_set_msr_filter"](ctypes.c_void_p(kvm), None)

    def counted(self) -> Snapshot:
        """What the engine has counted since this was last asked."""
        now, earlier = self.taken(), self.last
        self.last = now
        return now.since(earlier)


@contextmanager
def running(
    library: Path,
    layout: Layout,
    btf: Btf | None,
    options: Options,
    *,
    edit: tuple[str, str] = ("", ""),
    wanted: Callable[[Variant], bool] = lambda _: True,
) -> Iterator[StandIn]:
    """The program reads the kernel's memory; here that is this process's, and nothing else differs but by EDIT.

    Loaded as the first variant that is WANTED.
    """
    source, code = library.parent / "msrtrace.c", whole_text(SOURCE)
    for old, new in (("BPF_FUNC_probe_read_kernel", "BPF_FUNC_probe_read_user"), edit):
        assert old in code
        code = code.replace(old, new) if old else code
    source.write_text(code)
    stand_in = StandIn(library, layout)

    def of_module(*_: object) -> Btf:
        if btf is None:
            raise BtfError("none")
        return btf

    def link(probes: Probes, symbol: Symbol, _: Symbols, program: str, at_return: bool) -> int:
        return stand_in.link(symbol.name, probes._functions[program], at_return)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tracer.trace.engine.resource", lambda _: source)
        patch.setattr(Probes, "_link", link)
        patch.setattr(Btf, "of_module", of_module)
        if btf is None:
            patch.setattr(Btf, "of_kernel", of_module)
        patch.setattr("tracer.trace.engine.variants", lambda *given: [*filter(wanted, variants(*given))])
        stand_in.start(options)
    try:
        yield stand_in
    finally:
        stand_in.close()


class StandInBtf(KnownBtf):
    def offset(self, structure: str, member: str) -> int:
        if structure == "task_struct":
            return 0  # as if it were not known: the command is that of the thread
        places = {
            "vmcs01": Vcpu.BITMAP_OFFSET,
            "msrpm": Vcpu.BITMAP_OFFSET,
            "kvm": Vcpu.FILTER_OFFSET,
            "stat": Vcpu.EXITS_OFFSET,
        }
        return places.get(member, 0)


ACCESS = {READ: "read", WRITE: "write", BOTH: "read_write"}


MSRS = [0, 7, 8, 0x10, 0x1FFF, 0x2000, 0xBFFFFFFF, 0xC0000000, 0xC0000100, 0xC0001FFF, 0xC0002000, 0xFFFFFFFF]
#: SVM has a third range.
SVM_MSRS = [*MSRS, 0xC000FFFF, 0xC0010000, 0xC0010130, 0xC0011FFF, 0xC0012000]


@st.composite
def pages(draw: st.DrawFn) -> bytes:
    """A bitmap that has only zeros or ones but in bytes where the MSRs above have their bits."""
    page = bytearray([draw(st.sampled_from([0, 0xFF]))] * PAGE)
    places = [base + at for base in (0, 0x400, 0x800, 0xC00) for at in (0, 1, 2, 0x20, 0x3FF)]
    for place in draw(st.lists(st.sampled_from(places), max_size=8)):
        page[place] = draw(st.integers(0, 255))
    return bytes(page)


@st.composite
def msrpms(draw: st.DrawFn) -> bytes:
    """The same of SVM's bitmap."""
    page = bytearray([draw(st.sampled_from([0, 0xFF]))] * MSRPM)
    for msr in draw(st.lists(st.sampled_from(SVM_MSRS), max_size=8)):
        at = next((0x800 * n for n, base in enumerate((0, 0xC0000000, 0xC0010000)) if 0 <= msr - base < 0x2000), None)
        if at is not None:
            page[at + (msr & 0x1FFF) // 4] = draw(st.integers(0, 255))
    return bytes(page)


#: As `calls`: of a function that takes a type and a bool, and of one that names both directions.
svm_calls, passing_calls = (
    st.tuples(st.sampled_from([*SVM_CALLERS]), st.sampled_from(SVM_MSRS), types, enables, st.booleans(), msrpms())
    for types, enables in ((st.sampled_from([*ACCESS]), st.integers(0, 1)), (st.just(BOTH), st.integers(0, BOTH)))
)


calls = st.tuples(
    st.sampled_from([*CALLERS]),
    st.sampled_from(MSRS),
    st.sampled_from([*ACCESS]),
    st.integers(0, 1),
    st.booleans(),
    pages(),
)


def places(stand_in: StandIn, kinds: list[tuple[int, int, int]], within: str) -> dict[int, int]:
    """Where the program counts KINDS of calls, by their keys, if an update for that cause makes them in this order."""
    counters, taken = stand_in.engine._reader._arrays["counters"], stand_in.engine._built.loaded.maps["taken"]
    for index in range(counters.entries):
        counters.set(index, "key", 0)
    for key in taken.keys():  # noqa: SIM118 (a map of the kernel's)
        if struct.unpack("II", key)[1] == TABLES.index("counters"):
            taken.delete(key)
    vcpu = stand_in.vcpu(kvm=0x6000)
    stand_in.inside(lambda: None)
    stand_in.create(vcpu)
    if within == "recalc":
        stand_in.update(vcpu)  # the first is its creation's
    if within == "filter_change":
        stand_in.set_filter(0x6000)

    def update() -> None:
        for msr, type_, enable in kinds:
            stand_in.call(f"{stand_in.vendor.name}_set_msr", vcpu, msr, type_, enable)

    stand_in.inside(update)
    stand_in.update(vcpu)
    stand_in.free(vcpu)
    return {counters.get(index, "key"): index for index in counters.used("key")}


def kinds(stand_in: StandIn) -> tuple[int, int]:
    """How many filter changes, and how many other recomputations."""
    counted = stand_in.counted()
    assert not counted.lower_bound
    return sum(d.count for d in counted.updates.values()), sum(d.count for d in counted.recalcs.values())


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Makes BCC use the headers of a kernel; it makes no difference which."""
    with headers_of("bookworm", tmp_path_factory.mktemp("headers")):
        yield
