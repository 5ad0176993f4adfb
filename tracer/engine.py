"""The engine: BPF programs on the kernel's functions, and what they counted as a Snapshot. Needs BCC and rights."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tracer.btf import Btf, BtfError
from tracer.cause import FILTER_CHANGE, RECALC, cause_of
from tracer.doctor import Machine, explain_eperm
from tracer.errors import MsrtraceError
from tracer.layout import VCPU_CREATE, Layout, Symbols
from tracer.resources import resource
from tracer.snapshot import DURATION_BOUNDS, Call, Durations, Map, Outcome, Probe, Snapshot

_ACCESS = {1: "read", 2: "write", 3: "read_write"}
_ACTION = {0: "disable", 1: "enable"}
# enum within and enum count of bpf/msrtrace.c
_WITHIN_FILTER_CHANGE, _WITHIN_RECALC = 1, 2
_COUNTS = [
    "dropped_calls",
    "dropped_threads",
    "dropped_updates",
    "unpaired_disable",
    "unpaired_enable",
    "unpaired_update",
    "unpaired_return",
    "read_failed",
    "vcpus_seen",
    "vmms_seen",
]


_DEBUG_HINT = " (MSRTRACE_DEBUG=1 shows all)"


@dataclass(frozen=True)
class Options:
    """What the user chose to see: the VMs apart, or the VMM with one pid alone."""

    by_vm: bool = False
    pid: int | None = None


@dataclass(frozen=True)
class _Point:
    """A function to probe, and the BPF functions that run at its entry and at its return."""

    function: str
    entry: str
    returned: str | None
    #: the counters of `_COUNTS` that say a return was missed
    unpaired: tuple[str, ...] = ()


def points(layout: Layout, symbols: Symbols, exact: bool) -> list[_Point]:
    """What LAYOUT asks to be probed, the update function first; EXACT if calls are probed at their return too."""
    returned = "call_returned" if exact else None
    found = [_Point(layout.update, "update_entered", "update_returned", ("unpaired_update",))]
    if layout.filter_set:
        found.append(_Point(layout.filter_set, "filter_set_entered", "filter_set_returned"))
    create = next((name for name in VCPU_CREATE if symbols.find(name)), VCPU_CREATE[0])
    found.append(_Point(create, "vcpu_created", None))
    if layout.enable:
        found.append(_Point(layout.enable, "enable_entered", returned, ("unpaired_enable",)))
    if layout.disable:
        found.append(_Point(layout.disable, "disable_entered", returned, ("unpaired_disable",)))
    if layout.set_:
        found.append(_Point(layout.set_, "set_entered", returned, ("unpaired_enable", "unpaired_disable")))
    return found


def definitions(layout: Layout, btf: Btf | None, filter_known: bool, options: Options) -> dict[str, int]:
    """The -D by which bpf/msrtrace.c is configured; without BTF the outcome of calls stays unknown."""
    result: dict[str, int] = {}
    if btf:
        result["BITMAP_OFFSET"] = btf.bitmap_offset()
    if layout.filter_set and filter_known:
        # `kvm` is the first member of struct kvm_vcpu since 2.6; BTF confirms it where there is any.
        result["FILTER_OFFSET"] = btf.offset("kvm_vcpu", "kvm") if btf else 0
    else:
        result["UPDATE_KIND"] = _WITHIN_RECALC if layout.filter_set else _WITHIN_FILTER_CHANGE
    if options.pid is not None:
        result["WANTED_PID"] = options.pid
    if options.by_vm:
        result["BY_PID"] = 1
    return result


class Engine:
    """Attached probes. Closing it, or the death of its process, removes them: they hang on file descriptors."""

    def __init__(self, layout: Layout, symbols: Symbols, options: Options, machine: Machine) -> None:
        """Compile, load and attach. Raises MsrtraceError when nothing can be counted."""
        self._layout, self._symbols, self._options, self._machine = layout, symbols, options, machine
        self._defined, self._btf_problem = self._plan(layout, symbols)
        flags = [f"-D{name}={value}" for name, value in self._defined.items()]
        self._bpf = _compile(resource("bpf/msrtrace.c"), flags, machine)
        self.probes: list[Probe] = []
        self._missed_before: dict[str, int] = {}
        try:
            self._load_all()
            self._attach_all()
        except MsrtraceError:
            self.close()
            raise

    def _plan(self, layout: Layout, symbols: Symbols) -> tuple[dict[str, int], str]:
        """How the program must be configured for a kernel, and why it cannot see outcomes there, if so."""
        btf, problem = None, ""
        if layout.calls:
            try:
                btf = Btf.of_module(symbols.module) if symbols.module else Btf.of_kernel()
                btf.bitmap_offset()
            except BtfError as error:
                btf, problem = None, str(error)
        filter_known = bool(layout.filter_set and symbols.find(layout.filter_set))
        return definitions(layout, btf, filter_known, self._options), problem

    def reattach(self, layout: Layout, symbols: Symbols) -> bool:
        """Attach to a kvm_intel that was loaded anew; False if the program does not fit it.

        Raises MsrtraceError when nothing can be counted. `detach` went before, so counts start from 0.
        """
        defined, problem = self._plan(layout, symbols)
        if (layout, defined) != (self._layout, self._defined):
            return False
        self._symbols, self._btf_problem = symbols, problem
        self._attach_all()
        return True

    def _load_all(self) -> None:
        """Pass every program through the verifier. Raises MsrtraceError with its reason."""
        wanted = points(self._layout, self._symbols, exact="BITMAP_OFFSET" in self._defined)
        noise: Callable[[], str] = str
        wanted = [p for p in wanted if p.function != self._layout.filter_set or self._filter_known]
        for name in {n for point in wanted for n in (point.entry, point.returned) if n}:
            try:
                with captured_output() as noise:
                    self._bpf.load_func(name, self._bpf.KPROBE)
            except Exception as error:
                _show(noise())
                # EACCES is the verifier's answer too, but then it says why.
                if getattr(error, "errno", 0) == errno.EPERM or "privileges" in str(error):
                    raise MsrtraceError(explain_eperm(self._machine)) from None
                lines = [line for line in noise().splitlines() if line and not line.startswith(("processed", "HINT"))]
                reason = lines[-1] if lines else str(error)
                raise MsrtraceError(f"the kernel refuses the BPF program {name}: {reason}{_DEBUG_HINT}") from None

    def _attach_all(self) -> None:
        self._points = points(self._layout, self._symbols, exact="BITMAP_OFFSET" in self._defined)
        self.probes = [self._attach(point) for point in self._points]
        counted = (self._layout.update, *self._layout.calls)
        if not self._attached(*counted):
            reasons = "; ".join(f"{p.function}: {p.detail}" for p in self.probes if p.function in counted)
            self._remove_probes()
            raise MsrtraceError(f"no probe could be attached ({reasons})")
        self._clear("unpaired_return")  # functions that were being run while their probes were attached

    def detach(self) -> None:
        """Remove the probes and forget what they counted; the program stays loaded, for `reattach`."""
        self._remove_probes()
        self._missed_before = {name: self._misses(name) for p in self._points for name in (p.entry, p.returned) if name}
        for name in ("calls", "updates", "threads"):
            self._bpf[name].clear()
        for count in _COUNTS:
            self._clear(count)

    def _remove_probes(self) -> None:
        for point, probe in zip(self._points, self.probes, strict=True):
            if probe.attached:
                self._bpf.detach_kprobe(event=probe.symbol)
                if point.returned:
                    self._bpf.detach_kretprobe(event=probe.symbol)

    @property
    def redundancy(self) -> str:
        """Whether outcomes are seen: `exact`, or `unknown` where calls are counted without them."""
        return "exact" if "BITMAP_OFFSET" in self._defined or not self._layout.calls else "unknown"

    @property
    def _filter_known(self) -> bool:
        return not self._layout.filter_set or "FILTER_OFFSET" in self._defined

    @property
    def warnings(self) -> list[str]:
        """What keeps the numbers from being complete, one line each."""
        lines = [f"{p.function} is not probed: {p.detail}" for p in self.probes if not p.attached]
        if not self._filter_known:
            lines.append("filter updates cannot be told from other recalculations, so they are not counted")
        if self._btf_problem:
            lines.append(f"which calls are redundant is unknown: {self._btf_problem}")
        if not self._layout.calls:
            lines.append(
                f"this kernel (layout {self._layout.name}) has no function to count MSR-intercept calls at: "
                "only filter updates are counted"
            )
        return lines

    def _attach(self, point: _Point) -> Probe:
        clones = self._symbols.find(point.function)
        if not clones:
            return Probe(point.function, None, False, "no such function in this kernel")
        symbol = clones[0]
        where = f"{symbol.name} [{symbol.module}]" if symbol.module else symbol.name
        try:
            with captured_output() as noise:
                # The return first: then a call is never counted half.
                if point.returned:
                    self._bpf.attach_kretprobe(event=symbol.name, fn_name=point.returned)
                try:
                    self._bpf.attach_kprobe(event=symbol.name, fn_name=point.entry)
                except Exception:
                    if point.returned:
                        self._bpf.detach_kretprobe(event=symbol.name)
                    raise
        except Exception as error:
            text = noise()
            reason = explain_eperm(self._machine) if _refused(error, text) else _last_line(text) or str(error)
            return Probe(point.function, symbol.name, False, f"{where}: {reason}")
        others = f", not on its clones {', '.join(s.name for s in clones[1:])}" if clones[1:] else ""
        return Probe(point.function, symbol.name, True, where + others)

    @property
    def _updates_observable(self) -> bool:
        needed = [f for f in (self._layout.update, self._layout.filter_set) if f]
        return self._filter_known and all(map(self._attached, needed))

    def _attached(self, *functions: str) -> bool:
        return any(p.attached for p in self.probes if p.function in functions)

    def snapshot(self) -> Snapshot:
        """The counts of now. `vms` is left empty: names are not the kernel's."""
        counts = {name: int(self._bpf["counts"][i].value) for i, name in enumerate(_COUNTS)}
        calls: dict[Call, Outcome] = {}
        rows = list(self._bpf["calls"].items())
        for key, value in rows:
            call = self._call(key)
            outcome = self._outcome(value)
            calls[call] = calls[call] + outcome if call in calls else outcome
        durations: dict[int, dict[int, Durations]] = {_WITHIN_FILTER_CHANGE: {}, _WITHIN_RECALC: {}}
        updates = list(self._bpf["updates"].items())
        for key, value in updates:
            durations[key.kind][key.pid] = _durations(value)
        capacity = {name: self._bpf[name].max_entries for name in ("calls", "threads", "updates")}
        entries = {"calls": len(rows), "updates": len(updates), "threads": len(list(self._bpf["threads"].keys()))}
        return Snapshot(
            layout=self._layout.name,
            redundancy=self.redundancy,
            calls=calls,
            updates=durations[_WITHIN_FILTER_CHANGE],
            recalcs=durations[_WITHIN_RECALC],
            probes=tuple(
                replace(probe, missed=sum(counts[c] for c in point.unpaired) + self._recursions(point))
                for point, probe in zip(self._points, self.probes, strict=True)
            ),
            maps=tuple(Map(n, entries[n], capacity[n], counts[f"dropped_{n}"]) for n in capacity),
            unpaired_returns=counts["unpaired_return"],
            read_failures=counts["read_failed"],
            vcpus_seen=counts["vcpus_seen"],
            vmms_seen=counts["vmms_seen"],
            calls_observable=self._attached(*self._layout.calls),
            updates_observable=self._updates_observable,
            by_vm=self._options.by_vm,
        )

    def _call(self, key: Any) -> Call:
        symbol = self._symbols.containing(key.caller)
        function = symbol.function if symbol else ""
        within = {_WITHIN_FILTER_CHANGE: FILTER_CHANGE, _WITHIN_RECALC: RECALC}
        return Call(
            msr=key.msr,
            access=_ACCESS.get(key.type, f"type_{key.type}"),
            action=_ACTION[key.action],
            cause=within.get(key.within) or cause_of(function),
            caller=symbol.name if symbol else hex(key.caller),
            pid=key.pid,
        )

    def _outcome(self, value: Any) -> Outcome:
        if self.redundancy == "unknown":
            return Outcome(value.calls)
        return Outcome(value.calls, value.redundant, value.changed_read, value.changed_write, value.refused)

    def forget(self, pids: set[int]) -> None:
        """Make room in the maps: remove the counts of processes that have ended."""
        for name in ("calls", "updates"):
            table = self._bpf[name]
            for key in [key for key in table.keys() if key.pid in pids]:  # noqa: SIM118 (a BCC table)
                del table[key]

    def _clear(self, count: str) -> None:
        self._bpf["counts"][ctypes.c_int(_COUNTS.index(count))] = ctypes.c_uint64(0)

    def _recursions(self, point: _Point) -> int:
        """Runs that the kernel skipped because another BPF program ran on that CPU (bpf_prog->stats.misses).

        A program that sits on several functions is counted at the first of them.
        """
        names = {point.entry, point.returned} - {None}
        earlier = self._points[: self._points.index(point)]
        counted = {name for p in earlier for name in (p.entry, p.returned)}
        return sum(self._misses(n) - self._missed_before.get(n, 0) for n in names - counted if n)

    def _misses(self, program: str) -> int:
        function = self._bpf.funcs.get(program.encode())
        if function is None:
            return 0
        try:
            text = Path(f"/proc/self/fdinfo/{function.fd}").read_text()
        except OSError:
            return 0
        found = re.search(r"^recursion_misses:\s*(\d+)", text, re.MULTILINE)
        return int(found[1]) if found else 0

    def close(self) -> None:
        """Detach everything."""
        self._bpf.cleanup()


def _durations(value: Any) -> Durations:
    buckets = tuple(value.buckets)  # the first is never used
    last = len(DURATION_BOUNDS) + 1
    buckets = (*buckets[1:last], sum(buckets[last:]))
    return Durations(value.count, value.nanoseconds / 1e9, buckets)


def _compile(source: Path, definitions: list[str], machine: Machine) -> Any:
    """The BPF object. Raises MsrtraceError with the compiler's or the kernel's reason."""
    try:
        from bcc import BPF
    except ImportError as error:
        raise MsrtraceError(f"BCC cannot be imported: {error}; install python3-bpfcc") from None
    noise: Callable[[], str] = str
    try:
        with captured_output() as noise:
            return BPF(src_file=str(source), cflags=["-Wno-macro-redefined", *definitions])
    except Exception as error:
        text = noise()
        _show(text)
        if _refused(error, text):
            raise MsrtraceError(explain_eperm(machine)) from None
        reason = next((line for line in text.splitlines() if "error:" in line), "") or _last_line(text) or str(error)
        raise MsrtraceError(f"the BPF program cannot be compiled or loaded: {reason}{_DEBUG_HINT}") from None


def _refused(error: Exception, text: str) -> bool:
    """Whether the kernel said EPERM, or EACCES as perf_event_paranoid makes it."""
    said = ("Operation not permitted", "Permission denied", "privileges")
    return getattr(error, "errno", 0) in (errno.EPERM, errno.EACCES) or any(s in f"{error} {text}" for s in said)


def _show(text: str) -> None:
    if os.environ.get("MSRTRACE_DEBUG"):
        sys.stderr.write(text)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


@contextmanager
def captured_output() -> Iterator[Callable[[], str]]:
    """Keep what C libraries write to stdout and stderr: the value gives it, also after the block."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = {fd: os.dup(fd) for fd in (1, 2)}
    text = ""
    with tempfile.TemporaryFile() as sink:
        for fd in saved:
            os.dup2(sink.fileno(), fd)
        try:
            yield lambda: text
        finally:
            for fd, copy in saved.items():
                os.dup2(copy, fd)
                os.close(copy)
            sink.seek(0)
            text = sink.read().decode(errors="replace")
