# SPDX-License-Identifier: GPL-2.0-or-later
"""bpf/exits.c on functions of this process that stand for KVM's, and its reader: every exit is counted once."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from known import KnownBtf
from needs import tool
from uprobe import attach_uprobe

from tracer.kernel.symbols import Symbol, Symbols
from tracer.model.exits import FAST, FILTERED, INVALID, L1, L2, OK, REFLECTED, SLOW, UNKNOWN, Exit
from tracer.model.msr import OTHER
from tracer.model.options import Options
from tracer.model.vmx import VMX
from tracer.program.resources import resource
from tracer.program.source import whole_text
from tracer.trace import exits
from tracer.trace.exits import CountedExits, ExitCounter
from tracer.trace.plan import process_values
from tracer.trace.probes import Probes

pytestmark = [
    pytest.mark.filterwarnings("ignore:not a bytes object:DeprecationWarning"),
    pytest.mark.timeout(900),  # the first may download a kernel
]

STAND_IN = """
struct vcpu { unsigned long rcx, nested, exits; };
#define FUNCTION(name, ...) __attribute__((noipa)) void name(struct vcpu *vcpu, ##__VA_ARGS__) { asm volatile(""); }
FUNCTION(kvm_emulate_rdmsr)
FUNCTION(kvm_emulate_wrmsr)
FUNCTION(handle_fastpath_set_msr_irqoff)
FUNCTION(kvm_emulate_rdmsr_imm, unsigned msr, int reg)
FUNCTION(kvm_emulate_wrmsr_imm, unsigned msr, int reg)
FUNCTION(handle_fastpath_wrmsr_imm, unsigned msr, int reg)
FUNCTION(kvm_msr_user_space, unsigned index, unsigned reason, unsigned long data, void *completion, unsigned r)
FUNCTION(nested_vmx_vmexit, unsigned reason, unsigned info, unsigned long qualification)
FUNCTION(vmx_vcpu_free)
"""
NAMES = [
    *("kvm_emulate_rdmsr", "kvm_emulate_wrmsr", "handle_fastpath_set_msr_irqoff", "kvm_emulate_rdmsr_imm"),
    *("kvm_emulate_wrmsr_imm", "handle_fastpath_wrmsr_imm", "kvm_msr_user_space", "nested_vmx_vmexit", "vmx_vcpu_free"),
]
#: What kvm_msr_user_space() is to have run: for exits, and for the instruction emulator.
COMPLETE = {"complete_read": 0x1000, "complete_read_imm": 0x2000, "complete_write": 0x3000}
EMULATED = 0x4000
RDMSR, WRMSR = 29, 30
REFUSED = {FILTERED: 3, UNKNOWN: 2, INVALID: 1}


class Vcpu(ctypes.Structure):
    _fields_ = (("rcx", ctypes.c_uint64), ("nested", ctypes.c_uint64), ("exits", ctypes.c_uint64))


class Kvm:
    """The library, an ExitCounter on it, and what it has counted since it was last asked."""

    def __init__(self, library: Path, options: Options) -> None:
        self.library = ctypes.CDLL(str(library))
        self.vcpus: list[Vcpu] = []
        self.last: Counter[Exit] = Counter()
        self.symbols = Symbols.of((Symbol(self.address(name), name, VMX.module) for name in NAMES), VMX.module)
        self.counter = ExitCounter(self.symbols, options, lambda: "not permitted")
        self.probes = self.counter.attach(self.symbols)

    def address(self, name: str) -> int:
        return int(ctypes.cast(self.library[name], ctypes.c_void_p).value or 0)

    def vcpu(self) -> Vcpu:
        """A vCPU whose address no other has."""
        self.vcpus.append(Vcpu())
        return self.vcpus[-1]

    def run(self, function: str, vcpu: Vcpu, *arguments: int, msr: int = 0, nested: bool = False) -> None:
        vcpu.rcx, vcpu.nested = 0xDEAD << 32 | msr, int(nested)
        self.library[function](ctypes.byref(vcpu), *map(ctypes.c_uint64, arguments))

    def refuse(self, vcpu: Vcpu, msr: int, access: str, r: int, completion: int) -> None:
        self.run("kvm_msr_user_space", vcpu, msr, RDMSR if access == "read" else WRMSR, 0, completion, r)

    def read(self) -> CountedExits:
        """By another thread, while this one sleeps: so it is in none of the functions."""
        with ThreadPoolExecutor(1) as reader:
            return reader.submit(self.counter.reader.read, 5.0).result()

    def counted(self) -> Counter[Exit]:
        """What was counted since this was last asked."""
        before, self.last = self.last, Counter(self.read().exits)
        return self.last - before


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exits")
    (folder / "kvm.c").write_text(STAND_IN)
    subprocess.run([tool("cc"), "-O1", "-shared", "-fPIC", "-o", "kvm.so", "kvm.c"], cwd=folder, check=True)
    code = whole_text(resource(exits.SOURCE))
    assert "BPF_FUNC_probe_read_kernel" in code
    (folder / "exits.c").write_text(code.replace("BPF_FUNC_probe_read_kernel", "BPF_FUNC_probe_read_user"))
    return folder / "kvm.so"


Start = Callable[..., Kvm]


@pytest.fixture(scope="module")
def start(headers: None, library: Path) -> Iterator[Start]:
    """The program reads the kernel's memory; here that is this process's, and nothing else differs."""
    made: list[Kvm] = []
    values: dict[str, int] = {}

    def link(probes: Probes, symbol: Symbol, _: Symbols, program: str, *, at_return: bool) -> int:
        there = ctypes.CDLL(str(library))
        address = int(ctypes.cast(there[symbol.name], ctypes.c_void_p).value or 0)
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(library) in line]
        base = min(int(line.partition("-")[0], 16) for line in mapped)
        return attach_uprobe(library, address - base, probes._functions[program], at_return=at_return)

    def new(options: Options = Options(), given: Mapping[str, int] = COMPLETE) -> Kvm:  # noqa: B008 (it is frozen)
        values.clear()
        values.update({"rcx_offset": 0, "nested_offset": 8, "nested_bits": 1, "exits_offset": 16, **given})
        values.update(process_values(options, None))
        values.update({} if options.by_vm else {"places": 2048})
        made.append(Kvm(library, replace(options, backend="kprobe")))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exits, "resource", lambda _: library.with_name("exits.c"))
        patch.setattr(exits, "exit_values", lambda *_: (dict(values), KnownBtf()))
        patch.setattr(Probes, "_link", link)
        yield new
    for kvm in made:
        kvm.counter.close()


@pytest.fixture(scope="module")
def kvm(start: Start) -> Kvm:
    return start()


@pytest.fixture
def another(start: Start) -> Iterator[Start]:
    """A trace of its own, for a test: probes of others see the same functions."""
    made: list[Kvm] = []

    def new(**options: bool | int) -> Kvm:
        made.append(start(Options(**options)))  # type: ignore[arg-type]
        return made[-1]

    yield new
    for one in made:
        one.counter.detach()


def test_all_is_probed(kvm: Kvm) -> None:
    assert [probe.function for probe in kvm.probes if not probe.attached] == []
    assert {probe.function for probe in kvm.probes} == {*NAMES}


#: MSRs, whether by a nested guest, and how the access goes.
accesses = st.tuples(
    st.integers(0, 2),
    st.sampled_from([0x10, 0x48, 0x6E0, 0xC0000100, 0xFFFFFFFF]),
    st.booleans(),
    st.sampled_from(["read", "fast write", "write", "write alone", "read_imm", "fast write_imm", "write_imm"]),
    st.sampled_from([OK, OK, FILTERED, UNKNOWN, INVALID, REFLECTED]),
)


def perform(  # noqa: PLR0917 (as `accesses` has them)
    kvm: Kvm, vcpu: Vcpu, msr: int, nested: bool, how: str, result: str
) -> Exit:
    """What KVM runs for an access; the exit that it is."""
    access = "read" if "read" in how else "write"
    imm = "_imm" if "imm" in how else ""
    if result == REFLECTED:
        reason = {"read": 31, "write": 32, "read_imm": 84, "write_imm": 85}[access + imm]
        kvm.run("nested_vmx_vmexit", vcpu, reason, 0, msr if imm else 0x55, msr=0x66 if imm else msr, nested=True)
        return Exit(msr, access, SLOW, REFLECTED, L2)
    arguments = (msr, 3) if imm else ()
    rcx = 0x77 if imm else msr
    fast = how.startswith("fast")
    if access == "write" and "alone" not in how and not nested:
        path = "handle_fastpath_wrmsr_imm" if imm else "handle_fastpath_set_msr_irqoff"
        kvm.run(path, vcpu, *arguments, msr=rcx)
        if fast:
            return Exit(msr, access, FAST, OK, L1)
    kvm.run(f"kvm_emulate_{'rd' if access == 'read' else 'wr'}msr{imm}", vcpu, *arguments, msr=rcx, nested=nested)
    if result != OK:
        completion = COMPLETE[f"complete_read{imm}" if access == "read" else "complete_write"]
        kvm.refuse(vcpu, msr, access, REFUSED[result], completion)
    return Exit(msr, access, SLOW, result, L2 if nested else L1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(accesses, max_size=12))
def test_each_exit_is_counted_once_and_as_what_it_became(kvm: Kvm, some: list[tuple[int, int, bool, str, str]]) -> None:
    vcpus = [kvm.vcpu() for _ in range(3)]
    made = Counter(perform(kvm, vcpus[at], msr, nested, how, result) for at, msr, nested, how, result in some)
    assert kvm.counted() == made
    assert kvm.counted() == Counter()
    for vcpu in vcpus:
        kvm.run("vmx_vcpu_free", vcpu)
    assert kvm.counted() == Counter()
    found = kvm.read()
    assert (found.open_exits, found.counts["unpaired_refusal"], found.counts["dropped_exits"]) == (0, 0, 0)
    assert [m.entries for m in found.maps if m.name == "exits_vcpus"] == [0]


def test_what_the_instruction_emulator_is_refused_is_no_exit(kvm: Kvm) -> None:
    vcpu = kvm.vcpu()
    kvm.run("kvm_emulate_rdmsr", vcpu, msr=0x48)
    kvm.refuse(vcpu, 0x48, "read", REFUSED[FILTERED], EMULATED)
    assert kvm.counted() == Counter({Exit(0x48, "read", SLOW, OK, L1): 1})
    assert kvm.read().counts["unpaired_refusal"] == 0


def test_other_exits_of_a_nested_guest_are_none_of_an_msr(kvm: Kvm) -> None:
    for reason in (0, 10, 30, 33, 0x8000001F, 83, 86):
        kvm.run("nested_vmx_vmexit", kvm.vcpu(), reason, 0, 0x48, msr=0x48)
    assert kvm.counted() == Counter()


def test_a_refusal_without_its_exit_is_counted_as_a_loss(another: Start) -> None:
    kvm = another()
    vcpu = kvm.vcpu()
    kvm.refuse(vcpu, 0x48, "read", 3, COMPLETE["complete_read"])  # nothing was seen of the vCPU
    kvm.run("kvm_emulate_rdmsr", vcpu, msr=0x48)
    kvm.refuse(vcpu, 0x49, "read", 3, COMPLETE["complete_read"])  # another MSR, and another direction
    kvm.refuse(vcpu, 0x48, "write", 3, COMPLETE["complete_write"])
    kvm.refuse(vcpu, 0x48, "read", 3, COMPLETE["complete_read"])
    kvm.refuse(vcpu, 0x48, "read", 3, COMPLETE["complete_read"])  # it is refused already
    found = kvm.read()
    assert found.exits == {Exit(0x48, "read", SLOW, FILTERED, L1): 1}
    assert found.counts["unpaired_refusal"] == 4


def test_where_completions_do_not_differ_the_msr_and_the_direction_must_match(start: Start) -> None:
    kvm = start(Options(), {})
    try:
        vcpu = kvm.vcpu()
        kvm.run("kvm_emulate_wrmsr", vcpu, msr=0x48)
        kvm.refuse(vcpu, 0x48, "write", 2, EMULATED)
        assert kvm.read().exits == {Exit(0x48, "write", SLOW, UNKNOWN, L1): 1}
    finally:
        kvm.counter.detach()


def test_an_exit_that_is_in_progress_is_not_counted(another: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread runs, and nothing says that its vCPU has been in the guest since."""
    kvm = another()
    vcpu, read = kvm.vcpu(), kvm.counter.reader.read
    monkeypatch.setattr(exits, "is_at_rest", lambda _: False)
    kvm.run("kvm_emulate_rdmsr", vcpu, msr=0x10)
    assert (read().exits, read(0.01).open_exits) == ({}, 1)
    vcpu.exits += 1  # it has left the guest again
    assert read().exits == {Exit(0x10, "read", SLOW, OK, L1): 1}
    kvm.run("kvm_emulate_rdmsr", vcpu, msr=0x10)
    assert (read().exits, read().open_exits) == ({Exit(0x10, "read", SLOW, OK, L1): 1}, 1)


def test_no_count_decreases_while_exits_go_on(another: Start) -> None:
    kvm = another()
    vcpus, stop, made = [kvm.vcpu() for _ in range(2)], threading.Event(), [0, 0]

    def go_on(at: int) -> None:
        while not stop.is_set():
            perform(kvm, vcpus[at], 0x48, False, "read", OK)
            made[at] += 1

    threads = [threading.Thread(target=go_on, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    last = 0
    kind = Exit(0x48, "read", SLOW, OK, L1)
    for _ in range(300):
        found = kvm.counter.reader.read().exits
        assert found.keys() <= {kind}
        assert last <= found.get(kind, 0) <= sum(made) + 2
        last = found.get(kind, 0)
    stop.set()
    for thread in threads:
        thread.join()
    assert kvm.read().exits == {kind: sum(made)}


def test_processes_are_told_apart_and_merged_when_they_have_ended(another: Start) -> None:
    kvm = another(by_vm=True)
    vcpus, ours = [kvm.vcpu(), kvm.vcpu()], os.getpid()
    kind = Exit(0x48, "read", SLOW, OK, L1, ours)
    perform(kvm, vcpus[0], 0x48, False, "read", OK)
    perform(kvm, vcpus[1], 0x48, False, "read", OK)
    slots = kvm.counter.reader._vcpus
    [other] = [at for at in slots.used("vcpu") if slots.get(at, "vcpu") == ctypes.addressof(vcpus[1])]
    slots.set(other, "vmm", ours + 1)  # as if it were another's
    separate = {kind: 1, replace(kind, pid=ours + 1): 1}
    assert kvm.read().exits == separate
    kvm.counter.forget({ours, ours + 1})
    assert kvm.read().exits == separate  # their vCPUs are still there
    kvm.run("vmx_vcpu_free", vcpus[0])
    kvm.counter.forget({ours})
    assert kvm.read().exits == {replace(kind, pid=0): 1, replace(kind, pid=ours + 1): 1}
    kvm.run("vmx_vcpu_free", vcpus[1])
    kvm.counter.forget({ours + 1})
    assert kvm.read().exits == {replace(kind, pid=0): 2}
    perform(kvm, vcpus[0], 0x48, False, "read", OK)
    assert kvm.read().exits == {replace(kind, pid=0): 2, kind: 1}


def test_others_than_the_wanted_process_are_not_counted(another: Start) -> None:
    kvm = another(pid=1)
    vcpu = kvm.vcpu()
    perform(kvm, vcpu, 0x48, False, "read", FILTERED)
    found = kvm.read()
    assert (found.exits, found.counts["unpaired_refusal"], found.counts["vcpus_seen"]) == ({}, 0, 0)


@pytest.mark.parametrize(("by_vm", "all_places"), [(False, 2048), (True, 32768)])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some=st.lists(accesses, min_size=1, max_size=12))
def test_what_has_no_place_is_counted_without_its_msr(
    another: Start, by_vm: bool, all_places: int, some: list[tuple[int, int, bool, str, str]]
) -> None:
    """A guest may access as many MSRs as it likes: nothing is lost by that, and it alone is told less well apart."""
    kvm = another(by_vm=by_vm)
    places = kvm.counter.reader._exits
    assert places.entries == all_places + 64
    for place in range(all_places):
        places.set(place, "key", 1)
    vcpus = [kvm.vcpu() for _ in range(3)]
    made = Counter(
        replace(perform(kvm, vcpus[at], msr, nested, how, result), msr=OTHER) for at, msr, nested, how, result in some
    )
    for vcpu in vcpus:
        kvm.run("vmx_vcpu_free", vcpu)
    found = kvm.read()
    assert {kind: count for kind, count in found.exits.items() if kind.msr == OTHER} == made
    assert [m.dropped for m in found.maps] == [0, 0]
    kvm.counter.detach()


def test_after_a_reload_counts_begin_at_0(another: Start) -> None:
    kvm = another()
    vcpu = kvm.vcpu()
    perform(kvm, vcpu, 0x48, False, "read", OK)
    perform(kvm, vcpu, 0x48, False, "read", OK)
    assert kvm.read().exits == {Exit(0x48, "read", SLOW, OK, L1): 2}
    kvm.counter.detach()
    perform(kvm, vcpu, 0x48, False, "read", OK)
    kvm.counter.attach(kvm.symbols)
    assert kvm.read().exits == {}
    perform(kvm, vcpu, 0x48, False, "read", OK)
    assert kvm.read().exits == {Exit(0x48, "read", SLOW, OK, L1): 1}
