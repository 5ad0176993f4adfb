# SPDX-License-Identifier: GPL-2.0-or-later
"""What is said of MSRs is found range by range, and is what would be found MSR by MSR."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tracer.model.msr_filter import DIRECTIONS, FilterRange, MsrFilter
from tracer.model.state import State, Vcpu, Wish
from tracer.model.svm import SVM
from tracer.model.vendor import Vendor
from tracer.model.vmx import VMX

STARTS = [0, 0x170, 0x7F0, 0x1FF0, 0xBFFFFFF8, 0xC0000080, 0xC0001FF0, 0xFFFFFF00]


@st.composite
def ranges(draw: st.DrawFn) -> FilterRange:
    """A range of up to 200 MSRs about where something changes."""
    base, count = draw(st.sampled_from(STARTS)) + draw(st.integers(0, 40)), draw(st.integers(1, 200))
    bits = draw(st.integers(0, (1 << count) - 1) | st.just(0))
    return FilterRange(draw(st.integers(1, 3)), base, count, bits.to_bytes(-(-count // 64) * 8, "little"))


@given(
    st.sampled_from([VMX, SVM]),
    st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), max_size=20),
    st.builds(MsrFilter, st.booleans(), st.lists(ranges(), max_size=6).map(tuple)),
    st.none() | st.tuples(st.integers(0, 7), st.integers(0, 7)),
    st.booleans(),
)
def test_ranges_say_what_each_msr_of_them_says(
    vendor: Vendor,
    some_bytes: list[tuple[int, int]],
    filter_: MsrFilter,
    shadow: tuple[int, int] | None,
    settled: bool,
) -> None:
    bitmap = bytearray(b"\xff" * vendor.bitmap_geometry.size)
    for at, byte in some_bytes:
        bitmap[at] = byte
    vcpu = Vcpu(0, bytes(bitmap), filter_, shadow, settled=settled, seen=frozenset({(0x555, 1, Wish.PASS)}))
    state = State(vendor, (0x48, 0x174, 0x300))
    found = state.verdicts(vcpu)
    of_each = {msr: verdict for run, verdict in found for msr in run}
    assert all(verdict == state.verdict(vcpu, msr) for msr, verdict in of_each.items())
    touched = {msr for direction in DIRECTIONS for run in filter_.denied(direction) for msr in run}
    touched |= {msr for direction in DIRECTIONS for run in state.passed(vcpu, direction) for msr in run}
    assert set(of_each) == touched | set(state.candidates)
    for (one, said), (other, also) in pairwise(found):
        allowed = [[filter_.allows(run.start, direction) for direction in DIRECTIONS] for run in (one, other)]
        assert one.stop < other.start or (one.stop == other.start and (said, allowed[0]) != (also, allowed[1]))


def test_a_filter_of_the_most_msrs_has_few_ranges() -> None:
    longest = 0x3000
    rows = tuple(FilterRange(3, n * longest, longest, bytes(longest // 8)) for n in range(16))
    vcpu = Vcpu(0, b"\xff" * VMX.bitmap_geometry.size, MsrFilter(True, rows))
    assert len(State(VMX).verdicts(vcpu)) < 1000
