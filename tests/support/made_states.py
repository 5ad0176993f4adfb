# SPDX-License-Identifier: GPL-2.0-or-later
"""Files on states: of hosts with some VMs, and any that can be read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from filters import allowing, denying
from hypothesis import strategies as st
from made import AMD_HOST, HOST, STARTED, counts, names
from msgspec import UNSET
from vcpus import FS_BASE, GS_BASE, PERFCTR0, SPEC_CTRL, TSC, bitmap, rw, state, vcpu

from tracer.model.msr_filter import MsrFilter
from tracer.model.nested import NESTED_SAID, USES
from tracer.model.state import SAID, State, Vcpu, Vm
from tracer.model.svm import SVM
from tracer.report.computer import Computer
from tracer.report.formats import OF_STATES, write_state
from tracer.report.state_file import (
    AccessRow,
    Filter,
    FilterRangeRow,
    NestedAccess,
    NestedGuests,
    Passed,
    StateFile,
    VcpuGroup,
    VmState,
)
from tracer.report.state_making import make_state
from tracer.report.state_view import RowChoice

USUALLY = RowChoice()
SYSCALLS = rw(FS_BASE, GS_BASE, 0xC0000102, 0x174, 0x175, 0x176)
#: What KVM passes through on Intel from a vCPU's first entry on.
USUAL = SYSCALLS | {(TSC, 1)}
PMU = MsrFilter(True, (allowing(PERFCTR0, 8), allowing(FS_BASE, 1), allowing(0x10, 0x100, range(0x10, 0x110, 2))))


def same(*ids: int, one: Vcpu) -> tuple[Vcpu, ...]:
    """vCPUs of which all but the id is the same."""
    return tuple(replace(one, id=number) for number in ids)


def old_host() -> State:
    """An Intel host of 6.12: two VMs that are alike, one with a filter."""
    plain = vcpu(USUAL, wished=USUAL)
    filtered = vcpu(USUAL - rw(FS_BASE), PMU, wished=USUAL)
    return state(
        Vm(812, 1, same(0, 1, 2, 3, one=plain), name="web-01"),
        Vm(844, 2, same(0, 1, 2, 3, one=plain), name="web-02"),
        Vm(901, 3, same(0, 1, one=filtered), name="guarded"),
        recording=True,
    )


def new_host() -> State:
    """An Intel host of 6.18, with a vCPU that never ran, TDX, and a VM whose process is gone."""
    denied = denying(FS_BASE, SPEC_CTRL)
    tdx = Vcpu(0, None)
    return state(
        Vm(
            812,
            1,
            (vcpu(USUAL - rw(FS_BASE), denied), vcpu((), denied, id=1, settled=False, ran=False)),
            name="guarded",
        ),
        Vm(900, 2, (tdx,), kind="TDX", name="secret"),
        Vm(950, 3, (vcpu(USUAL),), owned=False),
    )


def amd_host() -> State:
    """An AMD host without BTF of its module."""
    note = "bitmaps cannot be read, so who intercepts what is unknown: /sys/kernel/btf has nothing of kvm_amd"
    return state(Vm(812, 1, (Vcpu(0, None, denying(FS_BASE)),), name="web-01"), vendor=SVM, notes=(note,))


def made(found: State, also: tuple[int, ...] = ()) -> StateFile:
    """The file on a state."""
    host = AMD_HOST if found.vendor is SVM else HOST
    return make_state(found, host, taken=STARTED, version="0.1.0", also=also)


def text(found: State, shown: RowChoice = USUALLY, columns: int = 80, also: tuple[int, ...] = ()) -> str:
    """The state as text."""
    return write_state(made(found, also), shown, "text", columns).decode()


def rows_shown(found: State, shown: RowChoice = USUALLY, also: tuple[int, ...] = ()) -> dict[str, list[str]]:
    """The cells of each row of Markdown, by its MSRs."""
    markdown = write_state(made(found, also), shown, "markdown").decode()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:3] == "| 0"
    ]
    return {cell[0]: cell[1:] for cell in cells}


def state_views(one: StateFile) -> dict[str, str]:
    """Every view of a state."""
    found = {name: write_state(one, RowChoice(), name).decode() for name in OF_STATES}
    found |= {f"{name}, all": write_state(one, RowChoice(True), name).decode() for name in OF_STATES}
    return found | {"text, one": write_state(one, RowChoice(only=frozenset({TSC, 0xFFFFFFFF})), "text").decode()}


numbers = st.one_of(st.sampled_from([0, TSC, 0x174, FS_BASE, 0xFFFFFFFF]), st.integers(0, 2**32 - 1))
ranges = st.one_of(
    st.builds("{:#x}".format, numbers),
    st.builds(lambda first, more: f"{first:#x}-{min(first + more, 2**32 - 1):#x}", numbers, st.integers(0, 300)),
)
runs = st.lists(ranges, max_size=4)
said = st.sampled_from([*SAID])
nested_said = st.sampled_from([*SAID, *NESTED_SAID])
rows = st.builds(
    AccessRow,
    msrs=ranges,
    name=names,
    read=said,
    write=said,
    in_filter=st.booleans(),
    nested=st.one_of(st.just(UNSET), st.builds(NestedAccess, read=nested_said, write=nested_said)),
)
all_passed = st.one_of(st.none(), st.builds(Passed, read=runs, write=runs))
nested_guests = st.builds(
    NestedGuests,
    bitmap=st.sampled_from([*USES]),
    settled=st.booleans(),
    running=st.one_of(st.none(), st.lists(counts, max_size=4)),
    passed=all_passed,
)
groups = st.builds(
    VcpuGroup,
    ids=st.lists(counts, max_size=4),
    ran=st.sampled_from([None, True, False]),
    settled=st.booleans(),
    passed=all_passed,
    msrs=st.lists(rows, max_size=5),
    nested=st.one_of(st.none(), nested_guests),
)
range_rows = st.builds(
    FilterRangeRow, msrs=ranges, access=st.sampled_from(["read", "write", "read_write", "none"]), denied=runs
)
filters = st.builds(Filter, default=st.sampled_from(["allow", "deny"]), ranges=st.lists(range_rows, max_size=3))
vms = st.builds(
    VmState,
    pid=counts,
    name=names,
    uuid=names,
    owned=st.booleans(),
    kind=names,
    filter=st.one_of(st.none(), filters),
    vcpus=st.lists(groups, max_size=3),
)
any_states: st.SearchStrategy[Any] = st.builds(
    StateFile,
    msrtrace=names,
    taken=names,
    host=st.builds(
        Computer, vendor=st.sampled_from(["vmx", "svm"]), name=names, kernel=names, version=names, cpu=names
    ),
    vms=st.lists(vms, max_size=3),
    notes=st.lists(names, max_size=2),
)

__all__ = ["amd_host", "any_states", "bitmap", "made", "new_host", "old_host", "state_views"]
