# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables of `msrtrace top`: what a terminal can show, what the user chose, and the columns and rows that fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from rich.text import Text

from tracer.model.text import printable

LONGEST_NAME = 36  # in tracer/model/msr/table.py
LONGEST_VM = 40
_GAP = 2
_TEXT = 240  # characters of a note that are shown
_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Look:
    """What a terminal can show; without `height`, whole frames one after another, and no keys."""

    width: int = 80
    height: int | None = None
    ascii: bool = False
    styles: bool = False  # bold and reverse
    colors: bool = False

    def clean(self, text: str, limit: int = _TEXT) -> str:
        """The text without control characters, and in ASCII if necessary: names are not trusted."""
        text = printable(text.replace("µ", "u") if self.ascii else text, limit)
        return text.encode("ascii", "replace").decode() if self.ascii else text


@dataclass
class View:
    """What the user chose by keys and options. `level` is an index of `LEVELS`; `exits`: these instead of calls."""

    sort: str = "calls"
    level: int = 0
    whole: bool = False
    paused: bool = False
    help: bool = False
    offset: int = 0  # rows scrolled over
    exits: bool = False
    exits_sort: str = "filter"


@dataclass(frozen=True)
class Column(Generic[_Row]):
    """A column; `part` is what it breaks down by, if anything. Those with the highest `drop` are left out first.

    `most`: how wide it may become. Cells of words are aligned on the left, as those of parts.
    """

    title: str
    width: int
    cell: Callable[[_Row], str]
    drop: int = 0
    part: str | None = None
    most: int = 0
    words: bool = False


def fitting(columns: list[Column[_Row]], look: Look) -> list[Column[_Row]]:
    """The columns that are not left out."""
    while _width(columns) > look.width and (drop := max(column.drop for column in columns)):
        columns = [column for column in columns if column.drop != drop]
    return columns


def _width(columns: list[Column[_Row]]) -> int:
    return sum(column.width for column in columns) + _GAP * (len(columns) - 1)


def table(
    columns: list[Column[_Row]],
    rows: Sequence[_Row],
    view: View,
    look: Look,
    room: int | None,
    *,
    style: Callable[[_Row], str],
) -> list[Text]:
    """The titles and the rows that fit into `room` lines (None: all), and how many there are if not all fit.

    :param style: that of the last cell of a row
    """
    first, count = 0, len(rows)
    if room is not None and count > room:
        room = max(1, room - 1)
        first = view.offset = max(0, min(view.offset, count - room))
        rows = rows[first : first + room]
    else:
        view.offset = 0
    left = look.width - _width(columns)
    fitted: list[Column[_Row]] = []
    for column in columns:
        extra = max(min(left, column.most - column.width if column.most else 0), min(0, left) if not fitted else 0)
        left -= extra
        fitted.append(replace(column, width=max(1, column.width + extra)))
    drawn = [_line(fitted, [Text(column.title) for column in fitted], style="reverse")]
    for row in rows:
        *cells, last = (look.clean(column.cell(row)) for column in fitted)
        drawn.append(_line(fitted, [*map(Text, cells), Text(last, style=style(row))]))
    if len(rows) < count:
        caption = f"rows {first + 1} to {first + len(rows)} of {count}"
        drawn.append(Text(caption, style="dim italic", no_wrap=True, overflow="crop"))
    return drawn


def _line(columns: list[Column[_Row]], cells: list[Text], style: str = "") -> Text:
    """A line of the table. Not rich's own table: up to 14.2 that takes the gap from the width of the last columns."""
    for column, cell in zip(columns, cells, strict=True):
        cell.truncate(column.width, overflow="crop")
        (cell.pad_right if column.part or column.words else cell.pad_left)(column.width - cell.cell_len)
    line = Text(" " * _GAP, no_wrap=True, overflow="crop").join(cells)
    line.stylize(style)
    return line
