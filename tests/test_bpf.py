"""The BPF program, compiled against the headers of each emulated host, through this machine's verifier; and its maps.

Nothing is attached here: this machine need not have kprobes, let alone kvm_intel.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts import HOSTS, kernel

from tracer.btf import Btf, BtfError
from tracer.doctor import Machine
from tracer.engine import _COUNTS, Engine, Options, _compile, _Point, definitions, points
from tracer.errors import MsrtraceError
from tracer.layout import LAYOUTS, Layout, Symbol, Symbols
from tracer.resources import resource
from tracer.snapshot import DURATION_BOUNDS, Call, Durations, Map, Outcome, Probe

SOURCE = resource("bpf/msrtrace.c")
TRIVIAL = "#include <uapi/linux/ptrace.h>\nint trivial(struct pt_regs *ctx)\n{\n\treturn 0;\n}\n"
#: Debian 12's BCC, the oldest that is to do, compiles against these; it may not be able to against newer ones.
MUST_COMPILE = ("bookworm", "trixie", "filter-only")

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
            subprocess.run(["cp", "-rs", f"{headers}/{folder}/.", tree / folder], check=True)


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
def test_the_verifier_refuses(tmp_path: Path) -> None:
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
    with pytest.raises(Exception, match=r"Failed to load BPF program b'reads': Permission denied"):
        verify(compiled(source, tmp_path, "-DCONDITION=1"), "reads")


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
    [buckets] = re.findall(r"^#define BUCKETS (\d+)$", SOURCE.read_text(), re.MULTILINE)
    assert int(buckets) == len(DURATION_BOUNDS) + 2  # the first is not used, the last has the rest


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
        leaf = updates.Leaf(count=3, nanoseconds=2_500_000_000)
        leaf.buckets[1], leaf.buckets[25] = 2, 1
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
        assert taken.updates == {100: Durations(3, 2.5, (2, *[0] * 23, 1))}
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
