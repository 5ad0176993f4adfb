# SPDX-License-Identifier: GPL-2.0-or-later
"""The counts at one moment, as plain data: all that the engine produces and that views show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import TypeVar

from tracer.model.exits import Exit
from tracer.model.vendors import FIRST, vendor_named

#: Upper bounds of the buckets of an update's duration, in seconds; bpf/msrtrace.c counts in powers of two.
DURATION_BOUNDS = tuple((64 << i) * 1e-9 for i in range(1, 25))


@dataclass(frozen=True)
class Call:
    """A kind of call. `pid` is the VMM (vmm_id.py), or 0 where counts are not broken down by VM."""

    msr: int
    access: str  # read, write or read_write
    action: str  # enable, disable, disable_read or disable_write
    cause: str
    caller: str  # the function that called, as /proc/kallsyms has it
    pid: int = 0


@dataclass(frozen=True)
class Outcome:
    """How many calls, and how many with which outcome. All but `calls` are None where outcomes cannot be read."""

    calls: int
    redundant: int | None = None
    changed_read: int | None = None
    changed_write: int | None = None
    refused: int | None = None

    def __add__(self, other: Outcome) -> Outcome:
        return self._with(other, 1)

    def __sub__(self, other: Outcome) -> Outcome:
        return self._with(other, -1)

    def _with(self, other: Outcome, sign: int) -> Outcome:
        def both(mine: int | None, others: int | None) -> int | None:
            return None if mine is None or others is None else mine + sign * others

        return Outcome(
            self.calls + sign * other.calls,
            both(self.redundant, other.redundant),
            both(self.changed_read, other.changed_read),
            both(self.changed_write, other.changed_write),
            both(self.refused, other.refused),
        )


@dataclass(frozen=True)
class Durations:
    """Updates that began, and how long those took whose end was seen: `timed` of them.

    `buckets[i]` counts those up to the i-th of DURATION_BOUNDS, the last bucket all longer ones.

    `seconds` is rounded to whole nanoseconds, also in sums, so that these do not depend on the order of addition:
    otherwise a counter could go backwards.
    """

    count: int = 0
    seconds: float = 0.0
    buckets: tuple[int, ...] = (0,) * (len(DURATION_BOUNDS) + 1)

    def __add__(self, other: Durations) -> Durations:
        buckets = tuple(a + b for a, b in zip(self.buckets, other.buckets, strict=True))
        return Durations(self.count + other.count, _nanoseconds(self.seconds + other.seconds), buckets)

    def __sub__(self, other: Durations) -> Durations:
        buckets = tuple(a - b for a, b in zip(self.buckets, other.buckets, strict=True))
        return Durations(self.count - other.count, _nanoseconds(self.seconds - other.seconds), buckets)

    @property
    def timed(self) -> int:
        """How many updates `seconds` covers."""
        return sum(self.buckets)

    def cumulative(self) -> list[tuple[float, int]]:
        """Pairs of an upper bound in seconds and how many updates took at most that long; the last is infinity."""
        return list(zip((*DURATION_BOUNDS, float("inf")), accumulate(self.buckets), strict=True))


def _nanoseconds(seconds: float) -> float:
    """The time rounded to whole nanoseconds, still in seconds."""
    return round(seconds * 1e9) / 1e9


_K = TypeVar("_K")
_V = TypeVar("_V", Outcome, Durations, int)


def _sums(pairs: Iterable[tuple[_K, _V]]) -> dict[_K, _V]:
    result: dict[_K, _V] = {}
    for key, value in pairs:
        result[key] = result[key] + value if key in result else value
    return result


def _merged(one: Mapping[_K, _V], other: Mapping[_K, _V]) -> dict[_K, _V]:
    return _sums(chain(one.items(), other.items()))


def _new(later: Mapping[Exit, int] | None, earlier: Mapping[Exit, int]) -> Mapping[Exit, int] | None:
    return later and {kind: count for kind, count in _subtracted(later, earlier).items() if count}


def _subtracted(later: Mapping[_K, _V], earlier: Mapping[_K, _V]) -> dict[_K, _V]:
    return {key: value - earlier[key] if key in earlier else value for key, value in later.items()}


@dataclass(frozen=True)
class Probe:
    """One function to probe. `symbol` is the symbol that is probed, if any; `detail` says where, or why not."""

    function: str
    symbol: str | None
    attached: bool
    detail: str
    missed: int = 0  # runs of the function that the probes did not see from entry to return


@dataclass(frozen=True)
class Map:
    """A BPF map of the tracer; `dropped` updates found it full."""

    name: str
    entries: int
    capacity: int
    dropped: int = 0


@dataclass(frozen=True)
class VmInfo:
    """What a VM is called, by its VMM's command line: all are safe to print, and "" where unknown.

    `uuid` is in lower case, with hyphens; `vmm` is the program that runs the VM, such as qemu.
    """

    name: str
    uuid: str = ""
    vmm: str = ""


@dataclass(frozen=True)
class Snapshot:
    """Counts since the tracer was attached, and what limits their accuracy.

    `updates` are filter changes applied by a vCPU, `recalcs` recomputations of a bitmap for any other reason; both are
    keyed by the VMM (vmm_id.py), 0 where counts are not broken down by VM. `vms` has those that still run. `exits` is
    None where exits are not counted.
    """

    layout: str
    redundancy: str = "exact"  # or "unknown"
    backend: str = "kprobe"
    calls: Mapping[Call, Outcome] = field(default_factory=dict)
    updates: Mapping[int, Durations] = field(default_factory=dict)
    recalcs: Mapping[int, Durations] = field(default_factory=dict)
    exits: Mapping[Exit, int] | None = None
    probes: tuple[Probe, ...] = ()
    maps: tuple[Map, ...] = ()
    unpaired_returns: int = 0
    unpaired_refusals: int = 0  # of accesses whose exit was not seen
    read_failures: int = 0
    open_calls: int = 0  # in progress when this was taken: not counted yet
    open_exits: int = 0
    blind_seconds: float = 0.0  # in which the kernel's probes were switched off, at most
    uncounted: tuple[str, ...] = ()  # what is known not to be counted, a phrase each
    vendor: str = FIRST.name
    vcpus_seen: int = 0
    vmms_seen: int = 0
    vcpus_created: int = 0  # followed from beginning to end
    creation_recalcs: int = 0  # those of `recalcs` that the creation of a vCPU asked for
    module_unloads: int = 0
    calls_observable: bool = True  # False: that no call was seen does not mean that none was made
    updates_observable: bool = True
    creations_observable: bool = True
    by_vm: bool = False
    vms: Mapping[int, VmInfo] = field(default_factory=dict)
    commands: Mapping[int, str] = field(default_factory=dict)  # of VMMs, at the creation of their first vCPU

    @property
    def lower_bound(self) -> bool:
        """Whether something was lost, so that the true counts may be higher."""
        lost = self.unpaired_returns + self.unpaired_refusals + self.read_failures + self.blind_seconds
        lost += len(self.uncounted)
        return bool(lost + sum(m.dropped for m in self.maps) + sum(p.missed for p in self.probes))

    @property
    def recalcs_observable(self) -> bool:
        """Whether `recalcs` is counted: recalculations for other reasons exist, and can be told from filter updates."""
        layout = vendor_named(self.vendor).layout(self.layout)
        return self.updates_observable and bool(layout and layout.filter_set)

    @property
    def pids(self) -> set[int]:
        """The VMMs that anything was counted for; 0 where counts are not broken down by VM."""
        kinds: Iterable[Call | Exit] = chain(self.calls, self.exits or ())
        return {kind.pid for kind in kinds} | self.updates.keys() | self.recalcs.keys()

    def after(self, earlier: Snapshot) -> Snapshot:
        """This snapshot plus the counts of `earlier`, from a previous attachment of the same tracer."""
        missed = {p.function: p.missed for p in earlier.probes}
        dropped = {m.name: m.dropped for m in earlier.maps}
        probes = [replace(p, missed=p.missed + missed.pop(p.function, 0)) for p in self.probes]
        probes += [replace(p, attached=False) for p in earlier.probes if p.function in missed]
        maps = [replace(m, dropped=m.dropped + dropped.pop(m.name, 0)) for m in self.maps]
        maps += [replace(m, entries=0) for m in earlier.maps if m.name in dropped]
        return replace(
            self,
            calls=_merged(earlier.calls, self.calls),
            updates=_merged(earlier.updates, self.updates),
            recalcs=_merged(earlier.recalcs, self.recalcs),
            exits=None if self.exits is earlier.exits is None else _merged(earlier.exits or {}, self.exits or {}),
            probes=tuple(probes),
            maps=tuple(maps),
            unpaired_returns=self.unpaired_returns + earlier.unpaired_returns,
            unpaired_refusals=self.unpaired_refusals + earlier.unpaired_refusals,
            read_failures=self.read_failures + earlier.read_failures,
            uncounted=tuple(dict.fromkeys((*earlier.uncounted, *self.uncounted))),
            vcpus_seen=self.vcpus_seen + earlier.vcpus_seen,
            vmms_seen=self.vmms_seen + earlier.vmms_seen,
            vcpus_created=self.vcpus_created + earlier.vcpus_created,
            creation_recalcs=self.creation_recalcs + earlier.creation_recalcs,
            creations_observable=self.creations_observable and earlier.creations_observable,
            commands={**earlier.commands, **self.commands},
            module_unloads=self.module_unloads + earlier.module_unloads,
        )

    def since(self, earlier: Snapshot) -> Snapshot:
        """What was counted between `earlier` and this snapshot of the same tracer."""
        missed = {p.function: p.missed for p in earlier.probes}
        dropped = {m.name: m.dropped for m in earlier.maps}
        return replace(
            self,
            calls={k: v for k, v in _subtracted(self.calls, earlier.calls).items() if v.calls},
            updates={k: v for k, v in _subtracted(self.updates, earlier.updates).items() if v.count},
            recalcs={k: v for k, v in _subtracted(self.recalcs, earlier.recalcs).items() if v.count},
            exits=_new(self.exits, earlier.exits or {}),
            probes=tuple(replace(p, missed=p.missed - missed.get(p.function, 0)) for p in self.probes),
            maps=tuple(replace(m, dropped=m.dropped - dropped.get(m.name, 0)) for m in self.maps),
            unpaired_returns=self.unpaired_returns - earlier.unpaired_returns,
            unpaired_refusals=self.unpaired_refusals - earlier.unpaired_refusals,
            read_failures=self.read_failures - earlier.read_failures,
            blind_seconds=self.blind_seconds - earlier.blind_seconds,
            vcpus_seen=self.vcpus_seen - earlier.vcpus_seen,
            vmms_seen=self.vmms_seen - earlier.vmms_seen,
            vcpus_created=self.vcpus_created - earlier.vcpus_created,
            creation_recalcs=self.creation_recalcs - earlier.creation_recalcs,
            module_unloads=self.module_unloads - earlier.module_unloads,
        )

    def without_vms(self, pids: set[int]) -> Snapshot:
        """The same counts, with those of `pids` merged under pid 0: they stay in every total."""

        def folded(durations: Mapping[int, Durations]) -> dict[int, Durations]:
            return _sums((0 if pid in pids else pid, value) for pid, value in durations.items())

        calls = _sums((replace(c, pid=0) if c.pid in pids else c, outcome) for c, outcome in self.calls.items())
        exits = self.exits and _sums((replace(e, pid=0) if e.pid in pids else e, n) for e, n in self.exits.items())
        vms = {pid: vm for pid, vm in self.vms.items() if pid not in pids}
        updates, recalcs = folded(self.updates), folded(self.recalcs)
        return replace(self, calls=calls, exits=exits, updates=updates, recalcs=recalcs, vms=vms)
