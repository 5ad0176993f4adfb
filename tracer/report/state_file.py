# SPDX-License-Identifier: GPL-2.0-or-later
"""What the vCPUs of a host intercept, as plain data: the JSON format "msrtrace-state/1", and a part of a report.

The types below define the format, as those of report.py do; state.schema.json is generated from them
(`python -m tracer.report.file state`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType, field

from tracer.model.nested import NESTED_SAID, USES
from tracer.model.sanitized import Count, Sanitized, Text
from tracer.model.state import SAID
from tracer.report.computer import NOTES, ROWS, Computer

SCHEMA = "msrtrace-state/1"

#: A filter has up to 16 ranges of 12,288 MSRs, of which every second may be denied.
RUNS = 100_000
Msr = Annotated[str, Meta(pattern="^0x[0-9a-f]{1,8}$")]
#: `0x10`, or `0x174-0x176` with both ends in it.
MsrRange = Annotated[str, Meta(pattern="^0x[0-9a-f]{1,8}(-0x[0-9a-f]{1,8})?$")]
Access = Literal["read", "write", "read_write", "none"]
Said = Annotated[str, Meta(pattern=f"^({'|'.join(SAID)})$")]
NestedSaid = Annotated[str, Meta(pattern=f"^({'|'.join([*SAID, *NESTED_SAID])})$")]
_Runs = Annotated[list[MsrRange], Meta(max_length=RUNS)]


class NestedAccess(Sanitized, frozen=True, kw_only=True):
    """What is said of reading and of writing MSRs by a guest (L2) of a vCPU's guest (L1)."""

    read: NestedSaid
    write: NestedSaid


class AccessRow(Sanitized, frozen=True, kw_only=True):
    """The MSRs of a range, of all of which the same is said: of reading and of writing them, a word each.

    `name` is that of the first. `in_filter`: a range of the VM's filter denies one of them. `nested` is absent unless
    the group has `nested`, and it is known which bitmap is in use.
    """

    msrs: MsrRange
    name: Text
    read: Said
    write: Said
    in_filter: bool = False
    nested: NestedAccess | UnsetType = UNSET

    @property
    def differs(self) -> bool:
        """Whether something else is said of nested guests."""
        nested = self.nested or self
        return (nested.read, nested.write) != (self.read, self.write)


class Passed(Sanitized, frozen=True, kw_only=True):
    """All MSRs whose bit in the bitmap is clear: the guest's accesses do not exit."""

    read: _Runs
    write: _Runs


class NestedGuests(Sanitized, frozen=True, kw_only=True):
    """What the vCPUs of a group have for guests (L2) of their guest (L1): `bitmap`: that which the CPU takes for them.

    `merged`: one that KVM merges from the vCPU's own and L1's, in which the bits of `passed` are clear (else null);
    `own`: the vCPU's own; `none`: every access exits; `unused`: L2 was not entered yet; `unreadable`. `settled`: that
    did not change, and KVM merged it from the vCPU's own bitmap as that is now. `running`: the ids of the vCPUs that
    were in L2 just then; null where that is not known.
    """

    bitmap: Annotated[str, Meta(pattern=f"^({'|'.join(USES)})$")]
    settled: bool
    running: Annotated[list[Count], Meta(max_length=ROWS)] | None
    passed: Passed | None


class VcpuGroup(Sanitized, frozen=True, kw_only=True):
    """vCPUs of a VM of which the same is said, by their `ids`; `ran`: in a guest, ever; null where that is not known.

    `settled`: their bitmaps are what KVM computes of the filter. `passed` is null where bitmaps cannot be read. `msrs`
    are those that KVM of some kernel may pass through, that are passed through, or that a range of the filter denies:
    all others exit. `nested` is null unless the guest may run guests of its own, and where bitmaps cannot be read.
    """

    ids: Annotated[list[Count], Meta(max_length=ROWS)]
    ran: bool | None
    settled: bool
    passed: Passed | None
    msrs: Annotated[list[AccessRow], Meta(max_length=RUNS)]
    nested: NestedGuests | None = None


class FilterRangeRow(Sanitized, frozen=True, kw_only=True):
    """A range of a filter: the accesses that it decides on, and the MSRs of it that it denies.

    Of one that goes on beyond the last MSR there is the first MSR alone, and `none`: KVM finds no access in it.
    """

    msrs: MsrRange
    access: Access
    denied: _Runs


class Filter(Sanitized, frozen=True, kw_only=True):
    """A VM's MSR filter: the first range that an access is in decides, else the default."""

    default: Literal["allow", "deny"]
    ranges: Annotated[list[FilterRangeRow], Meta(max_length=16)]


class VmState(Sanitized, frozen=True, kw_only=True):
    """A VM of process `pid`; unless `owned`, that only holds a descriptor, and the process that made the VM is gone.

    `kind` is not empty for VMs whose bitmaps are not KVM's, such as TDX. `filter` is null where it cannot be read.
    `uuid` is "" where unknown, and in older files.
    """

    pid: Count
    name: Text
    uuid: Text = ""
    owned: bool = True
    kind: Text = ""
    filter: Filter | None
    vcpus: Annotated[list[VcpuGroup], Meta(max_length=ROWS)]

    @property
    def count(self) -> int:
        """How many vCPUs it has."""
        return sum(len(group.ids) for group in self.vcpus)

    @property
    def title(self) -> str:
        """Its name and pid."""
        return f"{self.name or 'VM'} (pid {self.pid})"


class States(Sanitized, frozen=True, kw_only=True):
    """The VMs of a host; `notes` say what could not be had."""

    vms: Annotated[list[VmState], Meta(max_length=ROWS)]
    notes: Annotated[list[Text], Meta(max_length=NOTES)] = field(default_factory=list)


class StateFile(States, frozen=True, kw_only=True):
    """What the vCPUs of `host` intercepted when it was `taken`, UTC (ISO 8601)."""

    schema: Annotated[str, Meta(max_length=64)] = SCHEMA
    msrtrace: Text = ""
    taken: Text
    host: Computer


def msr_range(text: str) -> range:
    """The MSRs of a MsrRange."""
    first, _, last = text.partition("-")
    return range(int(first, 16), int(last or first, 16) + 1)


def range_text(msrs: range) -> str:
    """The MSRs of a range as a MsrRange."""
    first, last = f"{msrs.start:#x}", f"{msrs.stop - 1:#x}"
    return first if len(msrs) == 1 else f"{first}-{last}"


def accesses(group: VcpuGroup) -> Iterator[tuple[range, str, str]]:
    """The ranges of MSRs of a group, and what is said of reading and of writing them."""
    return ((msr_range(row.msrs), row.read, row.write) for row in group.msrs)
