# SPDX-License-Identifier: GPL-2.0-or-later
"""The BPF program: compiled against the headers of each emulated host, through this machine's verifier, and run.

This machine need not have kprobes, let alone kvm_intel: what runs under the program is a stand-in for KVM in this
process, probed with uprobes, so the program gets to see every change of a bitmap that one can think of.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hosts import HOSTS
from hypothesis import given, settings
from hypothesis import strategies as st
from known import KnownBtf, kernel_of, one_tree, symbols
from needs import ROOT_ALONE, tool
from uprobe import attach_uprobe

from tracer.kernel.btf import Btf, BtfError
from tracer.kernel.livepatch import Livepatch
from tracer.kernel.symbols import Symbol, Symbols
from tracer.model.errors import MsrtraceError
from tracer.model.options import BACKENDS, Options
from tracer.model.snapshot import DURATION_BOUNDS, Call, Durations, Map, Outcome, Snapshot
from tracer.model.vendor import Layout
from tracer.model.vmx import VMX
from tracer.program import syscalls
from tracer.program.compiler import build, compiled
from tracer.program.loading import Loaded, load
from tracer.program.program import Target, Variant
from tracer.program.resources import resource
from tracer.program.source import whole_text
from tracer.program.syscalls import MMAPABLE
from tracer.trace.engine import Engine
from tracer.trace.plan import preemptible, values, variants
from tracer.trace.reader import WITHIN_FILTER_CHANGE, WITHIN_RECALC, Reader

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


class CastingBtf(KnownBtf):
    """Of a kernel that has bpf_rdonly_cast(), with numbers that are not this machine's."""

    def kernel_ids(self, function: str, structure: str) -> tuple[int, int]:
        return 1, 2


def configurations() -> dict[str, Variant]:
    """Every way in which the engine may load the program, by its name."""
    found: dict[str, Variant] = {}
    for layout in VMX.layouts:
        for btf in (None, CastingBtf()) if layout.calls else (None,):
            for filter_known in (True, False) if layout.filter_set else (False,):
                for by_vm in (False, True):
                    for pid in (None, 4711):
                        options = Options(by_vm, pid)
                        there = symbols(layout, "" if filter_known else str(layout.filter_set))
                        given = values(layout, btf, there, options)
                        for backend in BACKENDS:
                            if backend == "kprobe" or (btf and layout.calls):
                                wanted = replace(options, backend=backend)
                                for variant in variants(layout, there, given, wanted, btf):
                                    words = [layout.name, backend, *(["cast"] if variant.kfuncs else [])]
                                    words += [f"{name}={value}" for name, value in given.items()]
                                    found["-".join(words)] = variant
    return found


CONFIGURATIONS = configurations()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "host" in metafunc.fixturenames:
        names = [name for name in str(metafunc.config.getoption("--hosts")).split(",") if name in HOSTS]
        metafunc.parametrize("host", names)


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


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Makes BCC use the headers of a kernel; it makes no difference which."""
    with headers_of("bookworm", tmp_path_factory.mktemp("headers")):
        yield


KPROBE = {name: variant for name, variant in CONFIGURATIONS.items() if variant.backend == "kprobe"}
#: Loaded for functions of the kernel that this machine may not have; the emulated hosts do that.
ELSEWHERE = {name for name, variant in CONFIGURATIONS.items() if variant.backend == "fentry" or variant.kfuncs}


def test_two_programs_are_compiled() -> None:
    """All else that differs is put in at loading."""
    found = {variant.backend: {*variant.definitions} for variant in CONFIGURATIONS.values()}
    assert found == {"kprobe": set(), "fentry": {"FENTRY"}}
    assert set(re.findall(r"^#if(?:n?def)? (.+)", whole_text(SOURCE), re.MULTILINE)) == {"FENTRY"}


@pytest.mark.parametrize("configuration", [name for name in KPROBE if name not in ELSEWHERE])
@pytest.mark.usefixtures("headers")
def test_the_verifier_takes_it(configuration: str) -> None:
    made = build(SOURCE, [KPROBE[configuration]]).loaded
    try:
        assert set(made.functions) == set(KPROBE[configuration].functions)
    finally:
        made.close()


@pytest.mark.parametrize("definitions", [{}, {"FENTRY": 1}], ids=BACKENDS)
def test_the_headers_make_no_difference(host: str, definitions: dict[str, int], headers: None, tmp_path: Path) -> None:
    """So a program may be kept whatever the kernel's are."""
    made = compiled(SOURCE, definitions)
    with headers_of(host, tmp_path):
        assert compiled(SOURCE, definitions) == made


@pytest.mark.parametrize(("backend", "definitions"), [("kprobe", {}), ("fentry", {"FENTRY": 1})])
@pytest.mark.usefixtures("headers")
def test_values_and_functions_are_those_of_the_program(backend: str, definitions: dict[str, int]) -> None:
    """Each is used in some configuration, and none is asked for that is not there."""
    program = compiled(SOURCE, definitions)
    used = [variant for variant in CONFIGURATIONS.values() if variant.backend == backend]
    assert {name for variant in used for name in variant.functions} == set(program.functions)
    unused = {"kretprobe_trampoline", "fgraph_trampoline"}  # which these symbols are without
    unused |= {"enable_at", "disable_at", "set_at"} if backend == "kprobe" else set()
    assert {name for variant in used for name in variant.values} == set(program.values) - unused
    calls = {one.number for code in program.functions.values() for one in code.relocations if one.what == "kfunc"}
    assert {number for variant in used for number in variant.kfuncs} == calls
    capacities = {name for variant in used for name in variant.capacities}
    assert capacities == {"counters", "updates", "taken"} <= {one.name for one in program.maps}


@pytest.mark.usefixtures("headers")
def test_there_is_room_to_say_that_every_place_is_taken() -> None:
    for variant in KPROBE.values():
        size = {one.name: one.max_entries for one in compiled(SOURCE, {}).maps} | {**variant.capacities}
        assert size["taken"] == sum(size[name] for name in TABLES)


def test_what_is_loaded() -> None:
    whole, least = (
        KPROBE[name]
        for name in (
            "recalc-kprobe-cast-bitmap_offset=6840-exits_offset=5008-cast_type=2-filter_offset=0"
            "-wanted_pid=4711-by_pid=1-leader_offset=1416-command_offset=1896",
            "toggle-kprobe-update_kind=1",
        )
    )
    assert set(whole.functions) == {
        "update_entered",
        "update_returned",
        "filter_set_entered",
        "filter_set_returned",
        "vcpu_created",
        "vcpu_freed",
        "x2apic_entered",
        "set_entered",
        "settle_call",
        "counter_ended",
        "update_ended",
    }
    assert set(least.functions) == {
        "update_entered",
        "update_returned",
        "vcpu_created",
        "vcpu_freed",
        "enable_entered",
        "disable_entered",
    }


# --- what cannot be reached ---

CALL, ATOMIC, CMPXCHG = 0x85, 0xDB, 0xF1


def translated(program: int) -> list[tuple[int, int, int, int]]:
    """The instructions that a loaded PROGRAM has after verification: code, registers, offset, immediate."""
    sizes, code = struct.Struct("20xI"), bytearray()  # of struct bpf_prog_info: xlated_prog_len
    for _ in range(2):
        info = bytearray(256)
        struct.pack_into("<I8xQ", info, 20, len(code), syscalls._address(code) if code else 0)
        attributes = struct.pack("IIQ", program, len(info), syscalls._address(info))
        syscalls._bpf(syscalls._OBJ_GET_INFO_BY_FD, attributes)
        code = code or bytearray(sizes.unpack_from(info)[0])
    return list(struct.iter_unpack("<BBhi", code))


def test_what_no_value_leads_to_is_gone_once_it_is_loaded(headers: None) -> None:
    """Each condition that is not met leaves its constant alone."""
    program = compiled(SOURCE, {})
    everything = {name: Target("kprobe") for name in ("update_entered", "vcpu_freed", "enable_entered")}

    def left(**given: int) -> dict[str, list[tuple[int, int, int, int]]]:
        made = load(program, Variant("kprobe", {}, everything, given, cmpxchg="bitmap_offset" in given))
        try:
            return {name: translated(fd) for name, fd in made.functions.items()}
        finally:
            made.close()

    def calls(code: list[tuple[int, int, int, int]]) -> int:
        return sum(operation == CALL for operation, *_ in code)

    def exchanges(code: list[tuple[int, int, int, int]]) -> int:
        return sum((operation, number) == (ATOMIC, CMPXCHG) for operation, *_, number in code)

    exact = {"bitmap_offset": 6840, "update_kind": 1}
    blind, seen = left(update_kind=1), left(**exact)
    assert {name: exchanges(code) for name, code in blind.items()} == dict.fromkeys(everything, 0)
    assert {name: exchanges(code) for name, code in seen.items()} == dict.fromkeys(everything, 1)
    # Nothing is read of the kernel; the place is given back.
    assert (calls(blind["vcpu_freed"]), calls(seen["vcpu_freed"])) == (1, 3)
    for more in ({"wanted_pid": 1}, {"by_pid": 1}, {"leader_offset": 8}):
        with_it = left(**exact, **more)
        assert len(with_it["enable_entered"]) > len(seen["enable_entered"]), more
    # What tells updates apart: in that function, and not in that of calls.
    told = left(bitmap_offset=6840)
    assert len(told["update_entered"]) > len(seen["update_entered"])
    assert len(told["enable_entered"]) == len(seen["enable_entered"])


@pytest.mark.usefixtures("headers")
def test_the_verifier_refuses(tmp_path: Path) -> None:
    """An unbounded read, by the same way; with a bound it passes."""
    source = (
        "#include <uapi/linux/ptrace.h>\n"
        "BPF_ARRAY(numbers, u64, 1);\n"
        "int reads(struct pt_regs *ctx)\n"
        "{\n"
        "\tint zero = 0;\n"
        "\tu64 index = PT_REGS_PARM2(ctx), *value = numbers.lookup(&zero);\n\n"
        "\treturn value && CONDITION ? value[index] : 0;\n"
        "}\n"
    )
    loaded(source.replace("CONDITION", "index < 1"), tmp_path, "reads").close()
    reason = "the kernel refuses the BPF program reads: .*math between map_value pointer and register with unbounded"
    with pytest.raises(MsrtraceError, match=reason):
        loaded(source, tmp_path, "reads", CONDITION=1)


@pytest.mark.usefixtures("headers")
def test_what_the_compiler_says_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(MsrtraceError) as failure:
        loaded(TRIVIAL.replace("return 0", "return NOTHING"), tmp_path, "trivial")
    message = str(failure.value)
    assert "error: use of undeclared identifier 'NOTHING'" in message
    assert "\n" not in message


# --- numbers that the program and the engine both know ---


def enumeration(name: str) -> list[str]:
    found = re.search(rf"^enum {name} {{(.*?)}};", whole_text(SOURCE), re.MULTILINE | re.DOTALL)
    assert found
    return re.findall(r"\b[A-Z_]+\b", re.sub(r"/\*.*?\*/", "", found[1]))


TABLES = [name.lower() for name in enumeration("table")]


def test_what_an_update_is_for() -> None:
    assert enumeration("within") == ["NONE", "FILTER_CHANGE", "RECALC"]
    assert (WITHIN_FILTER_CHANGE, WITHIN_RECALC) == (1, 2)


@pytest.mark.usefixtures("headers")
def test_members_are_all_that_there_is() -> None:
    for one in compiled(SOURCE, {}).maps:
        if one.flags & MMAPABLE:
            ranges = (range(member.offset, member.offset + member.bytes) for member in one.members.values())
            assert {place for places in ranges for place in places} == {*range(one.value_size)}, one.name


def test_buckets() -> None:
    [buckets] = map(int, re.findall(r"^#define BUCKETS (\d+)\b", whole_text(SOURCE), re.MULTILINE))
    assert buckets >= len(DURATION_BOUNDS) + 2  # the first is not used, the last has the rest
    assert buckets.bit_count() == 1  # it is the mask that bounds an index, too


# --- the engine and its maps, filled by hand ---

TOGGLE = next(layout for layout in VMX.layouts if layout.name == "toggle")
RECALC = next(layout for layout in VMX.layouts if layout.name == "recalc")


HOOK, ENABLE, DISABLE = TOGGLE.update, "vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr"
CREATE, FREE = "vmx_vcpu_create", "vmx_vcpu_free"


class Probing:
    """Attaching and detaching are the kernel's; here a probe is an open file, and some are REFUSED."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refused: set[str] = set()
        self.held = Counter[str]()
        self._of: dict[int, str] = {}
        monkeypatch.setattr(Engine, "_link", lambda _, symbol, program, at_return: self.link(symbol.name))
        monkeypatch.setattr(Btf, "of_module", lambda *_: KnownBtf())
        close = os.close

        def closing(fd: int) -> None:
            if fd in self._of:
                self.held[self._of.pop(fd)] -= 1
            close(fd)

        monkeypatch.setattr("tracer.trace.engine.os.close", closing)

    def link(self, symbol: str) -> int:
        if symbol in self.refused:
            raise OSError(errno.ENOENT, "refused")
        fd = os.open("/dev/null", os.O_RDONLY)
        self._of[fd] = symbol
        self.held[symbol] += 1
        return fd


@pytest.fixture
def no_probes(monkeypatch: pytest.MonkeyPatch) -> Probing:
    return Probing(monkeypatch)


OUTCOMES = ("changed_read", "changed_write", "refused", "redundant", "changed", "unknown")


def write(engine: Engine, array: str, index: int, **members: int | Sequence[int]) -> None:
    """Fill a place of ARRAY, and say that it is taken; `outcome` and `call` are left out of the names of members."""
    there = engine._reader._arrays[array]
    for name, value in members.items():
        size, at = there._place(index, next(whole for whole in there.members if whole.rpartition(".")[2] == name))
        for n, one in enumerate([value] if isinstance(value, int) else value):
            there._views[size][at + n] = one
    if array in TABLES:
        engine._built.loaded.maps["taken"].update(struct.pack("II", index, TABLES.index(array)), b"\1")
        engine._reader._in_use = {}


def what(msr: int, type_: int, enables: int, within: int) -> dict[str, int]:
    """The members of struct call."""
    return {"msr": msr, "type": type_, "enables": enables, "within": within, "state": 1}


def put(engine: Engine, **counts: int) -> None:
    for name, value in counts.items():
        engine._reader._arrays["counts"].set(0, name, value)


IN_HOOK, IN_CREATE, OUTSIDE = 0x1010, 0x13FF, 0x0FFF
NO_UPDATE, FILTER_CHANGE, RECOMPUTED = 0, 1, 2
READ, WRITE, BOTH = 1, 2, 3


@pytest.mark.usefixtures("headers", "no_probes")
def test_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(TOGGLE, symbols(TOGGLE), Options(by_vm=True, backend="kprobe"))
    try:
        assert engine.warnings == []
        for index, (caller, pid, made, counted) in enumerate(
            (
                (IN_CREATE, 100, what(0x10, READ, 0, NO_UPDATE), {"changed": 6, "changed_read": 6, "redundant": 1}),
                (IN_CREATE - 16, 100, what(0x10, READ, 0, NO_UPDATE), {"redundant": 2}),
                (
                    IN_HOOK,
                    100,
                    what(0xC0000100, BOTH, 0, FILTER_CHANGE),
                    {"changed": 3, "redundant": 2, "changed_write": 3, "refused": 4},
                ),
                (IN_HOOK, 200, what(0x48, WRITE, 1, FILTER_CHANGE), {"redundant": 2, "unknown": 1}),
                (OUTSIDE, 200, what(0x48, WRITE, 1, NO_UPDATE), {"redundant": 1}),
                (OUTSIDE, 200, what(0x49, WRITE, 1, NO_UPDATE), {}),  # a place alone
                (IN_HOOK, 0, what(0x48, READ, 0, FILTER_CHANGE), {"redundant": 4}),  # of those that ended
            )
        ):
            site = caller if caller != IN_HOOK else 0
            write(engine, "counters", 5 + index, caller=caller, site=site, pid=pid, **made, **counted)
        buckets = [0, 2, 1, *[0] * 22, 1, *[0] * 5, 1]
        write(engine, "updates", 7, count=5, nanoseconds=2_500_000_000, buckets=buckets, pid=100, kind=FILTER_CHANGE)
        write(engine, "updates", 9, count=1, nanoseconds=500_000_000, pid=200, kind=RECOMPUTED)
        write(engine, "updates", 10, pid=300, kind=NO_UPDATE)  # free again
        write(engine, "vcpus", 3, vcpu=0xFFFF)
        write(engine, "vmms", 17, pid=200, command=b"qemu-system-x86\0")
        losses = {"dropped_calls": 1, "dropped_vcpus": 2, "dropped_updates": 3}
        losses |= {"unpaired_update": 6, "unpaired_return": 7, "read_failed": 8}
        put(engine, **losses, vcpus_seen=9, vmms_seen=4)
        taken = engine.snapshot()
        assert taken.calls == {
            Call(0x10, "read", "disable", "vcpu_create", CREATE, 100): Outcome(9, 3, 6, 0, 0),
            Call(0xC0000100, "read_write", "disable", "filter_change", HOOK, 100): Outcome(5, 2, 0, 3, 4),
            Call(0x48, "write", "enable", "filter_change", HOOK, 200): Outcome(3, 2, 0, 0, 0),
            Call(0x48, "write", "enable", "other", "0xfff", 200): Outcome(1, 1, 0, 0, 0),
            Call(0x48, "read", "disable", "filter_change", HOOK, 0): Outcome(4, 4, 0, 0, 0),
        }
        assert taken.updates == {100: Durations(5, 2.5, (2, 1, *[0] * 22, 2))}
        assert taken.recalcs == {200: Durations(1, 0.5, (0,) * 25)}
        assert [(probe.function, probe.missed) for probe in taken.probes] == [
            (HOOK, 6),
            (CREATE, 0),
            (FREE, 0),
            (VMX.direct_write, 0),
            (ENABLE, 0),
            (DISABLE, 0),
        ]
        assert taken.maps == (Map("calls", 7, 32768, 1), Map("vcpus", 1, 16384, 2), Map("updates", 2, 4096, 3))
        assert taken.commands == {200: "qemu-system-x86"}
        assert (taken.unpaired_returns, taken.read_failures) == (7, 8)
        assert (taken.vcpus_seen, taken.vmms_seen, taken.open_calls) == (9, 4, 0)
        assert (taken.layout, taken.redundancy, taken.by_vm, taken.lower_bound) == ("toggle", "exact", True, True)
        assert taken.backend == "kprobe"

        engine.forget({100})
        left = engine.snapshot()
        assert left.calls == taken.without_vms({100}).calls
        assert (left.updates, list(left.recalcs), left.vcpus_seen) == ({0: taken.updates[100]}, [200], 9)
        assert left.commands == {200: "qemu-system-x86"}
        # The one with an open call stays as it is until that is counted.
        write(engine, "vcpus", 3, seq=1, pid=200)
        monkeypatch.setattr(Reader, "_is_open", lambda *_: True)
        engine.forget({200})
        assert engine.snapshot().calls == left.calls
        write(engine, "vcpus", 3, seq=2)
        engine.forget({200})
        gone = engine.snapshot()
        assert gone.calls == taken.without_vms({100, 200}).calls
        assert ({0}, {}) == (gone.recalcs.keys() | gone.updates.keys() | {c.pid for c in gone.calls}, gone.commands)
        assert (
            gone.maps[0].entries == 7
        )  # six kinds of ended processes, and one that was put where it is not looked for

        functions = engine._functions
        engine.detach()
        assert engine.reattach(TOGGLE, symbols(TOGGLE, VMX.direct_write))
        fresh_snapshot = engine.snapshot()
        assert (fresh_snapshot.calls, fresh_snapshot.updates, fresh_snapshot.recalcs) == ({}, {}, {})
        assert (fresh_snapshot.vcpus_seen, fresh_snapshot.lower_bound) == (0, False)
        assert fresh_snapshot.maps == (Map("calls", 0, 32768), Map("vcpus", 0, 16384), Map("updates", 0, 4096))
        assert engine._built.loaded.maps["taken"].keys() == []
        assert not engine.reattach(RECALC, symbols(RECALC))
        assert engine._functions is functions
    finally:
        engine.close()


@pytest.mark.usefixtures("headers", "no_probes")
def test_engine_without_btf(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Btf:
        raise BtfError("/sys/kernel/btf/kvm_intel: No such file or directory")

    monkeypatch.setattr(Btf, "of_module", missing)
    assert RECALC.filter_set
    engine = Engine(RECALC, symbols(RECALC, RECALC.filter_set), Options())
    try:
        assert engine.warnings == [
            f"{RECALC.filter_set} is not probed: no such function in this kernel",
            "filter updates cannot be told from other recalculations, so they are not counted",
            "which calls are redundant is unknown: /sys/kernel/btf/kvm_intel: No such file or directory",
        ]
        write(engine, "counters", 3, caller=0x1010, **what(0x10, READ, 0, RECOMPUTED), unknown=7)
        taken = engine.snapshot()
        assert taken.calls == {Call(0x10, "read", "disable", "recalc", RECALC.update): Outcome(7)}
        assert (taken.redundancy, taken.calls_observable, taken.updates_observable) == ("unknown", True, False)
    finally:
        engine.close()


@pytest.mark.usefixtures("headers", "no_probes")
def test_engine_beside_a_livepatch() -> None:
    """Its copies are not probed, and what they call is of the function that they replace, or of none."""
    replaced = frozenset({("kvm_intel", HOOK), ("kvm_intel", DISABLE), ("kvm_intel", CREATE)})
    copies = [Symbol(0x9000 + 0x100 * n, name, "kpatch_x") for n, name in enumerate((HOOK, DISABLE, CREATE, "helper"))]
    there = Symbols.of(symbols(TOGGLE).functions, others=copies, bounds=[0x9400])
    engine = Engine(TOGGLE, replace(there, livepatches=(Livepatch("kpatch_x", True, replaced),)), Options(by_vm=True))
    try:
        assert engine.backend == "kprobe"
        assert [probe.detail for probe in engine.probes if probe.function == HOOK] == [
            f"{HOOK} [kvm_intel], not on {HOOK} [kpatch_x]"
        ]
        assert engine.warnings == [
            f"calls that kpatch_x may make to its own {DISABLE} are not counted (it has {HOOK}, {CREATE}, too)"
        ]
        for index, caller in enumerate((0x9210, 0x9310, 0x9410)):
            made = what(0x10, READ, 0, NO_UPDATE)
            write(engine, "counters", index, caller=caller, site=caller, pid=7, **made, redundant=1)
        taken = engine.snapshot()
        assert (list(taken.uncounted), taken.lower_bound) == (engine.warnings, True)
        assert {(call.cause, call.caller) for call in taken.calls} == {
            ("vcpu_create", f"{CREATE} [kpatch_x]"),
            ("other", "helper [kpatch_x]"),
            ("other", "0x9410"),
        }
    finally:
        engine.close()
    with pytest.raises(MsrtraceError, match=r"have functions that are probed: .*kpatch_x.*; --backend kprobe can"):
        Engine(TOGGLE, there, Options(backend="fentry"))


@pytest.mark.usefixtures("headers", "no_probes")
def test_runs_that_were_skipped_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """bpf_prog->stats.misses goes on counting while the program stays loaded."""
    misses = {"update_entered": 2, "update_returned": 1, "x2apic_entered": 4, "disable_entered": 8}
    monkeypatch.setattr(Engine, "_misses", lambda _, program: misses.get(program, 0))
    there = Symbols.of(
        Symbol(0x100 * n, name, "kvm_intel")
        for n, name in enumerate((HOOK, CREATE, FREE, ENABLE, DISABLE, *VMX.direct_write_callers))
    )
    engine = Engine(TOGGLE, there, Options())
    one, other = VMX.direct_write_callers
    try:
        missed = {probe.function: probe.missed for probe in engine.snapshot().probes}
        assert missed == {HOOK: 3, CREATE: 0, FREE: 0, one: 4, other: 0, ENABLE: 0, DISABLE: 8}
        engine.detach()
        assert engine.reattach(TOGGLE, there)
        misses["disable_entered"] = 13
        again = {probe.function: probe.missed for probe in engine.snapshot().probes}
        assert again == {HOOK: 0, CREATE: 0, FREE: 0, one: 0, other: 0, ENABLE: 0, DISABLE: 5}
    finally:
        engine.close()


@pytest.mark.usefixtures("headers")
def test_updates_are_not_claimed_to_be_seen_without_the_probe_that_tells_them_apart(no_probes: Probing) -> None:
    assert RECALC.filter_set
    no_probes.refused = {RECALC.filter_set}
    engine = Engine(RECALC, symbols(RECALC), Options(backend="kprobe"))
    try:
        assert not engine.snapshot().updates_observable
    finally:
        engine.close()


@pytest.mark.usefixtures("headers")
def test_a_reattachment_that_fails_leaves_no_probe(no_probes: Probing) -> None:
    engine = Engine(TOGGLE, symbols(TOGGLE), Options(backend="kprobe"))
    try:
        held = {HOOK: 2, CREATE: 1, FREE: 1, VMX.direct_write: 1, ENABLE: 1, DISABLE: 1}
        assert +no_probes.held == held
        engine.detach()
        assert not +no_probes.held
        no_probes.refused = {HOOK, ENABLE, DISABLE}
        with pytest.raises(MsrtraceError, match="no probe could be attached"):
            engine.reattach(TOGGLE, symbols(TOGGLE))
        assert not +no_probes.held  # or it would be there twice after the next attempt
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("version", "model", "may"),
    [
        ("#1 SMP Debian 4.19", None, False),
        ("#1 SMP PREEMPT_DYNAMIC Debian 6.12.117-1", "none (voluntary) full lazy \n", False),
        ("#1 SMP PREEMPT_DYNAMIC Debian 6.1.1", "(none) voluntary full \n", False),
        ("#1 SMP PREEMPT_DYNAMIC Debian 7.2.13-1", "full (lazy) \n", True),
        ("#1 SMP PREEMPT_DYNAMIC Debian 6.12.117-1", None, True),
        ("#1 SMP PREEMPT_RT Debian 6.12", None, True),
    ],
)
def test_where_programs_at_fentry_may_be_preempted(version: str, model: str | None, may: bool, tmp_path: Path) -> None:
    if model:
        (tmp_path / "preempt").write_text(model)
    assert preemptible(tmp_path / "preempt", version) == may


@pytest.mark.usefixtures("headers", "no_probes")
def test_where_fentry_is_refused_kprobes_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has no kvm_intel, so the kernel has no BTF of it."""
    monkeypatch.setattr("tracer.trace.plan.preemptible", lambda: False)
    engine = Engine(TOGGLE, symbols(TOGGLE), Options(backend="auto"))
    try:
        assert engine.snapshot().backend == "kprobe"
        assert engine._built.passed_over == ("the kernel gives no BTF of kvm_intel: No such file or directory",)
    finally:
        engine.close()
    with pytest.raises(MsrtraceError, match="the kernel gives no BTF of kvm_intel"):
        Engine(TOGGLE, symbols(TOGGLE), Options(backend="fentry"))
    callers = symbols(TOGGLE, VMX.direct_write).functions
    inlined = Symbols.of([*callers, *(Symbol(0x9000, name, "kvm_intel") for name in VMX.direct_write_callers)])
    with pytest.raises(MsrtraceError, match="there is no vmx_update_msr_bitmap_x2apic to probe; --backend kprobe can"):
        Engine(TOGGLE, inlined, Options(backend="fentry"))


# --- the program at work, on a stand-in for KVM ---

STAND_IN = """
#include <stdbool.h>
#include <string.h>
struct vcpu { void *kvm; unsigned char *bitmap; unsigned long exits; };
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
KEPT void vmx_vcpu_free(struct vcpu *vcpu) { asm volatile(""); }
KEPT void vmx_update_msr_bitmap_x2apic(struct vcpu *vcpu) { asm volatile(""); change(vcpu); }
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
    _fields_ = (("kvm", ctypes.c_void_p), ("bitmap", ctypes.c_void_p), ("exits", ctypes.c_uint64))
    FILTER_OFFSET, BITMAP_OFFSET, EXITS_OFFSET = 0, 8, 16


class StandIn:
    """The library, an Engine on it, and what the two have counted since they were last asked."""

    def __init__(self, library: Path, layout: Layout) -> None:
        self.path, self.layout, self.library = library, layout, ctypes.CDLL(str(library))
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(library))]
        self.base = min(int(line.partition("-")[0], 16) for line in mapped)
        self.page, self.next = ctypes.create_string_buffer(PAGE), ctypes.create_string_buffer(PAGE)
        self.vcpus: list[Vcpu] = []
        self.callers: dict[tuple[int, int, bool], str] = {}
        self.inside(lambda: None)
        names: list[str] = [*layout.calls, layout.update, CREATE, FREE, VMX.direct_write, *CALLERS]
        names += [layout.filter_set] if layout.filter_set else []
        self.symbols = Symbols.of(Symbol(self.address(name), name, "kvm_intel") for name in names)

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

    def free(self, vcpu: Vcpu) -> None:
        self.library[FREE](ctypes.byref(vcpu))

    def create(self, vcpu: Vcpu) -> None:
        self.library["vmx_vcpu_create"](ctypes.byref(vcpu))

    def set_filter(self, kvm: int = 0x1000, result: int = 0) -> None:
        ctypes.c_int.in_dll(self.library, "result").value = result
        self.library["kvm_vm_ioctl_set_msr_filter"](ctypes.c_void_p(kvm), None)

    def counted(self) -> Snapshot:
        """What the engine has counted since this was last asked."""
        now, earlier = self.taken(), self.last
        self.last = now
        return now.since(earlier)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand-in")
    (folder / "kvm.c").write_text(STAND_IN)
    subprocess.run([tool("cc"), "-O1", "-shared", "-fPIC", "-o", "kvm.so", "kvm.c"], cwd=folder, check=True)
    return folder / "kvm.so"


@contextmanager
def running(
    library: Path, layout: Layout, btf: Btf | None, options: Options, edit: tuple[str, str] = ("", "")
) -> Iterator[StandIn]:
    """The program reads the kernel's memory; here that is this process's, and nothing else differs but by EDIT."""
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

    def link(engine: Engine, symbol: Symbol, program: str, at_return: bool) -> int:
        return stand_in.link(symbol.name, engine._functions[program], at_return)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tracer.trace.engine.resource", lambda _: source)
        patch.setattr(Engine, "_link", link)
        patch.setattr(Btf, "of_module", of_module)
        stand_in.start(options)
    try:
        yield stand_in
    finally:
        stand_in.close()


class StandInBtf(KnownBtf):
    def offset(self, structure: str, member: str) -> int:
        if structure == "task_struct":
            return 0  # as if it were not known: the command is that of the thread
        places = {"vmcs01": Vcpu.BITMAP_OFFSET, "kvm": Vcpu.FILTER_OFFSET, "stat": Vcpu.EXITS_OFFSET}
        return places.get(member, 0)


@pytest.fixture(scope="module")
def toggle(headers: None, library: Path) -> Iterator[StandIn]:
    with running(library, TOGGLE, StandInBtf(), Options(backend="kprobe")) as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def recalc(headers: None, library: Path) -> Iterator[StandIn]:
    with running(library, RECALC, StandInBtf(), Options(by_vm=True, backend="kprobe")) as stand_in:
        yield stand_in


DIRECT = 2  # of `state`


@pytest.fixture(scope="module")
def narrow(request: pytest.FixtureRequest, headers: None, library: Path) -> Iterator[StandIn]:
    """With as few counters as there may be; also as where bitmaps are read without asking: other kinds of calls."""
    known = ("VALUE(cast_type) && !read_kernel(", "!read_kernel(")
    edit = known if request.param else ("", "")
    with running(library, RECALC, StandInBtf(), Options(backend="kprobe"), edit) as stand_in:
        yield stand_in


@pytest.fixture
def blind(headers: None, library: Path) -> Iterator[StandIn]:
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
        if in_update:  # an update makes each call in one place: who made the first makes all of them
            caller = stand_in.callers.setdefault((msr, type_, enable), caller)
        key = Call(msr, ACCESS[type_], action, cause, caller, pid)
        outcome = expected(before, after, msr, type_, enable)
        wanted[key] = wanted[key] + outcome if key in wanted else outcome
    counted = stand_in.counted()
    assert counted.calls == wanted
    updates = counted.updates if within == "filter_change" else counted.recalcs
    assert sum(d.count for d in updates.values()) == sum(in_update for *_, in_update, _ in made)
    assert not counted.lower_bound


@few
@given(made=st.lists(calls, max_size=8))
def test_calls_of_enable_and_disable(toggle: StandIn, made: list[tuple[str, int, int, bool, bool, bytes]]) -> None:
    check_calls(toggle, made, 0, "filter_change")


@few
@given(made=st.lists(calls, max_size=8))
def test_calls_of_set(recalc: StandIn, made: list[tuple[str, int, int, bool, bool, bytes]]) -> None:
    check_calls(recalc, made, os.getpid(), "recalc")


#: What KVM's update functions call for, 5.13 to 7.3: arch/x86/kvm/vmx/vmx.c; PT with eight address registers.
UPDATED = [0x10, 0x48, 0x49, 0x10B, 0x1C4, 0x1C5, 0x174, 0x175, 0x176, 0x660, 0x3FC, 0x3FD, 0x3FE, 0x3F8, 0x3F9, 0x3FA]
UPDATED += [0x606, 0xC0000100, 0xC0000101, 0xC0000102, 0x560, 0x561, 0x570, 0x571, 0x572, *range(0x580, 0x588)]


def places(stand_in: StandIn, kinds: list[tuple[int, int, bool]], filter_change: bool) -> dict[int, int]:
    """Where the program counts KINDS of calls, by their keys, if an update makes them in that order."""
    counters, taken = stand_in.engine._reader._arrays["counters"], stand_in.engine._built.loaded.maps["taken"]
    for index in range(counters.entries):
        counters.set(index, "key", 0)
    for key in taken.keys():  # noqa: SIM118 (a map of the kernel's)
        if struct.unpack("II", key)[1] == TABLES.index("counters"):
            taken.delete(key)
    vcpu = stand_in.vcpu(kvm=0x6000)
    stand_in.inside(lambda: None)
    stand_in.create(vcpu)
    if filter_change:
        stand_in.set_filter(0x6000)

    def update() -> None:
        for msr, type_, enable in kinds:
            stand_in.call("vmx_set_msr", vcpu, msr, type_, enable)

    stand_in.inside(update)
    stand_in.update(vcpu)
    stand_in.free(vcpu)
    return {counters.get(index, "key"): index for index in counters.used("key")}


@pytest.mark.parametrize("filter_change", [True, False])
@pytest.mark.parametrize("types", [(READ, WRITE), (BOTH,)])
@pytest.mark.parametrize("narrow", [0, DIRECT], ids=["", "direct"], indirect=True)
def test_counters_of_updates(
    request: pytest.FixtureRequest, narrow: StandIn, types: tuple[int, ...], filter_change: bool
) -> None:
    """None takes longer to find than others: two with the same first place would swap when the order is reversed."""
    kinds = [(msr, type_, enable) for msr in UPDATED for type_ in types for enable in (False, True)]
    found = places(narrow, kinds, filter_change)
    assert len(found) == len(kinds)
    counters = narrow.engine._reader._arrays["counters"]
    states = {counters.get(index, "call.state") & DIRECT for index in found.values()}
    assert states == {request.node.callspec.params["narrow"]}
    assert places(narrow, kinds[::-1], filter_change) == found


# --- calls that nothing follows ---

CLEAR, FULL = bytes(PAGE), b"\xff" * PAGE
CHANGED, REDUNDANT = Outcome(1, 0, 1, 0, 0), Outcome(1, 1, 0, 0, 0)


def outcomes(snapshot: Snapshot) -> list[Outcome]:
    return list(snapshot.calls.values())


def test_a_call_is_counted_when_the_vcpu_has_left_it(toggle: StandIn) -> None:
    """This thread runs, as far as the reader knows, so it may still be in the call; until the guest ran."""
    vcpu = toggle.vcpu()
    toggle.page.raw = FULL
    toggle.counted()
    toggle.call("vmx_set_msr", vcpu, 0x10, READ, False, CLEAR)
    for _ in range(3):
        now = toggle.engine.snapshot()
        assert (outcomes(now.since(toggle.last)), now.open_calls) == ([], 1)
    vcpu.exits += 1
    now = toggle.engine.snapshot()
    assert (outcomes(now.since(toggle.last)), now.open_calls) == ([CHANGED], 0)
    assert toggle.engine.snapshot().calls == now.calls


def test_a_call_that_comes_before_a_second_look_is_not_taken_for_the_first(toggle: StandIn) -> None:
    vcpu = toggle.vcpu()
    toggle.page.raw = FULL
    toggle.counted()
    toggle.call("vmx_set_msr", vcpu, 0x10, READ, False, CLEAR)
    assert toggle.engine.snapshot().open_calls == 1
    vcpu.exits += 1
    toggle.call("vmx_set_msr", vcpu, 0x10, READ, False, CLEAR)
    now = toggle.engine.snapshot()
    assert (outcomes(now.since(toggle.last)), now.open_calls) == ([CHANGED], 1)
    assert outcomes(toggle.counted()) == [CHANGED + REDUNDANT]


def test_a_vcpu_that_ends_takes_no_outcome_along(toggle: StandIn) -> None:
    vcpu = toggle.vcpu()
    toggle.page.raw = FULL
    toggle.counted()
    toggle.call("vmx_set_msr", vcpu, 0x10, READ, False, CLEAR)
    toggle.free(vcpu)
    toggle.page.raw = FULL  # the page has another owner
    now = toggle.engine.snapshot()
    assert (outcomes(now.since(toggle.last)), now.open_calls) == ([CHANGED], 0)


def test_bits_that_are_written_without_a_call_are_not_taken_for_its_outcome(toggle: StandIn) -> None:
    vcpu = toggle.vcpu()
    toggle.page.raw = FULL
    toggle.counted()
    toggle.call("vmx_set_msr", vcpu, 0x808, READ, False, CLEAR)
    toggle.next.raw = FULL
    toggle.library[VMX.direct_write](ctypes.byref(vcpu))
    assert toggle.page.raw == FULL
    assert outcomes(toggle.counted()) == [CHANGED]


def test_a_vcpu_whose_end_was_not_seen(toggle: StandIn) -> None:
    vcpu = toggle.vcpu()
    toggle.page.raw = FULL
    toggle.counted()
    toggle.call("vmx_set_msr", vcpu, 0x10, READ, False, CLEAR)
    toggle.inside(lambda: None)
    toggle.create(vcpu)  # another one, at the same address
    counted = toggle.counted()
    assert (outcomes(counted), counted.read_failures, counted.vcpus_seen) == ([Outcome(1, 0, 0, 0, 0)], 1, 2)


def test_vcpus_at_once_do_not_mix(toggle: StandIn) -> None:
    """Each in a thread of its own, under the eyes of a reader that settles what it can."""
    rounds, threads = 150, 6
    library, done = toggle.library, threading.Event()
    call = library["vmx_disable_intercept_for_msr"]
    ctypes.c_void_p.in_dll(library, "next").value = None
    toggle.inside(lambda: None)
    toggle.counted()

    def vcpu_thread(number: int) -> None:
        page = ctypes.create_string_buffer(FULL, PAGE)
        for _ in range(rounds):
            vcpu = Vcpu(0x1000, ctypes.addressof(page))
            toggle.create(vcpu)
            for msr in range(number, number + 3):
                call(ctypes.byref(vcpu), ctypes.c_uint32(msr), READ)
                vcpu.exits += 1
            toggle.update(vcpu)
            call(ctypes.byref(vcpu), ctypes.c_uint32(0x40), BOTH)
            toggle.free(vcpu)

    def read() -> None:
        while not done.is_set():
            toggle.engine.snapshot()

    with ThreadPoolExecutor(threads + 1) as pool:
        reader = pool.submit(read)
        for made in [pool.submit(vcpu_thread, number) for number in range(threads)]:
            made.result()
        done.set()
        reader.result()
    counted = toggle.counted()
    wanted = Counter({0x40: rounds * threads})
    for number in range(threads):
        wanted.update(dict.fromkeys(range(number, number + 3), rounds))
    seen = Counter[int]()
    for called, result in counted.calls.items():
        seen[called.msr] += result.calls
        assert result.redundant == result.calls
    assert seen == wanted
    assert sum(d.count for d in counted.updates.values()) == rounds * threads
    assert (counted.vcpus_seen, counted.lower_bound) == (rounds * threads, False)
    assert counted.maps[1].entries == toggle.last.maps[1].entries


def test_a_cpu_without_msr_bitmaps(toggle: StandIn) -> None:
    toggle.call("vmx_set_msr", toggle.vcpu(bitmap=0), 0x10, READ, True)
    assert list(toggle.counted().calls.values()) == [Outcome(1, 1, 0, 0, 0)]


@pytest.mark.parametrize("array", ["counters", "updates"])
def test_what_finds_its_map_full_is_counted_as_dropped(recalc: StandIn, array: str) -> None:
    vcpu = recalc.vcpu()
    mapped, member = recalc.engine._reader._arrays[array], {"counters": "key", "updates": "kind"}[array]
    before = [mapped.get(index, member) for index in range(mapped.entries)]
    recalc.inside(lambda: recalc.call("vmx_set_msr", vcpu, 0x1234, READ, True))
    recalc.counted()
    for index in range(mapped.entries):
        mapped.set(index, member, 1 << 31)
    try:
        for _ in range(3):
            recalc.update(vcpu)
    finally:
        for index, value in enumerate(before):
            mapped.set(index, member, value)
    counted = recalc.counted()
    dropped = {one.name: one.dropped for one in counted.maps}
    calls, updates = (sum(one.calls for one in counted.calls.values()), sum(d.count for d in counted.recalcs.values()))
    full = array == "counters"
    assert (calls, updates, counted.lower_bound) == ((0, 3, True) if full else (3, 0, True))
    assert dropped == {"calls": 3 * full, "vcpus": 0, "updates": 3 * (not full)}


def test_a_reading_makes_no_system_call_on_a_map(toggle: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a call keeps kprobe programs from running. What runs a program does not."""
    vcpu = toggle.vcpu()
    toggle.inside(lambda: None)
    toggle.call("vmx_set_msr", vcpu, 0x10, READ, True)
    toggle.update(vcpu)
    toggle.call("vmx_set_msr", vcpu, 0x10, READ, True)
    commands: list[int] = []
    call = syscalls._bpf

    def recorded(command: int, attributes: bytes) -> tuple[int, bytes]:
        commands.append(command)
        return call(command, attributes)

    monkeypatch.setattr(syscalls, "_bpf", recorded)
    assert toggle.engine.snapshot().open_calls == 1
    assert set(commands) == {syscalls._PROG_TEST_RUN}
    toggle.counted()


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


@pytest.mark.parametrize(("pid", "seen"), [(os.getpid(), True), (os.getppid(), False)], ids=["its own", "another"])
def test_one_process_alone(pid: int, seen: bool, headers: None, library: Path, tmp_path: Path) -> None:
    """Of others nothing is counted, and so nothing is missed."""
    own = Path(shutil.copy(library, tmp_path))  # which no other engine probes
    with running(own, TOGGLE, StandInBtf(), Options(backend="kprobe", pid=pid)) as stand_in:
        vcpu = stand_in.vcpu()
        stand_in.inside(lambda: stand_in.call("vmx_set_msr", vcpu, 0x10, READ, False))
        stand_in.create(vcpu)
        stand_in.update(vcpu)
        stand_in.free(vcpu)
        counted = stand_in.counted()
        calls, updates = (
            sum(one.calls for one in counted.calls.values()),
            sum(d.count for d in counted.updates.values()),
        )
        assert (calls, updates, counted.vcpus_seen) == ((2, 1, 1) if seen else (0, 0, 0))
        assert (counted.unpaired_returns, counted.lower_bound) == (0, False)


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


def test_an_update_whose_return_is_not_seen_is_counted_without_its_time(toggle: StandIn) -> None:
    """The kernel has no place for more of them, say."""
    vcpu, engine = toggle.vcpu(), toggle.engine
    toggle.inside(lambda: None)
    toggle.counted()
    os.close(engine._links[HOOK][0])  # that of the return
    toggle.update(vcpu)
    toggle.update(vcpu)
    engine._links[HOOK][0] = toggle.link(HOOK, engine._functions["update_returned"], at_return=True)
    toggle.update(vcpu)
    counted = toggle.counted()
    [durations] = counted.updates.values()
    missed = {probe.function: probe.missed for probe in counted.probes}
    assert (durations.count, durations.timed, missed[HOOK], counted.lower_bound) == (3, 1, 2, True)
    toggle.update(vcpu)
    assert kinds(toggle) == (1, 0)


def test_a_thread_whose_place_another_has(toggle: StandIn) -> None:
    """It finds its vCPU in the hash table, and leaves the other's place alone."""
    toggle.inside(lambda: None)
    toggle.counted()
    tid, maps = threading.get_native_id(), toggle.engine._built.loaded.maps
    place, members = struct.pack("I", tid % 4096), struct.Struct("QQ")
    assert struct.pack("I", tid) not in maps["threads"].keys()  # noqa: SIM118 (a map of the kernel's)
    for claims, elsewhere in ((0, False), (1, True), (2, True), (0, True)):
        maps["threads_here"].update(place, members.pack(claims, (tid + 4096 << 32) * bool(claims)))
        toggle.update(toggle.vcpu())
        counted = toggle.counted()
        [durations] = counted.updates.values()
        assert (durations.count, durations.timed, counted.lower_bound) == (1, 1, False)
        assert (struct.pack("I", tid) in maps["threads"].keys()) == elsewhere  # noqa: SIM118


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
