# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's MSR filter: what KVM_X86_SET_MSR_FILTER lets its guest access."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

READ, WRITE = 1, 2  # KVM_MSR_FILTER_READ, KVM_MSR_FILTER_WRITE: as a range's flags have them
#: Each direction of an access, and its name.
DIRECTIONS = {READ: "read", WRITE: "write"}

#: The x2APIC's MSRs, which no filter can deny (kvm_msr_allowed()).
X2APIC = range(0x800, 0x900)

_U32 = 0xFFFFFFFF  # a mask


@dataclass(frozen=True)
class FilterRange:
    """A range of a filter: `flags` of READ and WRITE, `count` MSRs from `base` on, and a bit (1: allowed) for each.

    KVM takes a range that goes on beyond the last MSR, but computes its end with 32 bits: nothing is in it.
    """

    flags: int
    base: int
    count: int
    allowed: bytes

    @cached_property
    def msrs(self) -> range:
        """The MSRs that it decides on."""
        return range(self.base, (self.base + self.count) & _U32)

    def decides(self, msr: int, direction: int) -> bool:
        """Whether an access is in this range."""
        return bool(self.flags & direction) and msr in self.msrs

    def allows(self, msr: int) -> bool:
        """Whether the range's bit for an MSR in it is set."""
        at = msr - self.base
        return bool(self.allowed[at >> 3] >> (at & 7) & 1)

    def denied(self) -> Iterator[range]:
        """The MSRs whose bit is clear, as ranges."""
        bits = ~int.from_bytes(self.allowed, "little") & ((1 << len(self.msrs)) - 1)
        return (range(self.base + run.start, self.base + run.stop) for run in runs(bits))


@dataclass(frozen=True)
class MsrFilter:
    """A filter, as KVM evaluates it: the first range that an access is in decides, else `default_allow`."""

    default_allow: bool = True
    ranges: tuple[FilterRange, ...] = ()

    def allows(self, msr: int, direction: int) -> bool:
        """Whether a guest's access is allowed: kvm_msr_allowed(), arch/x86/kvm/x86.c (7.3: msrs.c)."""
        if msr in X2APIC:
            return True
        for one in self.ranges:
            if one.decides(msr, direction):
                return one.allows(msr)
        return self.default_allow

    @property
    def denies_nothing(self) -> bool:
        """Whether it is as if there were no filter, as far as that is plain to see."""
        return self.default_allow and not self.ranges

    def denied(self, direction: int) -> list[range]:
        """What the ranges deny in a direction, sorted; what the default denies is not in it."""
        return self._denied[direction]

    @cached_property
    def decided(self) -> list[range]:
        """Ranges of MSRs in each of which the filter says the same of all, as long as they do not overlap others."""
        found = [one.msrs for one in self.ranges]
        return found + [run for one in self.ranges for run in one.denied()]

    @cached_property
    def _denied(self) -> dict[int, list[range]]:
        return {direction: self._find_denied(direction) for direction in DIRECTIONS}

    def _find_denied(self, direction: int) -> list[range]:
        found: list[range] = []
        decided = [X2APIC]
        for msrs, one in ((one.msrs, one) for one in self.ranges if one.flags & direction):
            before = [other for other in decided if other.start < msrs.stop and msrs.start < other.stop]
            found += (part for run in one.denied() for part in _without(run, before))
            decided.append(msrs)
        return joined(found)


#: Of a VM without a filter.
NO_FILTER = MsrFilter()


def runs(bits: int) -> Iterator[range]:
    """The runs of bits that are set, lowest first."""
    at = 0
    while bits:
        zeros = (bits & -bits).bit_length() - 1
        bits >>= zeros
        ones = (~bits & (bits + 1)).bit_length() - 1
        yield range(at + zeros, at + zeros + ones)
        at += zeros + ones
        bits >>= ones


def joined(ranges: Iterable[range]) -> list[range]:
    """The same numbers as sorted ranges that neither overlap nor touch."""
    found: list[range] = []
    for one in sorted(ranges, key=lambda r: (r.start, r.stop)):
        if found and one.start <= found[-1].stop:
            found[-1] = range(found[-1].start, max(found[-1].stop, one.stop))
        elif one:
            found.append(one)
    return found


def _without(whole: range, others: list[range]) -> list[range]:
    """What is left of a range."""
    left = [whole]
    for other in others:
        left = [
            part
            for one in left
            for part in (range(one.start, min(one.stop, other.start)), range(max(one.start, other.stop), one.stop))
            if part
        ]
    return left
