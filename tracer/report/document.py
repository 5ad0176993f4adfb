# SPDX-License-Identifier: GPL-2.0-or-later
"""The content of a report or a comparison, before any formatting: a leading line, then sections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tracer.model.text import printable

_CELL = 128  # characters; the names of VMs have no more


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

    def text(self) -> str:
        """As plain text."""
        parts = ["\n".join([self.lead, *self.lines])]
        for section in self.sections:
            block = [section.title, *(f"  {line}" for line in section.lines)]
            if section.table and section.table.rows:
                block += [f"  {line}".rstrip() for line in section.table.drawn("simple").splitlines()]
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
