# SPDX-License-Identifier: GPL-2.0-or-later
"""A comparison for a kernel commit message."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from fractions import Fraction

from tracer.model import msr
from tracer.model.quantity import percent, rate
from tracer.model.state import does_exit
from tracer.model.text import printable
from tracer.report.compare import Comparison, Side, format_command
from tracer.report.comparison_view import sentence
from tracer.report.report import Bit
from tracer.report.state_file import range_text
from tracer.report.state_view import name_of, said_text

_CELL, _CHANGE = 20, 10  # characters in a column of the table, which has 75 with its indents
_COLUMNS = 75  # Documentation/process/submitting-patches.rst: changelogs are wrapped at 75


def changelog(comparison: Comparison) -> str:
    """The comparison for a kernel commit message: plain text, at most 75 columns."""
    base, new = comparison.base, comparison.new
    lines = [*_wrapped(f"{_capital(sentence(comparison))}."), ""]
    what = "MSR-intercept calls" if comparison.unit == "call" else "Bits that MSR-intercept calls name"
    lines += [
        *_wrapped(f"{what}, per filter update of a vCPU, counted by msrtrace on {_kernels(comparison)} under"),
        "",
    ]
    for command in dict.fromkeys(format_command(side.report.command) for side in (base, new)):
        lines += _wrapped(command, "  ")
    for side in (base, new):
        if side.window:
            lines += _wrapped(f"{side.title}: {side.window}", "  ")
    one, other = comparison.per_update(base), comparison.per_update(new)
    lines += _table(
        comparison,
        (f"{comparison.unit}s", one.calls, other.calls),
        ("of them redundant", one.redundant, other.redundant),
        ("enable calls", _calls(base, disables=False), _calls(new, disables=False)),
        ("disable calls", _calls(base, disables=True), _calls(new, disables=True)),
    )
    lines += _creation(comparison)
    only_base = [row.bit for row in comparison.rows if row.base.calls and not row.new.calls]
    only_new = [row.bit for row in comparison.rows if row.new.calls and not row.base.calls]
    for side, bits in ((base, only_base), (new, only_new)):
        if bits:
            lines += [*_wrapped(f"Touched by {side.title} only: {_short(bits)}."), ""]
    for by_new, (here, there) in enumerate(((base, new), (new, base))):
        if found := _intercepted(comparison, by_new=bool(by_new)):
            lines += [*_wrapped(f"Intercepted at the end by {here.title}, passed by {there.title}: {found}."), ""]
    for side in (base, new):
        lines += _wrapped(f"{_capital(side.title)}: {side.origin}.")
    lines.append("")
    for warning in (*comparison.forced, *comparison.warnings):
        lines += _wrapped(f"Note: {warning}.")
    return "\n".join(lines).rstrip() + "\n"


def _intercepted(comparison: Comparison, *, by_new: bool) -> str:
    """What only one side intercepted when its trace ended, and who wanted that."""
    parts = []
    for row in comparison.intercepted:
        words = row.new if by_new else row.base
        if does_exit(words[0]):
            letters = "".join(direction[0].upper() for direction in row.access.split("_"))
            parts.append(f"{name_of(row.msrs) or range_text(row.msrs)} {letters} ({said_text(words)})")
    return ", ".join(parts)


def _creation(comparison: Comparison) -> list[str]:
    """The same per vCPU created, if both sides are known and differ."""
    one, other = (comparison.per_creation(side) for side in (comparison.base, comparison.new))
    if one.calls is None or other.calls is None or one == other:
        return []
    figures = [
        (f"{comparison.unit}s", one.calls, other.calls),
        ("of them redundant", one.redundant, other.redundant),
    ]
    if one.recalculations is not None and other.recalculations is not None:
        figures.append(("recalculations", one.recalculations, other.recalculations))
    return [*_wrapped("The same per vCPU created:"), *_table(comparison, *figures)]


def _table(comparison: Comparison, *figures: tuple[str, Fraction | None, Fraction | None]) -> list[str]:
    """The figures of both sides as lines, with an empty one before and after."""
    rows = []
    for label, left, right in figures:
        cells = [printable(rate(figure), _CELL) for figure in (left, right)]
        rows.append((label, *cells, printable(percent(left, right), _CHANGE)))
    titles = [printable(side.title, _CELL) for side in (comparison.base, comparison.new)]
    return ["", *_columns(("", *titles, "change"), *rows), ""]


def _columns(*rows: tuple[str, ...]) -> list[str]:
    """The rows as aligned lines, the first underlined, with narrower columns than a Table has."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        figures = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(["", row[0].ljust(widths[0]), *figures]).rstrip()

    return [line(rows[0]), line(["-" * width for width in widths]), *map(line, rows[1:])]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _short(bits: Sequence[Bit]) -> str:
    """The bits by MSR, with R, W or RW as in the kernel's MSR_TYPE_*."""
    directions: dict[int, str] = {}
    for bit in bits:
        directions[bit.msr] = directions.get(bit.msr, "") + bit.direction[0].upper()
    return ", ".join(f"{msr.name(index)} {letters}" for index, letters in directions.items())


def _kernels(comparison: Comparison) -> str:
    """The kernels, and on which kind of hardware they run."""
    hosts = (comparison.base.report.host, comparison.new.report.host)
    if hosts[0].vendor == hosts[1].vendor:
        return f"{' and '.join(dict.fromkeys(f'Linux {host.kernel}' for host in hosts))} ({hosts[0].title})"
    return " and ".join(f"Linux {host.kernel} ({host.title})" for host in hosts)


def _calls(side: Side, *, disables: bool) -> Fraction | None:
    if not side.observable:
        return None
    return Fraction(sum(row.calls for row in side.rows if row.disables == disables), side.updates)


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _COLUMNS, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
