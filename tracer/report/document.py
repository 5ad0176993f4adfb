# SPDX-License-Identifier: GPL-2.0-or-later
"""The content of a report or a comparison, before any formatting: a leading line, then sections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from tracer.model.text import printable, wrap

_CELL = 128  # characters; the names of VMs have no more
_LEAST = 4  # columns of a cell
_BELOW = "    "  # in front of numbers that are below the names of their row


@dataclass(frozen=True)
class Table:
    """Cells as text. The first `names` columns are words, the others right-aligned numbers."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1

    def drawn(self, style: str, escaped: Callable[[str], str] = str) -> str:
        """The table as text (`simple`) or Markdown (`github`), each cell passed through `escaped`.

        Long cells are cut, as they would widen every row. Not by tabulate, which is slow to import.
        """
        cells = [[escaped(printable(cell, _CELL)) for cell in row] for row in (self.headers, *self.rows)]
        widths = [max(map(len, (f"{header}  ", *column))) for header, *column in zip(*cells, strict=True)]
        formats = [f"{'<' if column < self.names else '>'}{width}" for column, width in enumerate(widths)]
        aligned = [list(map(format, row, formats)) for row in cells]
        if style == "simple":
            headers, *rows = ("  ".join(row).rstrip() for row in aligned)
            return "\n".join([headers, "  ".join("-" * width for width in widths), *rows])
        headers, *rows = (f"| {' | '.join(row)} |" for row in aligned)
        return "\n".join([headers, f"|{'|'.join('-' * (width + 2) for width in widths)}|", *rows])

    def within(self, columns: int) -> str:
        """The table as text that is not wider than this, if it can be.

        Words are wrapped in their cells; where that is not enough, the numbers of a row are below its names; only where
        that is not enough either, words are broken.
        """
        drawn = self.drawn("simple")
        if max(map(len, drawn.splitlines())) <= columns:
            return drawn
        cells = [[printable(cell, _CELL) for cell in row] for row in (self.headers, *self.rows)]
        names, numbers = [row[: self.names] for row in cells], [row[self.names :] for row in cells]
        both = bool(names[0] and numbers[0])
        widths = _fitted(cells, self.names, columns, may_break=not both)
        if _width(widths) <= columns or not both:
            blocks = [_wrapped_row(row, widths, self.names) for row in cells]
        else:
            widths = _fitted(names, self.names, columns)
            below = _fitted(numbers, 0, columns - len(_BELOW))
            blocks = [
                _wrapped_row(name, widths, self.names) + [_BELOW + line for line in _wrapped_row(number, below, 0)]
                for name, number in zip(names, numbers, strict=True)
            ]
        headers, *rows = blocks
        return "\n".join(
            [*headers, "  ".join("-" * width for width in widths), *(line for row in rows for line in row)]
        )


def _width(widths: Sequence[int]) -> int:
    """The width of a row, with two spaces between cells."""
    return sum(widths) + 2 * (len(widths) - 1)


def _fitted(cells: Sequence[Sequence[str]], names: int, columns: int, *, may_break: bool = True) -> list[int]:
    """The widths of columns that together are not wider than `columns`, if they can be; numbers are never wrapped.

    :param names: how many columns are words, as in Table
    :param may_break: break words where wrapping at spaces is not enough
    """
    widths, whole_words, broken = [], [], []
    for place, (header, *rest) in enumerate(zip(*cells, strict=True)):
        text, numbers = ((header, *rest), []) if place < names else ((header,), rest)
        widths.append(max(map(len, (header, *rest))))
        broken.append(max([_LEAST, *map(len, numbers)]))
        whole_words.append(max([broken[-1], *(len(word) for cell in text for word in cell.split())]))
    for least in (whole_words, broken) if may_break else (whole_words,):
        while _width(widths) > columns:
            wide = [place for place, width in enumerate(widths) if width > least[place]]
            if not wide:
                break
            widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


def _wrapped_row(row: Sequence[str], widths: Sequence[int], names: int) -> list[str]:
    """The lines of a row whose cells are wrapped at these widths."""
    wrapped = [wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
    return [
        "  ".join(f"{part:{'<' if n < names else '>'}{widths[n]}}" for n, part in enumerate(parts)).rstrip()
        for parts in zip_longest(*wrapped, fillvalue="")
    ]


@dataclass(frozen=True)
class Section:
    """A part under a heading."""

    title: str
    lines: tuple[str, ...] = ()
    table: Table | None = None


@dataclass(frozen=True)
class Document:
    """`lead` is the answer; the rest is the evidence."""

    title: str
    lead: str
    lines: tuple[str, ...]
    sections: tuple[Section, ...]

    def text(self, columns: int | None = None) -> str:
        """As plain text that is not wider than `columns`, if given."""
        parts = ["\n".join(line for text in (self.lead, *self.lines) for line in wrap(text, columns, "", "  "))]
        for section in self.sections:
            block = wrap(section.title, columns, "", "  ")
            block += [part for line in section.lines for part in wrap(line, columns, "  ", "    ")]
            if section.table and section.table.rows:
                drawn = section.table.within(columns - 2) if columns else section.table.drawn("simple")
                block += [f"  {line}".rstrip() for line in drawn.splitlines()]
            parts.append("\n".join(block))
        return "\n\n".join(parts) + "\n"

    def markdown(self) -> str:
        """As GitHub Markdown."""
        parts = [f"**{_escaped(self.lead)}**", *(_escaped(line) for line in self.lines)]
        for section in self.sections:
            parts.append(f"### {_escaped(section.title)}")
            if section.lines:
                parts.append("\n".join(f"- {_escaped(line)}" for line in section.lines))
            if section.table and section.table.rows:
                parts.append(section.table.drawn("github", _escaped))
        return "\n\n".join(parts) + "\n"


def document(title: str, lead: str, lines: Sequence[str], sections: Sequence[Section]) -> Document:
    """A document without its empty sections."""
    shown = tuple(s for s in sections if s.lines or (s.table and s.table.rows))
    return Document(title, lead, tuple(lines), shown)


def _escaped(text: str) -> str:
    """The text escaped for Markdown: names come from other people's command lines."""
    for character in "\\`*_[]<>|#&~":
        text = text.replace(character, "\\" + character)
    return text
