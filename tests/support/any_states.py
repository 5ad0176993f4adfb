# SPDX-License-Identifier: GPL-2.0-or-later
"""Any state that can be read from a file."""

from __future__ import annotations

from hypothesis import strategies as st
from msgspec import UNSET

from tracer.model.nested import NESTED_SAID, USES
from tracer.model.state import SAID
from tracer.report.state_file import (
    AccessRow,
    Filter,
    FilterRangeRow,
    NestedAccess,
    NestedGuests,
    Passed,
    States,
    VcpuGroup,
    VmState,
)

#: Numbers that are near each other, or where something begins: ranges meet, overlap, and may end before they begin.
_msrs = st.one_of(
    st.sampled_from([0x10, 0x48, 0x174, 0x7FF, 0x800, 0x8FF, 0x900, 0xC0000100, 0xC0000101, 0xFFFFFFFF]),
    st.integers(0, 0x20),
)
_ranges = st.one_of(_msrs.map("{:#x}".format), st.builds(lambda first, last: f"{first:#x}-{last:#x}", _msrs, _msrs))
_said = st.sampled_from([*SAID])
_nested_said = st.sampled_from([*SAID, *NESTED_SAID])


def any_states(names: st.SearchStrategy[str]) -> st.SearchStrategy[States]:
    """States whose texts are these."""
    rows = st.builds(
        AccessRow,
        msrs=_ranges,
        name=names,
        read=_said,
        write=_said,
        in_filter=st.booleans(),
        nested=st.one_of(st.just(UNSET), st.builds(NestedAccess, read=_nested_said, write=_nested_said)),
    )
    passed = st.one_of(st.none(), st.builds(Passed, read=st.lists(_ranges, max_size=2), write=st.just([])))
    nested = st.builds(
        NestedGuests,
        bitmap=st.sampled_from([*USES]),
        settled=st.booleans(),
        running=st.one_of(st.none(), st.lists(st.integers(0, 5), max_size=2)),
        passed=passed,
    )
    groups = st.builds(
        VcpuGroup,
        ids=st.lists(st.integers(0, 5), max_size=4),
        ran=st.sampled_from([True, False, None]),
        settled=st.booleans(),
        passed=passed,
        msrs=st.lists(rows, max_size=5),
        nested=st.one_of(st.none(), nested),
    )
    ranges = st.builds(
        FilterRangeRow,
        msrs=_ranges,
        access=st.sampled_from(["read", "write", "read_write", "none"]),
        denied=st.lists(_ranges, max_size=2),
    )
    filters = st.builds(Filter, default=st.sampled_from(["allow", "deny"]), ranges=st.lists(ranges, max_size=3))
    vms = st.builds(
        VmState,
        pid=st.integers(0, 3),
        name=names,
        uuid=st.sampled_from(["", "a", "b"]),
        owned=st.booleans(),
        kind=st.one_of(st.just(""), names),
        filter=st.one_of(st.none(), filters),
        vcpus=st.lists(groups, max_size=3),
    )
    return st.builds(States, vms=st.lists(vms, max_size=3), notes=st.lists(names, max_size=2))
