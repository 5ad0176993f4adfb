"""The BPF program: compiled against the headers of each emulated host, through this machine's verifier, and run.

This machine need not have kprobes, let alone kvm_intel: what runs under the program is a stand-in for KVM in this
process, probed with uprobes, so the program gets to see every change of a bitmap that one can think of.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hosts import HOSTS, kernel
from hypothesis import given, settings
from hypothesis import strategies as st

from tracer.btf import Btf, BtfError
from tracer.doctor import Machine
from tracer.engine import _COUNTS, Engine, Options, _compile, _Point, definitions, points
from tracer.errors import MsrtraceError
from tracer.layout import LAYOUTS, Layout, Symbol, Symbols
from tracer.resources import resource
from tracer.snapshot import DURATION_BOUNDS, Call, Durations, Map, Outcome, Probe, Snapshot

SOURCE = resource("bpf/msrtrace.c")
TRIVIAL = "#include <uapi/linux/ptrace.h>\nint trivial(struct pt_regs *ctx)\n{\n\treturn 0;\n}\n"
#: Debian 12's BCC, the oldest that is to do, compiles against these; it may not be able to against newer ones.
MUST_COMPILE = ("bookworm", "trixie", "filter-only")

# BCC would rather have bytes of Python 3 too.
pytestmark = pytest.mark.filterwarnings("ignore:not a bytes object:DeprecationWarning")

NOTHING = Symbols.of([])
MACHINE = Machine.here()


class KnownBtf(Btf):
    """As kvm_intel's in 6.1.192."""

    def __init__(self) -> None:
        super().__init__(b"\x9f\xeb\x01\x00" + (24).to_bytes(4, "little") + bytes(16))

    def offset(self, structure: str, member: str) -> int:
        return {"vmcs01": 6792, "msr_bitmap": 48, "kvm": 0}[member]


Configuration = tuple[str, ...]  # the -D


def configurations() -> dict[Configuration, set[str]]:
    """Every way in which the engine may configure the program, and the functions that it may then attach."""
    found: dict[Configuration, set[str]] = {}
    for layout in LAYOUTS:
        for btf in (None, KnownBtf()) if layout.calls else (None,):
            for filter_known in (True, False) if layout.filter_set else (False,):
                for by_vm in (False, True):
                    for pid in (None, 4711):
                        defined = definitions(layout, btf, filter_known, Options(by_vm, pid))
                        probed = points(layout, NOTHING, exact=btf is not None)
                        if not filter_known:
                            probed = [point for point in probed if point.function != layout.filter_set]
                        names = {name for point in probed for name in (point.entry, point.returned) if name}
                        key = tuple(f"{name}={value}" for name, value in sorted(defined.items()))
                        found.setdefault(key, set()).update(names)
    return found


CONFIGURATIONS = configurations()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "headers" in metafunc.fixturenames:
        names = [name for name in str(metafunc.config.getoption("--hosts")).split(",") if name in HOSTS]
        ids = [f"against-{name}" for name in names]
        metafunc.parametrize("headers", names, ids=ids, indirect=True, scope="module")


def one_tree(packages: Path, tree: Path) -> None:
    """Join Debian's two header packages: of BCC_KERNEL_SOURCE, BCC takes all from one tree (loader.cc)."""
    for part in ("common", "amd64"):
        [headers] = packages.glob(f"linux-headers-*-{part}")
        for folder in ("include", "arch/x86/include"):
            (tree / folder).mkdir(parents=True, exist_ok=True)
            for entry in (headers / folder).iterdir():  # the two have none in common
                (tree / folder / entry.name).symlink_to(entry)


def compiled(source: Path | str, folder: Path, *flags: str) -> Any:
    if isinstance(source, str):
        (folder / "program.c").write_text(source)
        source = folder / "program.c"
    return _compile(source, list(flags), MACHINE)


def verify(bpf: Any, *names: str) -> None:
    """Load functions as what they are when they are attached. Raises with the verifier's answer."""
    try:
        for name in names:
            bpf.load_func(name, bpf.KPROBE)
    finally:
        bpf.cleanup()


@pytest.fixture(scope="module")
def headers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Makes BCC use the headers of one host's kernel."""
    if os.geteuid():
        pytest.skip("only root may load BPF programs: sudo build/venv/bin/pytest tests/test_bpf.py")
    name = str(request.param)
    tree = tmp_path_factory.mktemp("headers")
    one_tree(kernel(HOSTS[name]) / "usr/src", tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BCC_KERNEL_SOURCE", str(tree))
        try:
            verify(compiled(TRIVIAL, tree), "trivial")
        except MsrtraceError as error:
            if name in MUST_COMPILE:
                raise
            pytest.skip(f"this machine's BCC cannot compile even an empty program against {name}'s headers: {error}")
        yield name


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids="-".join)
@pytest.mark.usefixtures("headers")
def test_program(configuration: Configuration, tmp_path: Path) -> None:
    bpf = compiled(SOURCE, tmp_path, *[f"-D{definition}" for definition in configuration])
    verify(bpf, *sorted(CONFIGURATIONS[configuration]))


def test_what_is_verified() -> None:
    assert len(CONFIGURATIONS) == 24
    assert CONFIGURATIONS["BITMAP_OFFSET=6840", "BY_PID=1", "FILTER_OFFSET=0", "WANTED_PID=4711"] == {
        "update_entered",
        "update_returned",
        "filter_set_entered",
        "filter_set_returned",
        "vcpu_created",
        "set_entered",
        "call_returned",
    }
    assert CONFIGURATIONS[("UPDATE_KIND=1",)] == {
        "update_entered",
        "update_returned",
        "vcpu_created",
        "enable_entered",
        "disable_entered",
    }
    functions = set(re.findall(r"^int (\w+)\(struct pt_regs \*ctx\)$", SOURCE.read_text(), re.MULTILINE))
    assert set.union(*CONFIGURATIONS.values()) == functions


@pytest.mark.usefixtures("headers")
def test_the_verifier_refuses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An unbounded read, by the same way; with a bound it passes."""
    source = (
        "#include <uapi/linux/ptrace.h>\n"
        "BPF_ARRAY(values, u64, 1);\n"
        "int reads(struct pt_regs *ctx)\n"
        "{\n"
        "\tint zero = 0;\n"
        "\tu64 index = PT_REGS_PARM2(ctx), *value = values.lookup(&zero);\n\n"
        "\treturn value && CONDITION ? value[index] : 0;\n"
        "}\n"
    )
    verify(compiled(source, tmp_path, "-DCONDITION=index<1"), "reads")
    unbounded = compiled(source, tmp_path, "-DCONDITION=1")
    with pytest.raises(Exception, match=r"^Failed to load BPF program b'reads': "):
        verify(unbounded, "reads")
    assert "math between map_value pointer and register with unbounded min value" in capfd.readouterr().err


@pytest.mark.usefixtures("headers")
def test_what_the_compiler_says_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(MsrtraceError) as failure:
        compiled(TRIVIAL.replace("return 0", "return UPDATE_KIND"), tmp_path)
    message = str(failure.value)
    assert "error: use of undeclared identifier 'UPDATE_KIND'" in message
    assert "\n" not in message


# --- numbers that the program and the engine both know ---


def enumeration(name: str) -> list[str]:
    found = re.search(rf"^enum {name} {{(.*?)}};", SOURCE.read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return re.findall(r"\b[A-Z_]+\b", re.sub(r"/\*.*?\*/", "", found[1]))


def test_counts() -> None:
    assert [*map(str.upper, _COUNTS), "COUNTS"] == enumeration("count")


def test_buckets() -> None:
    [buckets] = map(int, re.findall(r"^#define BUCKETS (\d+)\b", SOURCE.read_text(), re.MULTILINE))
    assert buckets >= len(DURATION_BOUNDS) + 2  # the first is not used, the last has the rest
    assert buckets.bit_count() == 1  # it is the mask that bounds an index, too


# --- the engine and its maps, filled by hand ---

TOGGLE = next(layout for layout in LAYOUTS if layout.name == "toggle")
RECALC = next(layout for layout in LAYOUTS if layout.name == "recalc")
HOOK, ENABLE, DISABLE, CREATE = TOGGLE.update, "vmx_enable_intercept_for_msr", TOGGLE.disable, "vmx_vcpu_create"


def symbols(layout: Layout, *more: str) -> Symbols:
    """Each function is 0x100 long, the first begins at 0x1000."""
    names = [layout.update, *layout.calls, *more]
    return Symbols.of(Symbol(0x1000 + 0x100 * n, name, "kvm_intel") for n, name in enumerate(names))


@pytest.fixture
def no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attaching and detaching are the kernel's; everything else is as it is."""
    from bcc import BPF

    def attach(engine: Engine, point: _Point) -> Probe:
        return Probe(point.function, point.function, True, point.function)

    monkeypatch.setattr(Engine, "_attach", attach)
    monkeypatch.setattr(BPF, "detach_kprobe", lambda *_, **__: None)
    monkeypatch.setattr(BPF, "detach_kretprobe", lambda *_, **__: None)
    monkeypatch.setattr(Btf, "of_module", lambda *_: KnownBtf())


def fill(engine: Engine, name: str, key: tuple[int, ...], **values: int) -> None:
    table = engine._bpf[name]
    leaf = table.Leaf()
    for field, value in values.items():
        setattr(leaf, field, value)
    table[table.Key(*key)] = leaf


def put(engine: Engine, **counts: int) -> None:
    table = engine._bpf["counts"]
    for name, value in counts.items():
        table[table.Key(_COUNTS.index(name))] = table.Leaf(value)


IN_HOOK, IN_CREATE, OUTSIDE = 0x1010, 0x13FF, 0x0FFF
NO_UPDATE, FILTER_CHANGE, RECOMPUTED = 0, 1, 2
READ, WRITE, BOTH = 1, 2, 3


@pytest.mark.usefixtures("headers", "no_probes")
def test_engine() -> None:
    engine = Engine(TOGGLE, symbols(TOGGLE, CREATE), Options(by_vm=True), MACHINE)
    bpf = engine._bpf
    try:
        assert engine.warnings == []
        # struct call: caller, pid, msr, type, action (1: enable), within
        fill(engine, "calls", (IN_CREATE, 100, 0x10, READ, 0, NO_UPDATE), calls=7, changed_read=6, redundant=1)
        fill(engine, "calls", (IN_CREATE - 16, 100, 0x10, READ, 0, NO_UPDATE), calls=2, redundant=2)
        fill(engine, "calls", (IN_HOOK, 100, 0xC0000100, BOTH, 0, FILTER_CHANGE), calls=5, changed_write=3, refused=4)
        fill(engine, "calls", (IN_HOOK, 200, 0x48, WRITE, 1, FILTER_CHANGE), calls=3, redundant=2, unknown=1)
        fill(engine, "calls", (OUTSIDE, 200, 0x48, WRITE, 1, NO_UPDATE), calls=1, redundant=1)
        updates = engine._bpf["updates"]
        leaf = updates.Leaf(count=5, nanoseconds=2_500_000_000)
        leaf.buckets[1], leaf.buckets[2], leaf.buckets[25], leaf.buckets[len(leaf.buckets) - 1] = 2, 1, 1, 1
        updates[updates.Key(100, FILTER_CHANGE)] = leaf
        updates[updates.Key(200, RECOMPUTED)] = updates.Leaf(count=1, nanoseconds=500_000_000)
        fill(engine, "threads", (4711,), msr=0x10)
        losses = {"dropped_calls": 1, "dropped_threads": 2, "dropped_updates": 3, "unpaired_disable": 4}
        losses |= {"unpaired_enable": 5, "unpaired_update": 6, "unpaired_return": 7, "read_failed": 8}
        put(engine, **losses, vcpus_seen=9)
        taken = engine.snapshot()
        assert taken.calls == {
            Call(0x10, "read", "disable", "vcpu_create", CREATE, 100): Outcome(9, 3, 6, 0, 0),
            Call(0xC0000100, "read_write", "disable", "filter_change", HOOK, 100): Outcome(5, 0, 0, 3, 4),
            Call(0x48, "write", "enable", "filter_change", HOOK, 200): Outcome(3, 2, 0, 0, 0),
            Call(0x48, "write", "enable", "other", "0xfff", 200): Outcome(1, 1, 0, 0, 0),
        }
        assert taken.updates == {100: Durations(5, 2.5, (2, 1, *[0] * 22, 2))}
        assert taken.recalcs == {200: Durations(1, 0.5, (0,) * 25)}
        assert [(probe.function, probe.missed) for probe in taken.probes] == [
            (HOOK, 6),
            (CREATE, 0),
            (ENABLE, 5),
            (DISABLE, 4),
        ]
        assert taken.maps == (Map("calls", 5, 8192, 1), Map("threads", 1, 16384, 2), Map("updates", 2, 4096, 3))
        assert (taken.unpaired_returns, taken.read_failures, taken.vcpus_seen) == (7, 8, 9)
        assert (taken.layout, taken.redundancy, taken.by_vm, taken.lower_bound) == ("toggle", "exact", True, True)

        engine.forget({100})
        left = engine.snapshot()
        assert {call.pid for call in left.calls} == {200}
        assert (left.updates, list(left.recalcs), left.vcpus_seen) == ({}, [200], 9)

        engine.detach()
        assert engine.reattach(TOGGLE, symbols(TOGGLE, "vmx_create_vcpu"))
        fresh = engine.snapshot()
        assert (fresh.calls, fresh.updates, fresh.recalcs, fresh.vcpus_seen) == ({}, {}, {}, 0)
        assert not fresh.lower_bound
        assert [probe.function for probe in fresh.probes] == [HOOK, "vmx_create_vcpu", ENABLE, DISABLE]
        assert not engine.reattach(RECALC, symbols(RECALC))
        assert engine._bpf is bpf
    finally:
        engine.close()


@pytest.mark.usefixtures("headers", "no_probes")
def test_engine_without_btf(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Btf:
        raise BtfError("/sys/kernel/btf/kvm_intel: No such file or directory")

    monkeypatch.setattr(Btf, "of_module", missing)
    engine = Engine(RECALC, symbols(RECALC), Options(), MACHINE)
    try:
        assert engine.warnings == [
            "filter updates cannot be told from other recalculations, so they are not counted",
            "which calls are redundant is unknown: /sys/kernel/btf/kvm_intel: No such file or directory",
        ]
        fill(engine, "calls", (0x1010, 0, 0x10, READ, 0, RECOMPUTED), calls=7, unknown=7)
        taken = engine.snapshot()
        assert taken.calls == {Call(0x10, "read", "disable", "recalc", RECALC.update): Outcome(7)}
        assert (taken.redundancy, taken.calls_observable, taken.updates_observable) == ("unknown", True, False)
    finally:
        engine.close()


@pytest.mark.usefixtures("headers", "no_probes")
def test_runs_that_were_skipped_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """bpf_prog->stats.misses goes on counting while the program stays loaded."""
    misses = {"update_entered": 2, "update_returned": 1, "call_returned": 4, "disable_entered": 8}
    monkeypatch.setattr(Engine, "_misses", lambda _, program: misses.get(program, 0))
    engine = Engine(TOGGLE, symbols(TOGGLE, CREATE), Options(), MACHINE)
    try:
        missed = {probe.function: probe.missed for probe in engine.snapshot().probes}
        assert missed == {HOOK: 3, CREATE: 0, ENABLE: 4, DISABLE: 8}
        engine.detach()
        assert engine.reattach(TOGGLE, symbols(TOGGLE, CREATE))
        misses["disable_entered"] = 13
        again = {probe.function: probe.missed for probe in engine.snapshot().probes}
        assert again == {HOOK: 0, CREATE: 0, ENABLE: 0, DISABLE: 5}
    finally:
        engine.close()


class Probing:
    """Attaches where it may, and knows what hangs on a function."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *refused: str) -> None:
        from bcc import BPF

        self.refused, self.held = set(refused), Counter[str]()

        def attach(_: Engine, point: _Point) -> Probe:
            if point.function in self.refused:
                return Probe(point.function, point.function, False, "refused")
            self.held[point.function] += 1
            return Probe(point.function, point.function, True, point.function)

        def detach(_: object, event: str) -> None:
            self.held[event] -= 1

        monkeypatch.setattr(Engine, "_attach", attach)
        monkeypatch.setattr(BPF, "detach_kprobe", detach)


@pytest.mark.usefixtures("headers", "no_probes")
def test_updates_are_not_claimed_to_be_seen_without_the_probe_that_tells_them_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert RECALC.filter_set
    Probing(monkeypatch, RECALC.filter_set)
    engine = Engine(RECALC, symbols(RECALC, RECALC.filter_set), Options(), MACHINE)
    try:
        assert not engine.snapshot().updates_observable
    finally:
        engine.close()


@pytest.mark.usefixtures("headers", "no_probes")
def test_a_reattachment_that_fails_leaves_no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    probing = Probing(monkeypatch)
    engine = Engine(TOGGLE, symbols(TOGGLE, CREATE), Options(), MACHINE)
    try:
        assert +probing.held == {HOOK: 1, CREATE: 1, ENABLE: 1, DISABLE: 1}
        engine.detach()
        assert not +probing.held
        probing.refused = {HOOK, ENABLE, str(DISABLE)}
        with pytest.raises(MsrtraceError, match="no probe could be attached"):
            engine.reattach(TOGGLE, symbols(TOGGLE, CREATE))
        assert not +probing.held  # or it would be there twice after the next attempt
    finally:
        engine.close()


# --- the program at work, on a stand-in for KVM ---

STAND_IN = """
#include <stdbool.h>
#include <string.h>
struct vcpu { void *kvm; unsigned char *bitmap; };
unsigned char *next; /* what the bitmap is after a call */
void (*inside)(void);
int result;
#define KEPT __attribute__((noipa))
static void change(struct vcpu *vcpu) { if (next) memcpy(vcpu->bitmap, next, 4096); }
KEPT void vmx_disable_intercept_for_msr(struct vcpu *vcpu, unsigned msr, int type) { change(vcpu); }
KEPT void vmx_enable_intercept_for_msr(struct vcpu *vcpu, unsigned msr, int type) { change(vcpu); }
KEPT void vmx_set_intercept_for_msr(struct vcpu *vcpu, unsigned msr, int type, bool set) { change(vcpu); }
KEPT void vmx_msr_filter_changed(struct vcpu *vcpu) { inside(); asm volatile(""); }
KEPT void vmx_recalc_intercepts(struct vcpu *vcpu) { inside(); asm volatile(""); }
KEPT int vmx_vcpu_create(struct vcpu *vcpu) { inside(); asm volatile(""); return 0; }
KEPT int kvm_vm_ioctl_set_msr_filter(void *kvm, void *filter) { inside(); return result; }
#define CALLER(name) KEPT void name(struct vcpu *vcpu, unsigned msr, int type, bool enable, bool set) { \\
    if (set) vmx_set_intercept_for_msr(vcpu, msr, type, enable); \\
    else if (enable) vmx_enable_intercept_for_msr(vcpu, msr, type); \\
    else vmx_disable_intercept_for_msr(vcpu, msr, type); \\
    asm volatile(""); }
CALLER(vmx_set_msr)
CALLER(vmx_vcpu_after_set_cpuid)
"""
CALLERS = {"vmx_set_msr": "msr_write", "vmx_vcpu_after_set_cpuid": "cpuid_update"}
PAGE = 4096


class Vcpu(ctypes.Structure):
    _fields_ = (("kvm", ctypes.c_void_p), ("bitmap", ctypes.c_void_p))
    FILTER_OFFSET, BITMAP_OFFSET = 0, 8


class StandIn:
    """The library, an Engine on it, and what the two have counted since they were last asked."""

    def __init__(self, library: Path, layout: Layout) -> None:
        self.path, self.layout, self.library = library, layout, ctypes.CDLL(str(library))
        self.page, self.next = ctypes.create_string_buffer(PAGE), ctypes.create_string_buffer(PAGE)
        self.vcpus: list[Vcpu] = []
        self.inside(lambda: None)
        names = [*layout.calls, layout.update, "vmx_vcpu_create", *CALLERS]
        names += [layout.filter_set] if layout.filter_set else []
        self.symbols = Symbols.of(Symbol(self.address(name), name, "kvm_intel") for name in names)

    def address(self, name: str) -> int:
        return int(ctypes.cast(self.library[name], ctypes.c_void_p).value or 0)

    def attach(self, engine: Engine, point: _Point) -> Probe:
        where = {"name": str(self.path), "sym": point.function, "pid": os.getpid()}
        if point.returned:
            engine._bpf.attach_uretprobe(fn_name=point.returned, **where)
        engine._bpf.attach_uprobe(fn_name=point.entry, **where)
        return Probe(point.function, point.function, True, str(self.path))

    def start(self, options: Options) -> None:
        self.engine = Engine(self.layout, self.symbols, options, MACHINE)
        self.last = self.engine.snapshot()

    def close(self) -> None:
        for fd in self.engine._bpf.uprobe_fds.values():
            os.close(fd)
        self.engine._bpf.uprobe_fds.clear()  # BCC would ask tracefs to remove them, which need not be mounted
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
        self, caller: str, vcpu: Vcpu, msr: int, type_: int, enable: bool, after: bytes | None = None
    ) -> None:
        """CALLER calls for MSR; AFTER is what the bitmap holds then, None: what it holds now."""
        if after is not None:
            self.next.raw = after
        where = ctypes.addressof(self.next) if after is not None else None
        ctypes.c_void_p.in_dll(self.library, "next").value = where
        arguments = (ctypes.c_uint32(msr), type_, ctypes.c_bool(enable), ctypes.c_bool(self.layout.set_ is not None))
        self.library[caller](ctypes.byref(vcpu), *arguments)

    def update(self, vcpu: Vcpu) -> None:
        self.library[self.layout.update](ctypes.byref(vcpu))

    def create(self, vcpu: Vcpu) -> None:
        self.library["vmx_vcpu_create"](ctypes.byref(vcpu))

    def set_filter(self, kvm: int = 0x1000, result: int = 0) -> None:
        ctypes.c_int.in_dll(self.library, "result").value = result
        self.library["kvm_vm_ioctl_set_msr_filter"](ctypes.c_void_p(kvm), None)

    def counted(self) -> Snapshot:
        """What the engine has counted since this was last asked."""
        now, earlier = self.engine.snapshot(), self.last
        self.last = now
        return now.since(earlier)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand-in")
    (folder / "kvm.c").write_text(STAND_IN)
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", "kvm.so", "kvm.c"], cwd=folder, check=True)
    return folder / "kvm.so"


@contextmanager
def running(library: Path, layout: Layout, btf: Btf | None, options: Options) -> Iterator[StandIn]:
    """The program reads the kernel's memory; here that is this process's, and nothing else differs."""
    source = library.parent / "msrtrace.c"
    source.write_text(SOURCE.read_text().replace("bpf_probe_read_kernel", "bpf_probe_read_user"))
    stand_in = StandIn(library, layout)

    def of_module(*_: object) -> Btf:
        if btf is None:
            raise BtfError("none")
        return btf

    def attach(engine: Engine, point: _Point) -> Probe:
        return stand_in.attach(engine, point)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tracer.engine.resource", lambda _: source)
        patch.setattr(Engine, "_attach", attach)
        patch.setattr(Btf, "of_module", of_module)
        stand_in.start(options)
    try:
        yield stand_in
    finally:
        stand_in.close()


class StandInBtf(KnownBtf):
    def offset(self, structure: str, member: str) -> int:
        return {"vmcs01": Vcpu.BITMAP_OFFSET, "msr_bitmap": 0, "kvm": Vcpu.FILTER_OFFSET}[member]


@pytest.fixture(scope="module")
def toggle(headers: str, library: Path) -> Iterator[StandIn]:
    with running(library, TOGGLE, StandInBtf(), Options()) as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def recalc(headers: str, library: Path) -> Iterator[StandIn]:
    with running(library, RECALC, StandInBtf(), Options(by_vm=True)) as stand_in:
        yield stand_in


@pytest.fixture
def blind(headers: str, library: Path) -> Iterator[StandIn]:
    with running(library, RECALC, None, Options()) as stand_in:
        yield stand_in


# Intel SDM vol. 3, "MSR-Bitmap Address": where the bit of an MSR is, for reads and for writes
QUARTERS = {range(0x2000): (0x000, 0x800), range(0xC0000000, 0xC0002000): (0x400, 0xC00)}
ACCESS = {READ: "read", WRITE: "write", BOTH: "read_write"}
MSRS = [0, 7, 8, 0x10, 0x1FFF, 0x2000, 0xBFFFFFFF, 0xC0000000, 0xC0000100, 0xC0001FFF, 0xC0002000, 0xFFFFFFFF]


def bits(page: bytes, msr: int, type_: int) -> dict[int, bool]:
    """The bits that TYPE_ names, by the direction; none for an MSR that has none."""
    for msrs, bases in QUARTERS.items():
        if msr in msrs:
            at, bit = divmod(msr - msrs.start, 8)
            return {
                d: bool(page[base + at] >> bit & 1) for d, base in zip((READ, WRITE), bases, strict=True) if type_ & d
            }
    return {}


def expected(before: bytes, after: bytes, msr: int, type_: int, enable: bool) -> Outcome:
    old, new = bits(before, msr, type_), bits(after, msr, type_)
    changed = {direction for direction in old if old[direction] != new[direction]}
    refused = not enable and any(new.values())
    return Outcome(1, not changed, READ in changed, WRITE in changed, refused)


@st.composite
def pages(draw: st.DrawFn) -> bytes:
    """A bitmap that has only zeros or ones but in bytes where the MSRs above have their bits."""
    page = bytearray([draw(st.sampled_from([0, 0xFF]))] * PAGE)
    places = [base + at for base in (0, 0x400, 0x800, 0xC00) for at in (0, 1, 2, 0x20, 0x3FF)]
    for place in draw(st.lists(st.sampled_from(places), max_size=8)):
        page[place] = draw(st.integers(0, 255))
    return bytes(page)


calls = st.tuples(
    st.sampled_from([*CALLERS]),
    st.sampled_from(MSRS),
    st.sampled_from([*ACCESS]),
    st.booleans(),
    st.booleans(),
    pages(),
)
few = settings(max_examples=30, deadline=None)


def check_calls(stand_in: StandIn, made: list[tuple[str, int, int, bool, bool, bytes]], pid: int, within: str) -> None:
    """Make calls, some of them inside an update; the engine must have seen each as the model does."""
    vcpu = stand_in.vcpu()
    stand_in.page.raw = b"\xff" * PAGE  # as a new one is
    stand_in.counted()
    wanted: dict[Call, Outcome] = {}
    for caller, msr, type_, enable, in_update, after in made:
        before = stand_in.page.raw

        def call() -> None:
            stand_in.call(caller, vcpu, msr, type_, enable, after)  # noqa: B023 (called in this round)

        if in_update:
            stand_in.inside(call)
            stand_in.update(vcpu)
        else:
            call()
        action, cause = "enable" if enable else "disable", within if in_update else CALLERS[caller]
        key = Call(msr, ACCESS[type_], action, cause, caller, pid)
        outcome = expected(before, after, msr, type_, enable)
        wanted[key] = wanted[key] + outcome if key in wanted else outcome
    counted = stand_in.counted()
    assert counted.calls == wanted
    updates = counted.updates if within == "filter_change" else counted.recalcs
    assert sum(d.count for d in updates.values()) == sum(in_update for *_, in_update, _ in made)
    assert not counted.lower_bound
    assert counted.maps[1].entries == 0  # no thread is thought to be inside of something


@few
@given(made=st.lists(calls, max_size=8))
def test_calls_of_enable_and_disable(toggle: StandIn, made: list[tuple[str, int, int, bool, bool, bytes]]) -> None:
    check_calls(toggle, made, 0, "filter_change")


@few
@given(made=st.lists(calls, max_size=8))
def test_calls_of_set(recalc: StandIn, made: list[tuple[str, int, int, bool, bool, bytes]]) -> None:
    check_calls(recalc, made, os.getpid(), "recalc")


def test_a_cpu_without_msr_bitmaps(toggle: StandIn) -> None:
    toggle.call("vmx_set_msr", toggle.vcpu(bitmap=0), 0x10, READ, True)
    assert list(toggle.counted().calls.values()) == [Outcome(1, 1, 0, 0, 0)]


def test_a_bitmap_that_cannot_be_read(toggle: StandIn) -> None:
    toggle.call("vmx_set_msr", toggle.vcpu(bitmap=0x10), 0x10, READ, True)
    counted = toggle.counted()
    assert list(counted.calls.values()) == [Outcome(1, 0, 0, 0, 0)]
    assert (counted.read_failures, counted.lower_bound) == (1, True)


def test_without_offsets_calls_are_counted(blind: StandIn) -> None:
    blind.inside(lambda: None)
    blind.call("vmx_set_msr", blind.vcpu(), 0x10, READ, True)
    blind.call("vmx_vcpu_after_set_cpuid", blind.vcpu(), 0x48, WRITE, False)
    assert blind.counted().calls == {
        Call(0x10, "read", "enable", "msr_write", "vmx_set_msr"): Outcome(1),
        Call(0x48, "write", "disable", "cpuid_update", "vmx_vcpu_after_set_cpuid"): Outcome(1),
    }


# --- updates ---


def kinds(stand_in: StandIn) -> tuple[int, int]:
    """How many filter changes, and how many other recomputations."""
    counted = stand_in.counted()
    assert not counted.lower_bound
    return sum(d.count for d in counted.updates.values()), sum(d.count for d in counted.recalcs.values())


@pytest.mark.parametrize("nanoseconds", [0, 3_000_000])
def test_duration(toggle: StandIn, nanoseconds: int) -> None:
    toggle.inside(lambda: time.sleep(nanoseconds / 1e9))
    before = time.perf_counter()
    toggle.update(toggle.vcpu())
    longest = time.perf_counter() - before
    [duration] = toggle.counted().updates.values()
    assert nanoseconds / 1e9 <= duration.seconds <= longest
    at = duration.buckets.index(1)
    bounds = (0, *DURATION_BOUNDS, float("inf"))
    assert bounds[at] < duration.seconds <= bounds[at + 1]
    assert (duration.count, sum(duration.buckets)) == (1, 1)


def test_every_update_is_a_filter_change_where_nothing_else_is(toggle: StandIn) -> None:
    toggle.inside(lambda: None)
    for vcpu in (toggle.vcpu(), toggle.vcpu()):
        toggle.update(vcpu)
        toggle.update(vcpu)
    assert kinds(toggle) == (4, 0)
    assert toggle.last.vcpus_seen >= 2


def test_filter_changes_told_from_other_recomputations(recalc: StandIn) -> None:
    recalc.inside(lambda: None)
    one, two, other = recalc.vcpu(kvm=0x2000), recalc.vcpu(kvm=0x2000), recalc.vcpu(kvm=0x3000)
    for vcpu in (one, two, other):
        recalc.create(vcpu)
        recalc.update(vcpu)
    assert kinds(recalc) == (0, 3)
    recalc.set_filter(0x2000)
    recalc.set_filter(0x2000)  # several before one run are one change
    for vcpu in (one, one, two, other):
        recalc.update(vcpu)
    assert kinds(recalc) == (2, 2)
    late = recalc.vcpu(kvm=0x2000)
    recalc.create(late)  # starts out with the filter
    recalc.update(late)
    assert kinds(recalc) == (0, 1)
    assert recalc.last.vcpus_seen >= 4


def test_a_filter_that_is_refused_changes_nothing(recalc: StandIn) -> None:
    recalc.inside(lambda: None)
    vcpu = recalc.vcpu(kvm=0x4000)
    recalc.create(vcpu)
    recalc.set_filter(0x4000, result=-22)
    recalc.update(vcpu)
    assert kinds(recalc) == (0, 1)
    recalc.set_filter(0x4000)
    recalc.set_filter(0x4000, result=-22)
    recalc.update(vcpu)
    recalc.update(vcpu)
    assert kinds(recalc) == (1, 1)


def test_a_vcpu_that_is_quicker_than_the_ioctl(recalc: StandIn) -> None:
    vcpu = recalc.vcpu(kvm=0x5000)
    recalc.inside(lambda: None)
    recalc.create(vcpu)

    def update_in_another_thread() -> None:
        recalc.inside(lambda: None)
        thread = threading.Thread(target=recalc.update, args=(vcpu,))
        thread.start()
        thread.join()

    recalc.inside(update_in_another_thread)
    recalc.set_filter(0x5000)
    recalc.update(vcpu)
    assert kinds(recalc) == (1, 1)


def test_threads_do_not_mix(toggle: StandIn) -> None:
    """A call in one thread, while another is inside of an update."""
    vcpu, page = toggle.vcpu(), toggle.page.raw

    def call_in_another_thread() -> None:
        thread = threading.Thread(target=toggle.call, args=("vmx_set_msr", vcpu, 0x10, READ, True, page))
        thread.start()
        thread.join()

    toggle.inside(call_in_another_thread)
    toggle.update(vcpu)
    assert [call.cause for call in toggle.counted().calls] == ["msr_write"]
