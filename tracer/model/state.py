# SPDX-License-Identifier: GPL-2.0-or-later
"""What every vCPU intercepts at one moment, and who wants that: plain data, and what follows from it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from itertools import pairwise
from typing import Protocol

from tracer.model.msr_filter import DIRECTIONS, NO_FILTER, READ, WRITE, X2APIC, MsrFilter, joined
from tracer.model.nested import L1, L1_OR_UNMERGED, MERGED, NESTED_WORDS, NONE, OWN, PENDING_KVM, UNMERGED, Nested
from tracer.model.snapshot import Call
from tracer.model.vendor import Passable, Vendor
from tracer.model.vendors import FIRST
from tracer.model.vmm_id import pid_of

PASSED, KVM, FILTER, BOTH = "passed", "kvm", "filter", "both"
PENDING_DENIED, PENDING_ALLOWED = "pending_denied", "pending_allowed"
UNRECORDED, UNKNOWN = "unrecorded", "unknown"

#: What is said of an access, and what that means.
SAID = {
    PASSED: "passed through: the guest has the MSR itself",
    KVM: "intercepted since KVM itself wants that",
    FILTER: "intercepted since the VM's filter denies it; KVM would pass it through",
    BOTH: "intercepted since KVM wants that, and the filter denies it, too",
    PENDING_DENIED: "the filter denies it, but this is not yet applied to the vCPU: accesses still pass",
    PENDING_ALLOWED: "the filter allows it, but this is not yet applied to the vCPU: accesses still exit",
    UNRECORDED: "intercepted; this kernel does not record whether KVM itself wants that",
    UNKNOWN: "what this vCPU intercepts, or its filter, cannot be read",
}
#: The same, and what is said of nested guests, as it is in tables.
WORDS = {
    PASSED: "passed",
    KVM: "kvm",
    FILTER: "filter",
    BOTH: "both",
    PENDING_DENIED: "pending deny",
    PENDING_ALLOWED: "pending allow",
    UNRECORDED: "unrecorded",
    UNKNOWN: "unknown",
    **NESTED_WORDS,
}


def does_exit(said: str) -> bool | None:
    """Whether an access of which this is said exits now; None if that is unknown."""
    return None if said == UNKNOWN else said not in (PASSED, PENDING_DENIED, PENDING_KVM)


class Wish(Enum):
    """What KVM itself wants of an access, and how that is known."""

    INTERCEPT = "intercept"
    PASS = "pass"
    #: It is in no record; KVM of every kernel read passes it.
    PRESUMED_PASS = "presumed pass"
    UNRECORDED = "unrecorded"


def interception(*, intercepted: bool, wish: Wish, allowed: bool, settled: bool) -> str:
    """Who has an access intercepted: one of SAID.

    :param intercepted: the bit in the vCPU's bitmap
    :param allowed: by the VM's filter
    :param settled: the bitmap is what KVM computes of the filter: it does not change, and is not to be computed anew
    """
    if not intercepted:
        return PASSED if allowed else PENDING_DENIED
    if not allowed:
        return {Wish.INTERCEPT: BOTH, Wish.UNRECORDED: UNRECORDED}.get(wish, FILTER)
    if wish is Wish.INTERCEPT or (settled and wish is not Wish.PASS):
        return KVM  # where nothing is recorded, the bit itself says what KVM wanted when it last computed it
    return UNRECORDED if wish is Wish.UNRECORDED else PENDING_ALLOWED


def nested_interception(
    *, intercepted: bool, own: str, own_intercepted: bool, allowed: bool, merged: bool | None, settled: bool
) -> str:
    """Who has an access by a nested guest (L2) intercepted: one of SAID or NESTED_SAID.

    :param intercepted: the bit in the bitmap that the CPU takes while L2 runs
    :param own: what is said of the access by the vCPU's own guest (L1); `own_intercepted`: the bit for that
    :param allowed: by the VM's filter
    :param merged: see Passable
    :param settled: see Nested
    """
    if not intercepted:
        if not allowed:
            return PENDING_DENIED
        return PENDING_KVM if own == KVM else PASSED
    if own_intercepted:
        return own
    if merged is None:
        return L1_OR_UNMERGED
    if not merged:
        return UNMERGED
    return L1 if settled else L1_OR_UNMERGED


@dataclass(frozen=True)
class Vcpu:
    """A vCPU. `bitmap` is None where it cannot be read, b"" where the CPU has none; `filter` is its VM's.

    `shadow`: what KVM wants to intercept of `State.recorded`, a word for reads and one for writes, in which a 1 is for
    that; None where the kernel does not record it. `settled`: see `interception`. `ran`: None where that is not known.
    `nested`: None unless its guest may have guests, or where that is not known.
    """

    id: int
    bitmap: bytes | None
    filter: MsrFilter | None = NO_FILTER
    shadow: tuple[int, int] | None = None
    settled: bool = True
    ran: bool | None = None
    nested: Nested | None = None
    #: What KVM wants of accesses, as its calls for this vCPU said.
    seen: frozenset[tuple[int, int, Wish]] = frozenset()
    #: What tells vCPUs apart while they live: the address of struct kvm_vcpu.
    key: int = field(default=0, compare=False)

    @property
    def any_id(self) -> Vcpu:
        """It with an id that is no vCPU's: to compare what is said of vCPUs."""
        return replace(self, id=-1)


@dataclass(frozen=True)
class Vm:
    """A VM of process `pid`, in the order of its vCPUs' ids. `key` tells VMs of one process apart.

    Unless it is `owned`, the process did not make the VM, and only has a descriptor: KVM does not let it run a vCPU.
    `kind` is the name of a kind of VM whose bitmaps are not KVM's. `uuid` as in VmInfo.
    """

    pid: int
    key: int
    vcpus: tuple[Vcpu, ...]
    owned: bool = True
    kind: str = ""
    name: str = ""
    uuid: str = ""

    @property
    def filter(self) -> MsrFilter | None:
        """The filter, as it was read last."""
        return self.vcpus[-1].filter


@dataclass(frozen=True)
class Verdict:
    """What is said of reading and of writing an MSR; `nested`: by the guests of a guest, where that is known."""

    read: str
    write: str
    nested: Verdict | None = None

    def of(self, direction: int) -> str:
        """Of a direction."""
        return self.read if direction == READ else self.write


@dataclass(frozen=True)
class State:
    """All VMs of a host. `recorded` are the MSRs of which the kernel records what KVM wants.

    `notes` say what could not be had.
    """

    vendor: Vendor = FIRST
    recorded: tuple[int, ...] = ()
    vms: tuple[Vm, ...] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def _place(self) -> dict[int, int]:
        return {msr: at for at, msr in enumerate(self.recorded)}

    @cached_property
    def passable(self) -> dict[tuple[int, int], Passable]:
        """Each MSR and direction that KVM may let a guest access itself."""
        found: dict[tuple[int, int], Passable] = {}
        for one in self.vendor.passable:
            for direction in (READ, WRITE):
                if one.flags & direction:
                    found |= {(msr, direction): one for msr in one.msrs}
        return found

    @cached_property
    def candidates(self) -> tuple[int, ...]:
        """The MSRs that KVM of this kernel may pass through, in the order of their numbers; without x2APIC's."""
        others = {msr for (msr, _), one in self.passable.items() if one.unlisted or not self.recorded}
        return tuple(sorted({*self.recorded, *others} - {*X2APIC}))

    def wish(self, vcpu: Vcpu, msr: int, direction: int) -> Wish:
        """What KVM itself wants of an access."""
        if vcpu.bitmap == b"" or self.vendor.bitmap_geometry.place(msr, direction) is None:
            return Wish.INTERCEPT
        at, passable = self._place.get(msr), self.passable.get((msr, direction))
        if vcpu.shadow and at is not None and not vcpu.shadow[direction == WRITE] >> at & 1:
            return Wish.PASS
        for wish in (Wish.PASS, Wish.INTERCEPT):
            if (msr, direction, wish) in vcpu.seen:
                return wish
        if passable is None or (vcpu.shadow and not passable.unlisted):
            return Wish.INTERCEPT
        return Wish.PRESUMED_PASS if passable.always else Wish.UNRECORDED

    def verdict(self, vcpu: Vcpu, msr: int) -> Verdict:
        """What is said of an MSR: each one of SAID, for nested guests also of NESTED_SAID."""
        return self._reasoned(vcpu, msr)[0]

    def _reasoned(self, vcpu: Vcpu, msr: int) -> tuple[Verdict, list[bool | None]]:
        """What is said of an MSR, and whether the filter allows reading and writing it, if that is known."""
        allowed = [vcpu.filter.allows(msr, direction) if vcpu.filter else None for direction in DIRECTIONS]
        read, write = (self._interception(vcpu, msr, *pair) for pair in zip(DIRECTIONS, allowed, strict=True))
        said = Verdict(read, write)
        if vcpu.nested and vcpu.nested.use in (MERGED, OWN, NONE):
            read, write = (
                self._nested(vcpu, vcpu.nested, msr, direction, said.of(direction), yes is not False)
                for direction, yes in zip(DIRECTIONS, allowed, strict=True)
            )
            said = replace(said, nested=Verdict(read, write))
        return said, allowed

    def _interception(self, vcpu: Vcpu, msr: int, direction: int, allowed: bool | None) -> str:
        if vcpu.bitmap is None:
            return UNKNOWN
        intercepted = self.vendor.bitmap_geometry.intercepted(vcpu.bitmap, msr, direction)
        if allowed is None:
            return UNKNOWN if intercepted else PASSED
        wish = self.wish(vcpu, msr, direction)
        return interception(intercepted=intercepted, wish=wish, allowed=allowed, settled=vcpu.settled)

    def _nested(  # noqa: PLR0917
        self, vcpu: Vcpu, nested: Nested, msr: int, direction: int, own: str, allowed: bool
    ) -> str:
        """What is said of an access by a nested guest, if OWN is said of one by the vCPU's guest."""
        geometry = self.vendor.bitmap_geometry
        if nested.use == OWN:
            return own
        own_intercepted = geometry.intercepted(vcpu.bitmap or b"", msr, direction)
        if nested.use == NONE:
            return own if own_intercepted else L1
        intercepted = geometry.intercepted(nested.bitmap or b"", msr, direction)
        if msr in X2APIC and not intercepted:
            return PASSED  # to the virtual APIC that L1 gives it, which has nothing to do with the vCPU's own
        passable = self.passable.get((msr, direction))
        return nested_interception(
            intercepted=intercepted,
            own=own,
            own_intercepted=own_intercepted,
            allowed=allowed,
            merged=passable.merged if passable else None,
            settled=nested.settled and vcpu.settled,
        )

    def passed(self, vcpu: Vcpu, direction: int) -> list[range]:
        """The MSRs that the bitmap lets pass."""
        return self._passed(vcpu.bitmap, direction)

    def nested_passed(self, vcpu: Vcpu, direction: int) -> list[range]:
        """The MSRs that the bitmap for nested guests lets pass."""
        return self._passed(vcpu.nested.bitmap if vcpu.nested else None, direction)

    def _passed(self, bitmap: bytes | None, direction: int) -> list[range]:
        found = self.vendor.bitmap_geometry.passed(bitmap or b"", direction)
        return joined(range(msr, msr + 1) for msr in found)

    def _all_passed(self, vcpu: Vcpu) -> list[range]:
        """The MSRs that either bitmap lets pass, in either direction."""
        passed = (self.passed, self.nested_passed)
        return [run for one in passed for direction in DIRECTIONS for run in one(vcpu, direction)]

    def _edges(self, vcpu: Vcpu) -> list[int]:
        """Where, in the order of MSRs, something else may be said than of the MSR before; sorted."""
        msrs = {*self._place, *(msr for msr, _ in self.passable), *(msr for msr, _, _ in vcpu.seen)}
        runs = [range(msr, msr + 1) for msr in msrs] + [X2APIC, *self.vendor.bitmap_geometry.ranges]
        runs += self._all_passed(vcpu)
        if vcpu.filter:
            runs += vcpu.filter.decided
        return sorted({edge for run in runs for edge in (run.start, run.stop)})

    def verdicts(self, vcpu: Vcpu, also: Iterable[int] = ()) -> list[tuple[range, Verdict]]:
        """What is said of every MSR that may be passed through, is, or is denied by a range of the filter, and `also`.

        MSRs that follow each other and of which the same is said, for the same reason, are together.
        """
        ranges = [range(msr, msr + 1) for msr in (*self.candidates, *also)]
        ranges += self._all_passed(vcpu)
        if vcpu.filter:
            ranges += [run for direction in DIRECTIONS for run in vcpu.filter.denied(direction)]
        edges = self._edges(vcpu)
        found: list[tuple[range, Verdict]] = []
        before: object = None
        for run in joined(ranges):
            cuts = edges[bisect_right(edges, run.start) : bisect_left(edges, run.stop)]
            for start, stop in pairwise([run.start, *cuts, run.stop]):
                reasoned = self._reasoned(vcpu, start)
                if found and found[-1][0].stop == start and reasoned == before:
                    found[-1] = range(found[-1][0].start, stop), reasoned[0]
                else:
                    found.append((range(start, stop), reasoned[0]))
                before = reasoned
        return found


class Named(Protocol):
    """A VM with what it is called."""

    @property
    def name(self) -> str:
        """Its name; VMs of a host may share it."""

    @property
    def uuid(self) -> str:
        """Its UUID, in lower case; "" where it has none."""


def is_called(vm: Named, names: Collection[str]) -> bool:
    """Whether one of these is the VM's name or its UUID."""
    return any(given == vm.name or (vm.uuid and given.lower() == vm.uuid) for given in names)


def of(state: State, names: Collection[str] = (), pid: int | None = None) -> State:
    """The state of the VMs that are called by one of these names and are of this process, or all where none is given.

    Names as in `is_called`.
    """
    vms = (vm for vm in state.vms if pid in (None, vm.pid))
    return replace(state, vms=tuple(vm for vm in vms if not names or is_called(vm, names)))


def seen_wishes(calls: Iterable[Call], pid: int | None = None) -> frozenset[tuple[int, int, Wish]]:
    """What KVM wants of each access of which all its calls, of the vCPUs of process `pid` (None: of any), say the same.

    For kernels whose calls say what KVM wants, whatever the filter says: {vmx,svm}_set_intercept_for_msr(), 6.17+.
    """
    found: dict[tuple[int, int], set[Wish]] = {}
    for call in (one for one in calls if pid in (None, pid_of(one.pid))):
        for direction, name in DIRECTIONS.items():
            if call.access in (name, "read_write"):
                wish = Wish.INTERCEPT if call.action == "enable" else Wish.PASS
                found.setdefault((call.msr, direction), set()).add(wish)
    return frozenset((*access, *wishes) for access, wishes in found.items() if len(wishes) == 1)  # type: ignore[misc]


def alike(vm: Vm) -> list[tuple[Vcpu, ...]]:
    """The vCPUs of a VM, those together of which all but the id is the same."""
    found: dict[Vcpu, list[Vcpu]] = {}
    for vcpu in vm.vcpus:
        found.setdefault(vcpu.any_id, []).append(vcpu)
    return [tuple(vcpus) for vcpus in found.values()]
