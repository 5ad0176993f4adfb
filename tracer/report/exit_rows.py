# SPDX-License-Identifier: GPL-2.0-or-later
"""The exits in a report, as plain data, and made from what was counted."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from tracer.model import msr
from tracer.model.exit_table import ExitTable, JoinedExits, interceptors_text
from tracer.model.nested import NESTED_SAID
from tracer.model.sanitized import Count, Sanitized, Text
from tracer.model.state import SAID
from tracer.report.state_file import NestedSaid

#: `0x10`, or `other`: further MSRs, all together.
ExitMsr = Annotated[str, Meta(pattern="^(0x[0-9a-f]{1,8}|other)$")]
#: Of a report: guests choose the MSRs that they access, and there are 2^32.
MOST_ROWS = 4096


class ExitRow(Sanitized, frozen=True, kw_only=True):
    """A kind of exit, how many there were, and how many of them the VM's filter alone caused.

    Of `exits_perhaps_by_filter` more that is unknown. `result` is what became of the access: ok, filtered, unknown,
    invalid or reflected. `intercepted_by` is what was said of the access when the trace ended, and of how many of the
    vCPUs that can have made such exits (l2: of their guests' guests); it is null where that is unknown.
    """

    msr: ExitMsr
    name: Text
    access: Literal["read", "write"]
    path: Literal["fast", "slow"]
    result: Text
    guest: Literal["l1", "l2"]
    exits: Count
    exits_by_filter: Count
    exits_perhaps_by_filter: Count
    intercepted_by: Annotated[dict[NestedSaid, Count], Meta(max_length=len(SAID) + len(NESTED_SAID))] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exits_by_filter + self.exits_perhaps_by_filter > self.exits:
            raise ValueError("more exits by a filter than exits")

    @property
    def index(self) -> int:
        """The MSR's number, or msr.OTHER."""
        return msr.OTHER if self.msr == msr.hexadecimal(msr.OTHER) else int(self.msr, 16)

    @property
    def title(self) -> str:
        """The MSR, for a sentence."""
        if self.index == msr.OTHER:
            return "other MSRs"
        return f"MSR {self.msr}" if self.name == self.msr else f"{self.name} ({self.msr})"

    @property
    def interceptors(self) -> str:
        """Who intercepted the access, as a word; where vCPUs differed, a word and a number for each."""
        return interceptors_text(self.guest, self.intercepted_by)


def exit_rows(table: ExitTable) -> tuple[list[ExitRow], list[str]]:
    """The exits as rows of a report, summed over VMs, and notes on what is not in them.

    Those that filters alone cause come first, then those with the most exits.
    """
    found = table.rows(("path", "result"))
    rows, rest = found[:MOST_ROWS], found[MOST_ROWS:]
    notes = []
    if rest:
        left = f"{len(rest):,} kinds of exits, of which there were {sum(row.exits for row in rest):,} together"
        notes.append(f"{left}, have no rows in this report: guests accessed very many MSRs")
    return [_row(row) for row in rows], notes


def _row(row: JoinedExits) -> ExitRow:
    return ExitRow(
        msr=msr.hexadecimal(row.msr),
        name=msr.name(row.msr),
        access=row.access,  # type: ignore[arg-type]
        path=row.path,  # type: ignore[arg-type]
        result=row.result or "",
        guest=row.guest,  # type: ignore[arg-type]
        exits=row.exits,
        exits_by_filter=row.blame.sure,
        exits_perhaps_by_filter=row.blame.perhaps,
        intercepted_by=None if row.by is None else dict(row.by),
    )
