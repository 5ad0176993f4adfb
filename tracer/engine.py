"""The engine: BPF programs on the kernel's functions, and what they counted as a Snapshot. Needs BCC and rights."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tracer import syscalls
from tracer.btf import Btf, BtfError
from tracer.cause import FILTER_CHANGE, RECALC, cause_of
from tracer.compiler import Built, build, refused
from tracer.copies import holders
from tracer.doctor import Machine, explain_eperm
from tracer.errors import MsrtraceError
from tracer.kprobe import attach_kprobe
from tracer.layout import VCPU_CREATE, VCPU_FREE, X2APIC_WRITE, X2APIC_WRITE_CALLERS, Layout
from tracer.program import Refused, Target, Variant
from tracer.resources import resource
from tracer.rights import in_force, sees_processes
from tracer.snapshot import DURATION_BOUNDS, Call, Durations, Map, Outcome, Probe, Snapshot
from tracer.symbols import Symbol, Symbols

_ACCESS = {1: "read", 2: "write", 3: "read_write"}
_ENABLES = 0x100
# enum within and enum count of bpf/msrtrace.c
_WITHIN_FILTER_CHANGE, _WITHIN_RECALC = 1, 2
_COUNTS = [
    "dropped_calls",
    "dropped_vcpus",
    "dropped_updates",
    "unpaired_update",
    "unpaired_return",
    "read_failed",
    "vcpus_seen",
    "vmms_seen",
    "places_taken",
]
# enum value
_VALUES = [
    "enable_at",
    "disable_at",
    "set_at",
    "kretprobe_trampoline",
    "fgraph_trampoline",
    "wanted_pid",
    "leader_offset",
    "command_offset",
]
# The 64-bit words of struct counter, update, vcpu and vmm; of two members in one the first is the low half.
_COUNTER = [
    "changed_read",
    "changed_write",
    "refused",
    "redundant",
    "changed",
    "unknown",
    "caller",
    "site",
    "pid",
    "what",
]
_UPDATE = ["count", "nanoseconds", *(f"bucket_{n}" for n in range(32)), "pid, kind"]
_VCPU = [
    "vcpu",
    "number",
    "address",
    "msr, how",
    "before, counter",
    "pid, tid",
    "inside",
    "started",
    "bitmap",
    "filter",
]
_VCPU += ["looked_at", "exits"]
_VMM = ["pid", "command", "command's second half"]
_WORDS = {"counters": _COUNTER, "updates": _UPDATE, "vcpus": _VCPU, "vmms": _VMM, "counts": ["count"]}
#: The word that is not 0 where a value is in use, and the count that grows when another comes into use.
_PLACES = {
    "counters": (_COUNTER.index("what"), "places_taken"),
    "updates": (_UPDATE.index("pid, kind"), "places_taken"),
    "vcpus": (_VCPU.index("vcpu"), "vcpus_seen"),
    "vmms": (_VMM.index("pid"), "vmms_seen"),
}
_OPEN = 1  # of enum settled
_RDONLY_CAST = 0x7F000001  # the number by which the program calls it
_CAST = ("bpf_rdonly_cast", "timespec64")

BACKENDS = ("kprobe", "fentry")
_INIT_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO, include/linux/proc_ns.h
_SETTLE_PAUSE_SECONDS = 0.002
_PREEMPTION_MODEL = Path("/sys/kernel/debug/sched/preempt")


@dataclass(frozen=True)
class Options:
    """What the user chose: to see the VMs apart, the VMM with one pid alone, and by which of BACKENDS or `auto`."""

    by_vm: bool = False
    pid: int | None = None
    backend: str = "auto"


@dataclass(frozen=True)
class _Point:
    """A function to probe, and the BPF functions that run at its entry and at its return."""

    function: str
    entry: str
    returned: str | None = None
    #: the counters of `_COUNTS` that say a return was missed
    unpaired: tuple[str, ...] = ()

    @property
    def programs(self) -> tuple[str, ...]:
        """The BPF functions."""
        return (self.entry, self.returned) if self.returned else (self.entry,)


def points(layout: Layout, symbols: Symbols, exact: bool) -> list[_Point]:
    """What LAYOUT asks to be probed, the update function first; EXACT if the outcomes of calls are seen."""

    def present(names: tuple[str, ...]) -> str:
        return next((name for name in names if symbols.find(name)), names[0])

    found = [_Point(layout.update, "update_entered", "update_returned", ("unpaired_update",))]
    if layout.filter_set:
        found.append(_Point(layout.filter_set, "filter_set_entered", "filter_set_returned"))
    found.append(_Point(present(VCPU_CREATE), "vcpu_created"))
    found.append(_Point(present(VCPU_FREE), "vcpu_freed"))
    if exact and layout.calls:
        whole = symbols.find(X2APIC_WRITE) or not any(map(symbols.find, X2APIC_WRITE_CALLERS))
        found += [_Point(name, "x2apic_entered") for name in ((X2APIC_WRITE,) if whole else X2APIC_WRITE_CALLERS)]
    called = {"enable_entered": layout.enable, "disable_entered": layout.disable, "set_entered": layout.set_}
    return found + [_Point(function, entry) for entry, function in called.items() if function]


def definitions(layout: Layout, btf: Btf | None, symbols: Symbols, options: Options) -> dict[str, int]:
    """The -D by which bpf/msrtrace.c is configured; without BTF the outcome of calls stays unknown."""
    result = {}
    if btf:
        result["BITMAP_OFFSET"] = btf.bitmap_offset()
        with suppress(BtfError):
            result["EXITS_OFFSET"] = btf.offset("kvm_vcpu", "stat") + btf.offset("kvm_vcpu_stat", "exits")
        with suppress(BtfError):
            result["CAST_TYPE"] = btf.kernel_ids(*_CAST)[1]
    if layout.filter_set and symbols.find(layout.filter_set):
        # `kvm` is the first member of struct kvm_vcpu since 2.6; BTF confirms it where there is any.
        result["FILTER_OFFSET"] = btf.offset("kvm_vcpu", "kvm") if btf else 0
    else:
        result["UPDATE_KIND"] = _WITHIN_RECALC if layout.filter_set else _WITHIN_FILTER_CHANGE
    if layout.set_:
        result["SETS"] = 1
    if options.pid is not None:
        result["ONE_PID"] = 1
    if options.by_vm:
        result["BY_PID"] = 1
    return result


def preemptible(model: Path = _PREEMPTION_MODEL, version: str | None = None) -> bool:
    """Whether kernel code, and so a BPF program at fentry, may be preempted, as far as can be known: else yes.

    One that is keeps the same program from running for others on that CPU until it goes on, and their calls are missed
    (__bpf_prog_enter_recur(), kernel/bpf/trampoline.c). Kprobes run with preemption disabled.
    """
    version = version or os.uname().version
    if "PREEMPT" not in version:
        return False
    try:
        chosen = re.search(r"\((\w+)\)", model.read_text())
    except OSError:
        return True
    return not chosen or chosen[1] not in ("none", "voluntary")


def variants(
    layout: Layout, symbols: Symbols, defined: Mapping[str, int], options: Options, btf: Btf | None = None
) -> list[Variant]:
    """How the program may be built, what is preferred first.

    BTF gives the ids of functions; it must be there if outcomes are seen. Raises MsrtraceError if the user's choice
    cannot be.
    """
    exact = "BITMAP_OFFSET" in defined
    # What tells filter updates apart is compiled only where its offset is defined.
    wanted = [
        p for p in points(layout, symbols, exact) if p.function != layout.filter_set or "FILTER_OFFSET" in defined
    ]
    read_by = (["settle_call"] if exact else []) + (["counter_ended", "update_ended"] if options.by_vm else [])
    reader = {name: Target("raw_tracepoint") for name in read_by}
    named = {**symbols.trampolines, "wanted_pid": options.pid or 0, **(_command_offsets(btf) if options.by_vm else {})}
    values = {_VALUES.index(name): value for name, value in named.items()}
    kprobe = {name: Target("kprobe") for point in wanted for name in point.programs}
    found = [Variant("kprobe", defined, kprobe | reader, values)]
    problem = _no_fentry(layout, symbols, wanted, exact)
    if btf and not problem:
        try:
            tracing = _tracing(symbols, wanted, btf)
        except BtfError as error:
            problem = str(error)
        else:
            called = (("enable_at", layout.enable), ("disable_at", layout.disable), ("set_at", layout.set_))
            values |= {
                _VALUES.index(name): symbols.find(function)[0].address
                for name, function in called
                if function and symbols.find(function)
            }
            found.insert(0, Variant("fentry", {**defined, "FENTRY": 1}, tracing | reader, values))
    if problem and options.backend == "fentry":
        raise MsrtraceError(f"the backend fentry cannot be used here: {problem}; --backend kprobe can")
    if options.backend == "auto":
        found = [v for v in found if v.backend == "kprobe" or not preemptible()]
    else:
        found = [v for v in found if v.backend == options.backend]
    if not btf or "CAST_TYPE" not in defined:
        return found
    kfuncs = {_RDONLY_CAST: btf.kernel_ids(*_CAST)[0]}
    return [faster for variant in found for faster in (replace(variant, kfuncs=kfuncs), _without_cast(variant))]


def _command_offsets(btf: Btf | None) -> dict[str, int]:
    """Where the command of a process is, if BTF tells; without it the thread's is taken."""
    try:
        kernel = btf or Btf.of_kernel()
        return {
            "leader_offset": kernel.offset("task_struct", "group_leader"),
            "command_offset": kernel.offset("task_struct", "comm"),
        }
    except BtfError:
        return {}


def _tracing(symbols: Symbols, wanted: list[_Point], btf: Btf) -> dict[str, Target]:
    """What fentry and fexit programs are loaded for. Raises BtfError."""
    found = {}
    for point in wanted:
        for symbol in symbols.find(point.function)[:1]:
            if symbol.module == symbols.module:
                origin = btf
            else:  # kvm, which may be in the kernel image although kvm_intel is not
                origin = Btf.of_module(symbol.module, base=btf.base) if symbol.module else btf.base or btf
            function = origin.function_id(symbol.name)
            for kind, program in zip(("fentry", "fexit"), point.programs, strict=False):
                found[program] = Target(kind, function, symbol.module)
    return found


def _without_cast(variant: Variant) -> Variant:
    return replace(variant, definitions={k: v for k, v in variant.definitions.items() if k != "CAST_TYPE"})


def _no_fentry(layout: Layout, symbols: Symbols, wanted: list[_Point], exact: bool) -> str:
    """Why fentry cannot be used, as far as can be known without trying."""
    if not exact:
        return "it needs the BTF of kvm_intel, and a layout whose calls can be counted"
    places = [symbol for point in wanted for symbol in symbols.find(point.function)[:1]]
    clones = [symbol.name for symbol in places if symbol.name != symbol.function]
    if clones:
        return f"BTF does not describe {', '.join(clones)}"
    # Old kernels look their addresses up by the names alone (6.1: bpf_check_attach_target(), kernel/bpf/verifier.c), or
    # cannot have a trampoline and a livepatch on one function (before 6.0: kernel/trace/ftrace.c).
    copies = {symbol.place for point in wanted for symbol in symbols.copies(point.function)}
    patches = {patch.module for point in wanted for patch in symbols.replacing(point.function)}
    if copies or patches:
        return f"livepatches or others have functions that are probed: {', '.join(sorted(copies or patches))}"
    if len({point.entry for point in wanted}) < len(wanted):
        return f"there is no {X2APIC_WRITE} to probe"
    return ""


class Engine:
    """Attached probes. Closing it, or the death of its process, removes them: they hang on file descriptors."""

    def __init__(self, layout: Layout, symbols: Symbols, options: Options, machine: Machine) -> None:
        """Compile, load and attach. Raises MsrtraceError when nothing can be counted."""
        self._layout, self._symbols, self._options, self._machine = layout, symbols, options, machine
        self._defined, self._btf_problem, btf = self._plan(layout, symbols)
        wanted = variants(layout, symbols, self._defined, options, btf)
        try:
            self._built: Built = build(resource("bpf/msrtrace.c"), wanted)
        except Refused:
            raise MsrtraceError(explain_eperm(machine)) from None
        self._arrays, self._functions = self._built.loaded.arrays, self._built.loaded.functions
        self._links: dict[str, list[int]] = {}
        self.probes: list[Probe] = []
        self._missed_before: dict[str, int] = {}
        self._in_use: dict[str, tuple[int, list[int]]] = {}
        self._sees_threads = _reads_init_pids()
        try:
            self._attach_all()
        except MsrtraceError:
            self.close()
            raise

    def _plan(self, layout: Layout, symbols: Symbols) -> tuple[dict[str, int], str, Btf | None]:
        """How the program must be configured for a kernel; why it cannot see outcomes there, if so; the BTF if not."""
        if not layout.calls:
            return definitions(layout, None, symbols, self._options), "", None
        try:
            btf = Btf.of_module(symbols.module) if symbols.module else Btf.of_kernel()
            return definitions(layout, btf, symbols, self._options), "", btf
        except BtfError as error:
            return definitions(layout, None, symbols, self._options), str(error), None

    def reattach(self, layout: Layout, symbols: Symbols) -> bool:
        """Attach to a kvm_intel that was loaded anew; False if the program does not fit it.

        Raises MsrtraceError when nothing can be counted. `detach` went before, so counts start from 0.
        """
        defined, problem, _ = self._plan(layout, symbols)
        if self._built.backend != "kprobe" or (layout, defined) != (self._layout, self._defined):
            return False
        self._symbols, self._btf_problem = symbols, problem
        self._attach_all()
        return True

    def _attach_all(self) -> None:
        self._points = points(self._layout, self._symbols, exact="BITMAP_OFFSET" in self._defined)
        with in_force():
            # Calls come last: whatever settles them is there by then.
            self.probes = [self._attach(point) for point in self._points]
        counted = (self._layout.update, *self._layout.calls)
        if not self._attached(*counted):
            reasons = "; ".join(f"{p.function}: {p.detail}" for p in self.probes if p.function in counted)
            self._remove_probes()
            raise MsrtraceError(f"no probe could be attached ({reasons})")
        self._uncounted = tuple(holder.loss for holder in holders(self._symbols) if holder.loss)
        self._clear("unpaired_return")  # functions that were being run while their probes were attached

    def detach(self) -> None:
        """Remove the probes and forget what they counted; the program stays loaded, for `reattach`."""
        self._remove_probes()
        self._missed_before = {name: self._misses(name) for name in self._functions}
        self._in_use = {}
        for array in self._arrays.values():
            array.clear()
        taken = self._built.loaded.maps["taken"]
        for place in taken.keys():  # noqa: SIM118 (a BPF map)
            taken.delete(place)

    def _remove_probes(self) -> None:
        for fd in (fd for links in self._links.values() for fd in links):
            os.close(fd)
        self._links = {}

    @property
    def backend(self) -> str:
        """By which of BACKENDS functions are probed."""
        return self._built.backend

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
        if self.backend == "fentry" and preemptible():
            lines.append(
                "this kernel may preempt what runs at fentry; what is missed by that is counted as missed "
                "(--backend kprobe misses nothing)"
            )
        lines += self._uncounted
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
        where = symbol.place
        links: list[int] = []
        try:
            for program in reversed(point.programs):  # the return first: then nothing is seen half
                links.append(self._link(symbol, program, at_return=program == point.returned))
        except (OSError, KeyError) as error:
            for fd in links:
                os.close(fd)
            reason = explain_eperm(self._machine) if refused(error, "") else str(error)
            return Probe(point.function, symbol.name, False, f"{where}: {reason}")
        self._links[point.function] = links
        others = f", not on its clones {', '.join(s.name for s in clones[1:])}" if clones[1:] else ""
        if copies := self._symbols.copies(point.function):
            others += f", not on {', '.join(s.place for s in copies)}"
        return Probe(point.function, symbol.name, True, where + others)

    def _link(self, symbol: Symbol, program: str, *, at_return: bool) -> int:
        fd = self._functions[program]
        if self._built.backend == "fentry":
            return syscalls.attach_tracing(fd)
        return attach_kprobe(symbol, self._symbols, fd, at_return=at_return)

    @property
    def _updates_observable(self) -> bool:
        needed = [f for f in (self._layout.update, self._layout.filter_set) if f]
        return self._filter_known and all(map(self._attached, needed))

    def _attached(self, *functions: str) -> bool:
        return any(p.attached for p in self.probes if p.function in functions)

    def snapshot(self, patience: float = 0) -> Snapshot:
        """The counts of now. `vms` is left empty: names are not the kernel's.

        A call is counted when its outcome is known; PATIENCE: how many seconds to wait for those that are open.
        """
        open_calls = self._settle(patience)
        counts = {name: self._arrays["counts"].word(index, 0) for index, name in enumerate(_COUNTS)}
        calls: dict[Call, Outcome] = {}
        counters = self._arrays["counters"]
        taken = self._places("counters")
        for index in taken:
            *numbers, caller, _, pid, what = counters.value(index)
            outcome = self._outcome(numbers)
            if what and outcome.calls:  # a place may have been taken for a call that is not counted yet
                call = self._call(what, caller, pid)
                calls[call] = calls[call] + outcome if call in calls else outcome
        durations: dict[int, dict[int, Durations]] = {_WITHIN_FILTER_CHANGE: {}, _WITHIN_RECALC: {}}
        for kind, pid, value in self._updates():
            if value[0]:
                durations[kind][pid] = _durations(value)
        entries = {"calls": len(taken), "vcpus": len(self._places("vcpus"))}
        capacity = {"calls": counters.entries, "vcpus": self._arrays["vcpus"].entries}
        if self._options.by_vm:  # otherwise it has a place for each kind
            entries["updates"], capacity["updates"] = len([*self._updates()]), self._arrays["updates"].entries
        return Snapshot(
            layout=self._layout.name,
            backend=self.backend,
            redundancy=self.redundancy,
            calls=calls,
            updates=durations[_WITHIN_FILTER_CHANGE],
            recalcs=durations[_WITHIN_RECALC],
            probes=tuple(
                replace(probe, missed=sum(counts[c] for c in point.unpaired) + self._recursions(point))
                for point, probe in zip(self._points, self.probes, strict=True)
            ),
            maps=tuple(Map(n, entries[n], capacity[n], counts[f"dropped_{n}"]) for n in entries),
            unpaired_returns=counts["unpaired_return"],
            read_failures=counts["read_failed"],
            open_calls=open_calls,
            uncounted=self._uncounted,
            vcpus_seen=counts["vcpus_seen"],
            vmms_seen=counts["vmms_seen"],
            commands=self._commands() if self._options.by_vm else {},
            calls_observable=self._attached(*self._layout.calls),
            updates_observable=self._updates_observable,
            by_vm=self._options.by_vm,
        )

    def _settle(self, patience: float) -> int:
        """Have the outcomes of calls read that nothing has followed on their vCPU; how many are still under way."""
        program = self._functions.get("settle_call")
        if program is None:
            return 0
        deadline = time.monotonic() + patience
        indices = self._places("vcpus")
        while True:
            indices = [index for index in indices if self._is_open(program, index)]
            if not indices or time.monotonic() >= deadline:
                return len(indices)
            time.sleep(_SETTLE_PAUSE_SECONDS)

    def _is_open(self, program: int, index: int) -> bool:
        vcpus = self._arrays["vcpus"]
        number, tid = vcpus.word(index, _VCPU.index("number")), vcpus.word(index, _VCPU.index("pid, tid")) >> 32
        if not number & 1:
            return False
        # The number was read before the thread is looked at: where it is now, it has left that call behind.
        returned = self._sees_threads and _is_at_rest(tid)
        return syscalls.run_program(program, index, number, returned) == _OPEN

    def _places(self, array: str) -> list[int]:
        """Which values of ARRAY are in use. It is looked through only if another came into use since the last time."""
        word, count = _PLACES[array]
        taken = self._arrays["counts"].word(_COUNTS.index(count), 0)
        if self._in_use.get(array, (-1, []))[0] != taken:  # a place is counted once it can be seen
            self._in_use[array] = taken, self._arrays[array].used(word)
        return [index for index in self._in_use[array][1] if self._arrays[array].word(index, word)]

    def _updates(self) -> Iterator[tuple[int, int, list[int]]]:
        """The kind, the pid, and the words of all updates that were counted."""
        updates = self._arrays["updates"]
        for index in self._places("updates"):
            value = updates.value(index)
            if value[-1] >> 32:
                yield value[-1] >> 32, value[-1] & 0xFFFFFFFF, value

    def _call(self, what: int, caller: int, pid: int) -> Call:
        """WHAT: `msr` and `how` of struct vcpu."""
        name, function = self._symbols.caller(caller)
        within = {_WITHIN_FILTER_CHANGE: FILTER_CHANGE, _WITHIN_RECALC: RECALC}
        how = what >> 32
        return Call(
            msr=what & 0xFFFFFFFF,
            access=_ACCESS.get(how & 3, "none"),
            action="enable" if how & _ENABLES else "disable",
            cause=within.get(how >> 16 & 0xFF) or cause_of(function),
            caller=name,
            pid=pid,
        )

    def _outcome(self, numbers: list[int]) -> Outcome:
        """NUMBERS: of struct outcome."""
        changed_read, changed_write, refusals, redundant, changed, unknown = numbers
        calls = redundant + changed + unknown
        if self.redundancy == "unknown":
            return Outcome(calls)
        return Outcome(calls, redundant, changed_read, changed_write, refusals)

    def _commands(self) -> dict[int, str]:
        """By pid, what processes were called when they made their first vCPU."""
        vmms = self._arrays["vmms"]
        found = {}
        for index in self._places("vmms"):
            pid, *command = vmms.value(index)
            if pid == vmms.word(index, 0):  # or it was being written
                found[pid] = b"".join(word.to_bytes(8, "little") for word in command)
        return {pid: command.partition(b"\0")[0].decode(errors="replace") for pid, command in found.items()}

    def forget(self, pids: set[int]) -> None:
        """Make room: the counts of processes that have ended become those of pid 0, in the kernel, where none is lost.

        Those of a process with a call that is not counted yet stay, to be asked for again.
        """
        if not self._options.by_vm:
            return
        counters, vcpus, vmms = self._arrays["counters"], self._arrays["vcpus"], self._arrays["vmms"]
        open_ = [index for index in self._places("vcpus") if vcpus.word(index, _VCPU.index("number")) & 1]
        ended = pids - {vcpus.word(index, _VCPU.index("pid, tid")) & 0xFFFFFFFF for index in open_}
        for index in self._places("counters"):
            if counters.word(index, _COUNTER.index("pid")) in ended:
                syscalls.run_program(self._functions["counter_ended"], index)
        updates = self._arrays["updates"]
        for index in self._places("updates"):
            if updates.word(index, _UPDATE.index("pid, kind")) & 0xFFFFFFFF in ended:
                syscalls.run_program(self._functions["update_ended"], index)
        for index in self._places("vmms"):
            if vmms.word(index, _VMM.index("pid")) in ended:
                vmms.set_word(index, _VMM.index("pid"), 0)

    def _clear(self, count: str) -> None:
        self._arrays["counts"].set_word(_COUNTS.index(count), 0, 0)

    def _recursions(self, point: _Point) -> int:
        """Runs of POINT's programs that the kernel skipped because another BPF program ran on that CPU.

        A program that sits on several functions is counted at the first of them.
        """
        earlier = self._points[: self._points.index(point)]
        counted = {name for p in earlier for name in p.programs}
        own = [name for name in point.programs if name not in counted]
        return sum(self._misses(name) - self._missed_before.get(name, 0) for name in own)

    def _misses(self, program: str) -> int:
        fd = self._functions.get(program)
        return 0 if fd is None else syscalls.misses(fd)

    def close(self) -> None:
        """Detach everything."""
        self._remove_probes()
        self._built.loaded.close()


def _durations(value: list[int]) -> Durations:
    """VALUE: the words of a struct update."""
    count, nanoseconds, *buckets, _ = value  # the first bucket is never used
    last = len(DURATION_BOUNDS) + 1
    return Durations(count, nanoseconds / 1e9, (*buckets[1:last], sum(buckets[last:])))


def _reads_init_pids() -> bool:
    """Whether /proc shows the thread ids that BPF programs see, and all of them."""
    try:
        return os.readlink("/proc/self/ns/pid") == _INIT_PID_NAMESPACE and sees_processes()
    except OSError:
        return False


def _is_at_rest(tid: int) -> bool:
    """Whether a thread is not on a CPU and does not wait for one, so that it is in no function that never sleeps."""
    try:
        text = Path(f"/proc/{tid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "R"
