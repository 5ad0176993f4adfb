# SPDX-License-Identifier: GPL-2.0-or-later
"""The exits in `msrtrace top --exits`: a line for the header, and the table."""

from __future__ import annotations

from rich.text import Text

from tracer.live.table import LONGEST_NAME, LONGEST_VM, Column, Look, View, fitting, table
from tracer.live.top import Frame, vm_name
from tracer.model import msr
from tracer.model.exit_table import NO_BLAME, ExitTable, JoinedExits, OfVm, interceptors_text, most_first
from tracer.model.exits import FAST
from tracer.model.quantity import share

#: The orders of rows, and what the footer says of them.
SORTS = {"filter": "what a filter alone causes, then exits", "exits": "exits", "msr": "msr"}
_WIDE = 60  # columns of a terminal
HELP = "e calls; sort by f what a filter alone causes, c exits, m MSR; t totals or rates; "


def exits_line(shown: Frame, exits: ExitTable) -> str:
    """How many exits there were, and how many of them filters alone cause."""
    line = f"exits {shown.figure(exits.total)}"
    if not exits.total:
        return line
    return f"{line}, {exits.blame.share(exits.total)} of them since a filter alone denies the access"


def exits_table(shown: Frame, view: View, look: Look, room: int | None, level: tuple[str, ...]) -> list[Text]:
    """The rows that fit into `room` lines (None: all); `level` is one of LEVELS."""
    if shown.exits is None:
        return [Text("exits are not counted" if shown.traced else "")]
    if "msr" not in level:
        return _by_vm(shown, shown.exits, view, look, room)
    columns = fitting(_columns(shown, shown.exits, look, by_vm="pid" in level), look)
    parts = {part for column in columns for part in (column.part or "").split()}
    rows = shown.exits.rows(parts)
    if view.exits_sort != "filter":
        rows.sort(key=(lambda row: (row.msr, *most_first(row))) if view.exits_sort == "msr" else most_first)
    return table(columns, rows, view, look, room, style=_style) if rows else [Text("no exits" if shown.traced else "")]


def _columns(shown: Frame, exits: ExitTable, look: Look, *, by_vm: bool) -> list[Column[JoinedExits]]:
    def result(row: JoinedExits) -> str:
        return f"{row.result}, fast" if row.path == FAST else row.result or ""

    columns: list[Column[JoinedExits]] = [
        Column("MSR", 20, lambda row: msr.name(row.msr), most=LONGEST_NAME, words=True),
        Column("access", 6, lambda row: row.access, words=True),
        Column("result", 9, result, 3, "path result"),
        Column(f"exits{shown.unit}", 10, lambda row: shown.amount(row.exits)),
        Column("share", 6, lambda row: share(row.exits, exits.total), 4),
        Column("intercepted by", 14 if look.width >= _WIDE else 7, _interceptors, most=40, words=True),
    ]
    if by_vm:
        columns.insert(0, Column("pid VM", 18, lambda row: vm_name(shown, row.pid or 0), 1, "pid", LONGEST_VM))
    return columns


def _interceptors(row: JoinedExits) -> str:
    return interceptors_text(row.guest, row.by)


def _style(row: JoinedExits) -> str:
    return "red" if row.filter_alone else "yellow" if row.blame.sure else ""


def _by_vm(shown: Frame, exits: ExitTable, view: View, look: Look, room: int | None) -> list[Text]:
    """A row for each VM."""
    found = exits.of_vms()
    found |= {pid: OfVm(pid, 0, NO_BLAME) for pid in shown.vms.keys() - found.keys()}
    rows = sorted(found.values(), key=lambda one: (-one.exits, one.pid))
    if view.exits_sort == "filter":
        rows.sort(key=lambda one: -one.blame.sure)
    columns: list[Column[OfVm]] = [
        Column("pid VM", 18, lambda one: vm_name(shown, one.pid), 0, "pid", LONGEST_VM),
        Column(f"exits{shown.unit}", 10, lambda one: shown.amount(one.exits)),
        Column("share", 6, lambda one: share(one.exits, exits.total), 3),
        Column("filter alone", 12, lambda one: shown.amount(one.blame.sure)),
        Column("perhaps", 10, lambda one: shown.amount(one.blame.perhaps), 2),
    ]
    if not rows:
        return [Text("no exits" if shown.traced else "")]
    return table(fitting(columns, look), rows, view, look, room, style=lambda one: "red" if one.blame.sure else "")
