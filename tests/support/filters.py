# SPDX-License-Identifier: GPL-2.0-or-later
"""MSR filters for tests: as VMMs give them, and any that KVM takes."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import strategies as st

from tracer.model.msr_filter import READ, WRITE, FilterRange, MsrFilter

BOTH = READ | WRITE
#: Numbers of MSRs near which something begins or ends.
EDGES = (
    0,
    0x48,
    0x7FF,
    0x800,
    0x8FF,
    0x900,
    0x1FFF,
    0x2000,
    0xC0000000,
    0xC0000100,
    0xC0001FFF,
    0xC0010000,
    0xFFFFFFFE,
)


def allowing(base: int, count: int, allowed: Iterable[int] = (), flags: int = BOTH) -> FilterRange:
    """A range that allows the MSRs ALLOWED of it, in whole words as KVM keeps them."""
    bits = sum(1 << msr - base for msr in {*allowed})
    return FilterRange(flags, base, count, bits.to_bytes((count + 63) // 64 * 8, "little"))


def denying(*msrs: int, flags: int = BOTH) -> MsrFilter:
    """What denies these MSRs alone."""
    return MsrFilter(True, tuple(allowing(msr, 1, flags=flags) for msr in msrs))


@st.composite
def _any_range(draw: st.DrawFn) -> FilterRange:
    base = min(max(draw(st.sampled_from(EDGES)) + draw(st.integers(-6, 6)), 0), 0xFFFFFFFF)
    count = draw(st.integers(1, 80))
    words = draw(st.binary(min_size=16, max_size=16))[: (count + 63) // 64 * 8]
    return FilterRange(draw(st.sampled_from([READ, WRITE, BOTH])), base, count, words)


any_filters = st.builds(MsrFilter, st.booleans(), st.lists(_any_range(), max_size=16).map(tuple))
any_msrs = st.builds(lambda edge, off: min(max(edge + off, 0), 0xFFFFFFFF), st.sampled_from(EDGES), st.integers(-8, 90))
