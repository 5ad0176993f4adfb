# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM's MSR filter allows, as kvm_msr_allowed() of arch/x86/kvm/x86.c has it."""

from __future__ import annotations

import itertools

import pytest
from filters import BOTH, EDGES, allowing, any_filters, any_msrs, denying
from hypothesis import given
from hypothesis import strategies as st

from tracer.model.msr_filter import NO_FILTER, READ, WRITE, FilterRange, MsrFilter, joined, runs


def kvm_msr_allowed(one: MsrFilter, index: int, type_: int) -> bool:
    """The kernel's function, line by line, with its u32 arithmetic."""
    if 0x800 <= index <= 0x8FF:
        return True
    for part in one.ranges:
        start, end = part.base, (part.base + part.count) % (1 << 32)
        if index >= start and index < end and part.flags & type_:
            return bool(int.from_bytes(part.allowed, "little") >> index - start & 1)
    return one.default_allow


@given(any_filters, any_msrs, st.sampled_from([READ, WRITE]))
def test_it_allows_what_the_kernel_allows(one: MsrFilter, msr: int, direction: int) -> None:
    assert one.allows(msr, direction) == kvm_msr_allowed(one, msr, direction)


@given(any_filters, st.sampled_from([READ, WRITE]))
def test_denied_is_what_a_range_denies(one: MsrFilter, direction: int) -> None:
    """With a default that allows, that is all that is denied; the ranges are sorted and apart."""
    ranges = MsrFilter(True, one.ranges)
    denied = ranges.denied(direction)
    msrs = {msr for run in denied for msr in run}
    near = {min(max(edge + off, 0), 0xFFFFFFFF) for edge in EDGES for off in range(-8, 90)}
    assert {msr for msr in near if not kvm_msr_allowed(ranges, msr, direction)} == msrs
    assert all(one.stop < other.start for one, other in itertools.pairwise(denied))
    assert one.denied(direction) == denied


def test_without_a_filter_everything_is_allowed() -> None:
    assert NO_FILTER.denies_nothing
    assert NO_FILTER.allows(0x10, READ)
    assert NO_FILTER.denied(READ) == []


def test_the_default_decides_what_no_range_does() -> None:
    one = MsrFilter(False, (allowing(0x10, 1, [0x10]),))
    assert [one.allows(msr, READ) for msr in (0xF, 0x10, 0x11, 0xC0000080)] == [False, True, False, False]
    assert one.denied(READ) == []
    assert not one.denies_nothing
    assert not MsrFilter(False).denies_nothing


def test_no_filter_denies_the_x2apic() -> None:
    one = MsrFilter(False, (allowing(0x7FF, 0x102),))
    assert [one.allows(msr, WRITE) for msr in (0x7FF, 0x800, 0x8FF, 0x900)] == [False, True, True, False]
    assert one.denied(WRITE) == [range(0x7FF, 0x800), range(0x900, 0x901)]


def test_the_first_range_decides() -> None:
    narrow, wide = allowing(0x20, 4, [0x21]), allowing(0x10, 0x20, [0x22, 0x24])
    assert [MsrFilter(True, (narrow, wide)).allows(msr, READ) for msr in (0x20, 0x21, 0x22, 0x24)] == [
        False,
        True,
        False,
        True,
    ]
    assert [MsrFilter(True, (wide, narrow)).allows(msr, READ) for msr in (0x20, 0x21, 0x22, 0x24)] == [
        False,
        False,
        True,
        True,
    ]


def test_a_range_is_for_the_directions_of_its_flags() -> None:
    one = MsrFilter(True, (allowing(0x48, 1, flags=WRITE), allowing(0x48, 2, [0x48])))
    assert (one.allows(0x48, READ), one.allows(0x48, WRITE)) == (True, False)
    assert (one.denied(READ), one.denied(WRITE)) == ([range(0x49, 0x4A)], [range(0x48, 0x4A)])


def test_bits_beyond_its_end_are_not_of_a_range() -> None:
    """The kernel keeps whole words: 61 of 64 bits are not used here."""
    one = MsrFilter(True, (FilterRange(BOTH, 0x10, 3, bytes(8)),))
    assert one.denied(READ) == [range(0x10, 0x13)]
    assert one.allows(0x13, READ)


@pytest.mark.parametrize(("count", "denied"), [(1, [range(0xFFFFFFFE, 0xFFFFFFFF)]), (2, []), (9, [])])
def test_nothing_is_in_a_range_whose_end_is_beyond_32_bits(count: int, denied: list[range]) -> None:
    one = MsrFilter(True, (allowing(0xFFFFFFFE, count),))
    assert one.denied(READ) == denied
    assert one.allows(0xFFFFFFFE, READ) == (not denied)
    assert one.allows(0, READ)


def test_a_filter_of_sixteen_ranges() -> None:
    one = denying(*range(0x100, 0x120, 2))
    assert len(one.ranges) == 16
    assert one.denied(WRITE) == [range(msr, msr + 1) for msr in range(0x100, 0x120, 2)]
    assert one.allows(0x11F, READ)


@given(st.integers(0, 1 << 200))
def test_runs_of_bits(bits: int) -> None:
    found = list(runs(bits))
    assert sum(1 << bit for run in found for bit in run) == bits
    assert all(one.stop < other.start for one, other in itertools.pairwise(found))


@given(st.lists(st.builds(lambda a, b: range(a, a + b), st.integers(0, 50), st.integers(0, 9))))
def test_joined_ranges_have_the_same_numbers(ranges: list[range]) -> None:
    found = joined(ranges)
    assert [number for run in found for number in run] == sorted({number for one in ranges for number in one})
    assert all(one.stop < other.start for one, other in itertools.pairwise(found))
