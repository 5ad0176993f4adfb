# SPDX-License-Identifier: GPL-2.0-or-later
"""What the BPF program counted, read from memory: its arrays as the parts of a Snapshot."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tracer.kernel.symbols import Symbols
from tracer.model.cause import FILTER_CHANGE, RECALC
from tracer.model.snapshot import DURATION_BOUNDS, Call, Durations, Map, Outcome
from tracer.program.syscalls import MappedArray, run_program
from tracer.trace.capabilities import sees_processes

_ACCESS = {1: "read", 2: "write", 3: "read_write"}
_ENABLES = 0x100
# enum within and enum count of bpf/msrtrace.c
WITHIN_FILTER_CHANGE, WITHIN_RECALC = 1, 2
COUNTS = [
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
_VCPU += ["update", "looked_at", "exits"]
_VMM = ["pid", "command", "command's second half"]
WORDS = {"counters": _COUNTER, "updates": _UPDATE, "vcpus": _VCPU, "vmms": _VMM, "counts": ["count"]}
#: The word that is not 0 where a value is in use, and the count that grows when another comes into use.
_PLACES = {
    "counters": (_COUNTER.index("what"), "places_taken"),
    "updates": (_UPDATE.index("pid, kind"), "places_taken"),
    "vcpus": (_VCPU.index("vcpu"), "vcpus_seen"),
    "vmms": (_VMM.index("pid"), "vmms_seen"),
}
_OPEN = 1  # of enum settled

_INIT_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO, include/linux/proc_ns.h
_SETTLE_PAUSE_SECONDS = 0.002


@dataclass(frozen=True)
class Counted:
    """What is in the arrays: `counts` by the names of COUNTS, `updates` and `recalcs` by pid; what is open still."""

    calls: Mapping[Call, Outcome]
    updates: Mapping[int, Durations]
    recalcs: Mapping[int, Durations]
    counts: Mapping[str, int]
    maps: tuple[Map, ...]
    commands: Mapping[int, str]
    open_calls: int


class Reader:
    """Reads the arrays of a program, and has it do what only a program can without losing a count."""

    def __init__(
        self, arrays: Mapping[str, MappedArray], functions: Mapping[str, int], *, exact: bool, by_vm: bool
    ) -> None:
        """ARRAYS and FUNCTIONS (descriptors) are by name; EXACT: the outcomes of calls are seen."""
        self._arrays, self._functions, self._exact, self._by_vm = arrays, functions, exact, by_vm
        self._in_use: dict[str, tuple[int, list[int]]] = {}
        self._symbols: Symbols | None = None
        self._called: dict[tuple[int, int], Call] = {}
        self._sees_threads = _reads_init_pids()

    def read(self, symbols: Symbols, patience: float = 0) -> Counted:
        """What is counted now; SYMBOLS say who called. PATIENCE: how many seconds to wait for calls that are open."""
        open_calls = self._settle(patience)
        counts = {name: self._arrays["counts"].word(index, 0) for index, name in enumerate(COUNTS)}
        calls: dict[Call, Outcome] = {}
        counters = self._arrays["counters"]
        taken = self._places("counters")
        for index in taken:
            *numbers, caller, _, pid, what = counters.value(index)
            outcome = self._outcome(numbers)
            if what and outcome.calls:  # a place may have been taken for a call that is not counted yet
                call = self._call(symbols, what, caller, pid)
                calls[call] = calls[call] + outcome if call in calls else outcome
        durations: dict[int, dict[int, Durations]] = {WITHIN_FILTER_CHANGE: {}, WITHIN_RECALC: {}}
        updates = [*self._updates()]
        for kind, pid, value in updates:
            if value[0]:
                durations[kind][pid] = _durations(value)
        entries = {"calls": len(taken), "vcpus": len(self._places("vcpus"))}
        capacity = {"calls": counters.entries, "vcpus": self._arrays["vcpus"].entries}
        if self._by_vm:  # otherwise it has a place for each kind
            entries["updates"], capacity["updates"] = len(updates), self._arrays["updates"].entries
        return Counted(
            calls=calls,
            updates=durations[WITHIN_FILTER_CHANGE],
            recalcs=durations[WITHIN_RECALC],
            counts=counts,
            maps=tuple(Map(n, entries[n], capacity[n], counts[f"dropped_{n}"]) for n in entries),
            commands=self._commands() if self._by_vm else {},
            open_calls=open_calls,
        )

    def _call(self, symbols: Symbols, what: int, caller: int, pid: int) -> Call:
        """As _call() makes it: once for all processes, and for all readings while the SYMBOLS are the same."""
        if symbols is not self._symbols:
            self._symbols, self._called = symbols, {}
        found = self._called.get((what, caller))
        if found is None:
            found = self._called[what, caller] = _call(symbols, what, caller)
        return replace(found, pid=pid) if pid else found

    def reset(self, count: str) -> None:
        """Make a COUNT 0."""
        self._arrays["counts"].set_word(COUNTS.index(count), 0, 0)

    def clear(self) -> None:
        """Make everything 0, while no program counts."""
        self._in_use = {}
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
        return run_program(program, index, number, returned) == _OPEN

    def _places(self, array: str) -> list[int]:
        """Which values of ARRAY are in use. It is looked through only if another came into use since the last time."""
        word, count = _PLACES[array]
        taken = self._arrays["counts"].word(COUNTS.index(count), 0)
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

    def _outcome(self, numbers: list[int]) -> Outcome:
        """NUMBERS: of struct outcome."""
        changed_read, changed_write, refusals, redundant, changed, unknown = numbers
        calls = redundant + changed + unknown
        if not self._exact:
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
        counters, vcpus, vmms = self._arrays["counters"], self._arrays["vcpus"], self._arrays["vmms"]
        open_ = [index for index in self._places("vcpus") if vcpus.word(index, _VCPU.index("number")) & 1]
        ended = pids - {vcpus.word(index, _VCPU.index("pid, tid")) & 0xFFFFFFFF for index in open_}
        for index in self._places("counters"):
            if counters.word(index, _COUNTER.index("pid")) in ended:
                run_program(self._functions["counter_ended"], index)
        updates = self._arrays["updates"]
        for index in self._places("updates"):
            if updates.word(index, _UPDATE.index("pid, kind")) & 0xFFFFFFFF in ended:
                run_program(self._functions["update_ended"], index)
        for index in self._places("vmms"):
            if vmms.word(index, _VMM.index("pid")) in ended:
                vmms.set_word(index, _VMM.index("pid"), 0)


def _call(symbols: Symbols, what: int, caller: int) -> Call:
    """WHAT: `msr` and `how` of struct vcpu."""
    name, function = symbols.caller(caller)
    within = {WITHIN_FILTER_CHANGE: FILTER_CHANGE, WITHIN_RECALC: RECALC}
    how = what >> 32
    return Call(
        msr=what & 0xFFFFFFFF,
        access=_ACCESS.get(how & 3, "none"),
        action="enable" if how & _ENABLES else "disable",
        cause=within.get(how >> 16 & 0xFF) or symbols.vendor.cause_of(function),
        caller=name,
    )


def _durations(value: list[int]) -> Durations:
    """VALUE: the words of a struct update, whose time is that of updates that were seen to return."""
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
