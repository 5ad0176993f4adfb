# SPDX-License-Identifier: GPL-2.0-or-later
"""What the BPF program counted, read from memory: its arrays as the parts of a Snapshot."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tracer.kernel.symbols import Symbols
from tracer.model.cause import FILTER_CHANGE, RECALC, VCPU_CREATE
from tracer.model.snapshot import DURATION_BOUNDS, Call, Durations, Map, Outcome
from tracer.program.syscalls import MappedArray, run_program
from tracer.trace.capabilities import sees_processes

_ACCESS = {1: "read", 2: "write", 3: "read_write"}
#: enum within of bpf/maps.h
WITHIN_FILTER_CHANGE, WITHIN_RECALC, WITHIN_CREATION = 1, 2, 3
_CAUSES = {WITHIN_FILTER_CHANGE: FILTER_CHANGE, WITHIN_RECALC: RECALC, WITHIN_CREATION: VCPU_CREATE}
#: The member that is not 0 where a value is in use, and the count that grows when another comes into use.
_PLACES = {
    "counters": ("key", "places_taken"),
    "updates": ("kind", "places_taken"),
    "vcpus": ("vcpu", "vcpus_seen"),
    "vmms": ("id", "vmms_seen"),
}

# PROC_PID_INIT_INO and PROC_TIME_INIT_INO, include/linux/proc_ns.h
_INIT_PID_NAMESPACE, _INIT_TIME_NAMESPACE = "pid:[4026531836]", "time:[4026531834]"
SETTLE_PAUSE_SECONDS = 0.002


@dataclass(frozen=True)
class Counted:
    """What is in the arrays: `counts` by the members of struct counts, `updates` and `recalcs` by VMM; what is open.

    VMMs are as in tracer/model/vmm_id.py.
    """

    calls: Mapping[Call, Outcome]
    updates: Mapping[int, Durations]
    recalcs: Mapping[int, Durations]
    creation_recalcs: int  # those of `recalcs` that the creation of a vCPU asked for
    counts: Mapping[str, int]
    maps: tuple[Map, ...]
    commands: Mapping[int, str]
    open_calls: int


class TakenPlaces:
    """Which values of arrays are in use: an array is searched only if another came into use since the last time."""

    def __init__(self, counts: MappedArray) -> None:
        """`counts`: of the program, which says how many came into use."""
        self._counts = counts
        self._found: dict[str, tuple[int, list[int]]] = {}

    def of(self, array: MappedArray, member: str, count: str) -> list[int]:
        """Of an array, the values whose `member` is not 0; `count` grows when another comes into use.

        No two arrays of a program have the same `member`.
        """
        taken = self._counts.get(0, count)
        if self._found.get(member, (-1, []))[0] != taken:  # a place is counted once it can be seen
            self._found[member] = taken, array.used(member)
        return [index for index in self._found[member][1] if array.get(index, member)]

    def forget(self) -> None:
        """Search everything again."""
        self._found = {}


class Reader:
    """Reads the arrays of a program, and has it do what only a program can without losing a count."""

    def __init__(
        self, arrays: Mapping[str, MappedArray], functions: Mapping[str, int], *, exact: bool, by_vm: bool
    ) -> None:
        """`arrays` and `functions` (descriptors) are by name; `exact`: the outcomes of calls are seen."""
        self._arrays, self._functions, self._exact, self._by_vm = arrays, functions, exact, by_vm
        self._counts = arrays["counts"]
        outcome = ("redundant", "changed", "unknown", "changed_read", "changed_write", "refused")
        self._counter = arrays["counters"].getter(*(f"outcome.{name}" for name in outcome), "caller", "vmm", "key")
        self._update = arrays["updates"].getter("count", "nanoseconds", "buckets")
        self._taken = TakenPlaces(self._counts)
        self._symbols: Symbols | None = None
        self._called: dict[tuple[int, int], Call] = {}
        self._sees_threads = reads_init_pids()

    def read(self, symbols: Symbols, patience: float = 0) -> Counted:
        """What is counted now; `symbols` say who called. `patience`: the seconds to wait for calls that are open."""
        open_calls = self._settle(patience)
        counts = {name: self._counts.get(0, name) for name in self._counts.members}
        calls: dict[Call, Outcome] = {}
        counters = self._arrays["counters"]
        taken = self._places("counters")
        for index in taken:
            *numbers, caller, vmm, key = self._counter(index)
            outcome = self._outcome(*numbers)
            if key and outcome.calls:  # a place may have been taken for a call that is not counted yet
                call = self._call(symbols, index, caller, vmm, key)
                calls[call] = calls[call] + outcome if call in calls else outcome
        durations: dict[int, dict[int, Durations]] = {WITHIN_FILTER_CHANGE: {}, WITHIN_RECALC: {}}
        updates, creation_recalcs = self._places("updates"), 0
        for index in updates:
            count, nanoseconds, *buckets = self._update(index)
            if count:
                kind, vmm = (self._arrays["updates"].get(index, name) for name in ("kind", "vmm"))
                if kind == WITHIN_CREATION:
                    kind, creation_recalcs = WITHIN_RECALC, creation_recalcs + count
                # There are two where two CPUs looked for one at once.
                durations[kind][vmm] = durations[kind].get(vmm, Durations()) + _durations(count, nanoseconds, buckets)
        entries = {"calls": len(taken), "vcpus": len(self._places("vcpus"))}
        capacity = {"calls": counters.entries, "vcpus": self._arrays["vcpus"].entries}
        if self._by_vm:  # otherwise it has a place for each kind
            entries["updates"], capacity["updates"] = len(updates), self._arrays["updates"].entries
        return Counted(
            calls=calls,
            updates=durations[WITHIN_FILTER_CHANGE],
            recalcs=durations[WITHIN_RECALC],
            creation_recalcs=creation_recalcs,
            counts=counts,
            maps=tuple(Map(n, entries[n], capacity[n], counts[f"dropped_{n}"]) for n in entries),
            commands=self._commands() if self._by_vm else {},
            open_calls=open_calls,
        )

    def _call(self, symbols: Symbols, index: int, caller: int, vmm: int, key: int) -> Call:
        """What the counter at `index` counts: found once for all processes, and readings with the same `symbols`."""
        if symbols is not self._symbols:
            self._symbols, self._called = symbols, {}
        found = self._called.get((key, caller))
        if found is None:
            found = self._called[key, caller] = self._found(symbols, index, caller)
        return replace(found, pid=vmm) if vmm else found

    def _found(self, symbols: Symbols, index: int, caller: int) -> Call:
        name, function = symbols.caller(caller)
        members = ("call.msr", "call.type", "call.enables", "call.within")
        msr, type_, enables, within = (self._arrays["counters"].get(index, member) for member in members)
        return Call(
            msr=msr,
            access=_ACCESS.get(type_, "none"),
            action=_action(type_, enables),
            cause=_CAUSES.get(within) or symbols.vendor.cause_of(function),
            caller=name,
        )

    def reset(self, count: str) -> None:
        """Set a `count` to 0."""
        self._counts.set(0, count, 0)

    def follow_creations(self) -> None:
        """From now on, have the creations of vCPUs followed: what begins and what ends one is probed."""
        self._counts.set(0, "follow_creations", 1)

    def clear(self) -> None:
        """Make everything 0, while no program counts."""
        self._taken.forget()
        for array in self._arrays.values():
            array.clear()

    def _settle(self, patience: float) -> int:
        """Have the outcomes of calls read that nothing has followed on their vCPU; how many are still under way."""
        program = self._functions.get("settle_call")
        if program is None:
            return 0
        deadline = time.monotonic() + patience
        indices = self._places("vcpus")
        while True:
            indices = self._still_open(program, indices)
            if not indices or time.monotonic() >= deadline:
                return len(indices)
            time.sleep(SETTLE_PAUSE_SECONDS)

    def _still_open(self, program: int, indices: list[int]) -> list[int]:
        vcpus = self._arrays["vcpus"]
        seqs = {index: seq for index in indices if (seq := vcpus.get(index, "seq")) & 1}
        # Those were read before the threads are looked at: where one is now, it has left such calls behind. Many vCPUs
        # may have been made by one thread.
        tids = {index: vcpus.get(index, "tid") for index in seqs}
        at_rest = {tid: self._sees_threads and is_at_rest(tid) for tid in {*tids.values()}}
        return [index for index, seq in seqs.items() if run_program(program, index, seq, at_rest[tids[index]])]

    def _places(self, array: str) -> list[int]:
        """Which values of `array` are in use."""
        return self._taken.of(self._arrays[array], *_PLACES[array])

    def _outcome(self, redundant: int, changed: int, unknown: int, *details: int) -> Outcome:
        """DETAILS: the changed bits for reads and for writes, and the refusals."""
        calls = redundant + changed + unknown
        return Outcome(calls, redundant, *details) if self._exact else Outcome(calls)

    def _commands(self) -> dict[int, str]:
        """What processes were called when they made their first vCPU."""
        vmms = self._arrays["vmms"]
        found = {}
        for index in self._places("vmms"):
            vmm, command = vmms.get(index, "id"), vmms.text(index, "command")
            if vmm == vmms.get(index, "id"):  # or it was being written
                found[vmm] = command.decode(errors="replace")
        return found

    def updated_vcpus(self) -> frozenset[int]:
        """The vCPUs of which a whole update was seen, by the addresses of their struct kvm_vcpu."""
        vcpus = self._arrays["vcpus"]
        return frozenset(vcpus.get(index, "vcpu") for index in self._places("vcpus") if vcpus.get(index, "started"))

    def forget(self, vmms: set[int]) -> None:
        """Make room: the counts of processes that have ended become those of VMM 0, in the kernel, where none is lost.

        Those of a process with a call that is not counted yet stay, to be asked for again.
        """
        arrays = self._arrays
        open_ = {
            arrays["vcpus"].get(index, "vmm")
            for index in self._places("vcpus")
            if arrays["vcpus"].get(index, "seq") & 1
        }
        ended = vmms - open_
        for array, program in (("counters", "counter_ended"), ("updates", "update_ended")):
            for index in self._places(array):
                if arrays[array].get(index, "vmm") in ended:
                    run_program(self._functions[program], index)
        for index in self._places("vmms"):
            if arrays["vmms"].get(index, "id") in ended:
                arrays["vmms"].set(index, "id", 0)


def _action(type_: int, enables: int) -> str:
    """What a call asks for: of the directions `type_`, to intercept `enables`, and to let the others pass."""
    passed = type_ & ~enables
    if passed == type_:
        return "disable"
    return f"disable_{_ACCESS[passed]}" if passed else "enable"


def _durations(count: int, nanoseconds: int, buckets: list[int]) -> Durations:
    """Of a struct update, whose time is that of updates that were seen to return; its first bucket is never used."""
    last = len(DURATION_BOUNDS) + 1
    return Durations(count, nanoseconds / 1e9, (*buckets[1:last], sum(buckets[last:])))


def is_in_init_pid_namespace() -> bool:
    """Whether the ids of processes here are those that BPF programs see, and so are all processes."""
    try:
        return os.readlink("/proc/self/ns/pid") == _INIT_PID_NAMESPACE
    except OSError:
        return False


def is_in_init_time_namespace() -> bool:
    """Whether /proc shows here when processes began as the kernel has it (timens_add_boottime_ns()); so if unknown."""
    try:
        return os.readlink("/proc/self/ns/time") == _INIT_TIME_NAMESPACE
    except OSError:
        return True


def reads_init_pids() -> bool:
    """Whether /proc shows the thread ids that BPF programs see, and all of them."""
    return is_in_init_pid_namespace() and sees_processes()


def is_at_rest(tid: int) -> bool:
    """Whether a thread is not on a CPU and does not wait for one, so that it is in no function that never sleeps."""
    try:
        text = Path(f"/proc/{tid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "R"
