# SPDX-License-Identifier: GPL-2.0-or-later
"""The report on a trace as plain data: the JSON format "msrtrace-report/1".

The types below define the format: file.py reads and writes them, report.schema.json is generated from them
(`python -m tracer.report.file`), and every view of a report is made from one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, field

from tracer.model import msr
from tracer.model.loss import Loss
from tracer.model.sanitized import Count, Sanitized, Text
from tracer.model.verdict import Verdict
from tracer.report.computer import NOTES, ROWS, Computer
from tracer.report.exit_rows import ExitRow
from tracer.report.state_file import States

SCHEMA = "msrtrace-report/1"

Seconds = Annotated[float, Meta(ge=0, le=1e12)]
Rate = Annotated[float, Meta(ge=0, le=1e12)]
#: Of a command.
ARGUMENTS = 4096
Redundancy = Literal["exact", "unknown"]


class Host(Computer, frozen=True, kw_only=True):
    """The machine, and how it was traced."""

    vcpus_seen: Count = 0
    vmms_seen: Count = 0
    layout: Text
    backend: Text
    redundancy: Redundancy

    @property
    def functions(self) -> tuple[str, str]:
        """What says which functions of KVM are traced: only between hosts where it is the same are calls comparable."""
        return self.vendor, self.layout


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over all calls, updates and exits; null where they cannot be observed on that kernel.

    `recalculations` are recomputations of a bitmap for another reason than a new filter, since 6.17; the creation of
    vCPUs asked for `creation_recalculations` of them. `exits` is null unless they were counted; filters alone caused
    `exits_by_filter` of them, and of `exits_perhaps_by_filter` more that is unknown.
    """

    calls: Count | None
    redundant: Count | None
    filter_updates: Count | None
    recalculations: Count | None = None
    creation_recalculations: Count | None = None
    vcpus_seen: Count = 0
    vcpus_created: Count | None = None
    exits: Count | None = None
    exits_by_filter: Count | None = None
    exits_perhaps_by_filter: Count | None = None


class _Rates(msgspec.Struct, frozen=True):
    """Figures that are written as integers where they are."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:  # a report that was read is written again as it was
            value = getattr(self, name)
            if isinstance(value, float):
                msgspec.structs.force_setattr(self, name, whole(value))


class PerUpdate(_Rates, frozen=True, kw_only=True):
    """Calls made in filter updates, per filter update; integers where they divide evenly.

    `disable` counts every call that passes a direction through: disable_read and disable_write, too.
    """

    calls: Rate
    redundant: Rate | None
    enable: Rate
    enable_redundant: Rate | None
    disable: Rate
    disable_redundant: Rate | None


class PerCreation(_Rates, frozen=True, kw_only=True):
    """Calls and recalculations of creations, per vCPU created; null: unknown or, before 6.17, there are none."""

    calls: Rate
    redundant: Rate | None
    recalculations: Rate | None


class CallRow(Sanitized, frozen=True, kw_only=True):
    """A kind of call and how many had which outcome; outcomes are null where redundancy is unknown.

    `msr` is hexadecimal. `changed_read` and `changed_write` count calls that changed that bit of the MSR;
    `refused` those that disabled interception without effect, because the VM's filter denies the access. disable_read
    and disable_write name both bits, disable the interception of that direction alone, and enable that of the other.
    """

    msr: Annotated[str, Meta(pattern="^0x[0-9a-f]{1,8}$")]
    name: Text
    access: Literal["read", "write", "read_write"]
    action: Literal["enable", "disable", "disable_read", "disable_write"]
    cause: Text
    caller: Text
    calls: Count
    redundant: Count | None
    changed_read: Count | None
    changed_write: Count | None
    refused: Count | None

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = (self.redundant, self.changed_read, self.changed_write, self.refused)
        if any(part is not None and part > self.calls for part in parts):
            raise ValueError("more outcomes than calls")

    @property
    def index(self) -> int:
        """The MSR's number."""
        return int(self.msr, 16)

    @property
    def disables(self) -> bool:
        """Whether the call passes any direction through."""
        return self.action != "enable"


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """Updates that took at most `le` seconds (null: infinity), and longer than the bucket before."""

    le: Seconds | None
    count: Count


class UpdateSeconds(msgspec.Struct, frozen=True, kw_only=True):
    """How long updates (or recalculations) took, including the probes: a histogram, the sum in seconds, their count."""

    buckets: Annotated[list[Bucket], Meta(max_length=1000)]
    sum: Seconds
    count: Count


class Vm(Sanitized, frozen=True, kw_only=True):
    """The counts of one VM, with `--by-vm`: `pid` is its VMM's, 0 for counts that belong to no known VM.

    `uuid` and `vmm` (the program that runs it, such as qemu) are "" where unknown, and in older reports.
    """

    pid: Count
    name: Text
    uuid: Text = ""
    vmm: Text = ""
    calls: Count | None
    redundant: Count | None
    filter_updates: Count | None
    recalculations: Count | None = None
    filter_update_seconds_sum: Seconds = 0.0
    exits: Count | None = None
    exits_by_filter: Count | None = None
    exits_perhaps_by_filter: Count | None = None

    @property
    def title(self) -> str:
        """The name, or why there is none."""
        return self.name or ("(ended before it could be named)" if self.pid else "(no known VM)")


class Report(Sanitized, frozen=True, kw_only=True):
    """A report. `started` is UTC (ISO 8601), `command` what was run while tracing, `exit_status` its exit status.

    `exits` are those of guests' RDMSR and WRMSR, with `--exits`: null unless they were counted, and absent in older
    reports. `state` is what the vCPUs that there were at the end intercepted then: absent in older reports, and null
    where that could not be read.
    """

    schema: Annotated[str, Meta(max_length=64)] = SCHEMA
    msrtrace: Text = ""
    label: Text = ""
    started: Text
    duration_seconds: Seconds
    host: Host
    command: Annotated[list[Text], Meta(max_length=ARGUMENTS)] | None = None
    exit_status: Annotated[int, Meta(ge=0, le=255)] | None = None
    totals: Totals
    per_filter_update: PerUpdate | None
    per_vcpu_creation: PerCreation | None = None
    calls: Annotated[list[CallRow], Meta(max_length=ROWS)]
    filter_update_seconds: UpdateSeconds | None
    recalculation_seconds: UpdateSeconds | None = None
    vms: Annotated[list[Vm], Meta(max_length=ROWS)] | None = None
    exits: Annotated[list[ExitRow], Meta(max_length=ROWS)] | None = None
    state: States | None = None
    loss: Loss
    lower_bound: bool
    verdict: Verdict
    notes: Annotated[list[Text], Meta(max_length=NOTES)] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The label, or else the kernel."""
        return self.label or self.host.kernel

    def rows(self, cause: str | None = None) -> list[CallRow]:
        """The calls, or only those with the cause."""
        return [row for row in self.calls if cause in (None, row.cause)]


@dataclass(frozen=True)
class Bit:
    """One of an MSR's two bits in the bitmap: `direction` is read or write."""

    msr: int
    direction: str

    def __str__(self) -> str:
        return f"{msr.name(self.msr)} {self.direction}"


@dataclass(frozen=True)
class BitCounts:
    """Calls that named a bit, and those of them that left it as it was; None where that is unknown."""

    calls: int
    redundant: int | None


def by_bit(rows: Iterable[CallRow]) -> dict[Bit, BitCounts]:
    """The calls by the bits that they name, to compare kernels with others that update both bits in one call."""
    result: dict[Bit, BitCounts] = {}
    for row in rows:
        for direction, changed in (("read", row.changed_read), ("write", row.changed_write)):
            if row.access in (direction, "read_write"):
                bit = Bit(row.index, direction)
                before = result.get(bit, BitCounts(0, 0))
                known = changed is not None and before.redundant is not None
                result[bit] = BitCounts(
                    before.calls + row.calls,
                    (before.redundant or 0) + row.calls - (changed or 0) if known else None,
                )
    return dict(sorted(result.items(), key=lambda pair: (pair[0].msr, pair[0].direction)))


def redundant_sum(rows: Iterable[CallRow]) -> int | None:
    """How many of the calls changed nothing; None if that is unknown."""
    values = [row.redundant for row in rows]
    return None if None in values else sum(value for value in values if value is not None)


def whole(value: float) -> float:
    """The value, as an int if it is one: 13 and not 13.0 in the file."""
    return int(value) if value == int(value) else round(value, 6)
