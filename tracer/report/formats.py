# SPDX-License-Identifier: GPL-2.0-or-later
"""The formats in which reports and comparisons are written: the one place that lists them.

What writes is imported when something is written: a command that only asks what formats there are needs none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from tracer.model.errors import MsrtraceError
from tracer.model.text import COLUMNS

if TYPE_CHECKING:
    from tracer.report.compare import Comparison
    from tracer.report.document import Document
    from tracer.report.report import Report
    from tracer.report.state_diff import StateDiff
    from tracer.report.state_file import StateFile
    from tracer.report.state_view import RowChoice


@dataclass(frozen=True)
class Format:
    """How to write a report, a comparison, a state and a comparison of states in one format, and its file suffixes.

    None: it is not supported.

    Writers get the width that text should have, in columns.
    """

    report: Callable[[Report, int], bytes] | None
    comparison: Callable[[Comparison, int], bytes] | None
    suffixes: tuple[str, ...] = ()
    state: Callable[[StateFile, RowChoice, int], bytes] | None = None
    state_diff: Callable[[StateDiff, int], bytes] | None = None


def _report(report: Report) -> Document:
    from tracer.report.report_view import report_document

    return report_document(report)


def _comparison(comparison: Comparison) -> Document:
    from tracer.report.comparison_view import comparison_document

    return comparison_document(comparison)


def _state(state: StateFile, shown: RowChoice) -> Document:
    from tracer.report.state_view import state_document

    return state_document(state, shown)


def _state_diff(diff: StateDiff) -> Document:
    from tracer.report.state_diff_view import state_diff_document

    return state_diff_document(diff)


def _file(content: Report | StateFile) -> bytes:
    from tracer.report.file import encode

    return encode(content)


def _comparison_json(comparison: Comparison, _: int) -> bytes:
    from tracer.report.comparison_json import comparison_json

    return comparison_json(comparison)


def _state_diff_json(diff: StateDiff, _: int) -> bytes:
    from tracer.report.state_diff_view import state_diff_json

    return state_diff_json(diff)


def _changelog(comparison: Comparison, _: int) -> bytes:
    from tracer.report.changelog import changelog

    return changelog(comparison).encode()


def _report_html(report: Report, _: int) -> bytes:
    from tracer.report.html import report_html  # the template engine takes long to import

    return report_html(report).encode()


def _comparison_html(comparison: Comparison, _: int) -> bytes:
    from tracer.report.html import comparison_html

    return comparison_html(comparison).encode()


#: By name; the first is the default, and that of files without a suffix.
FORMATS = {
    "text": Format(
        lambda report, columns: _report(report).text(columns).encode(),
        lambda comparison, columns: _comparison(comparison).text(columns).encode(),
        (".txt",),
        lambda state, shown, columns: _state(state, shown).text(columns).encode(),
        lambda diff, columns: _state_diff(diff).text(columns).encode(),
    ),
    "markdown": Format(
        lambda report, _: _report(report).markdown().encode(),
        lambda comparison, _: _comparison(comparison).markdown().encode(),
        (".md",),
        lambda state, shown, _: _state(state, shown).markdown().encode(),
        lambda diff, _: _state_diff(diff).markdown().encode(),
    ),
    "json": Format(
        lambda report, _: _file(report),
        _comparison_json,
        (".json",),
        lambda state, _, __: _file(state),
        _state_diff_json,
    ),
    "html": Format(_report_html, _comparison_html, (".html", ".htm")),
    "changelog": Format(None, _changelog),
}
DEFAULT = next(iter(FORMATS))
#: The names of formats that reports, comparisons and states (and comparisons of states) can have.
OF_REPORTS = [name for name, known in FORMATS.items() if known.report]
OF_COMPARISONS = [name for name, known in FORMATS.items() if known.comparison]
OF_STATES = [name for name, known in FORMATS.items() if known.state]
SUFFIXES = {suffix: name for name, known in FORMATS.items() for suffix in known.suffixes}


def format_of(path: PurePath) -> str | None:
    """The format for the suffix of a path; DEFAULT if it has none, None if the suffix is unknown."""
    suffix = suffix_of(path).lower()
    return SUFFIXES.get(suffix) if suffix else DEFAULT


def suffix_of(path: PurePath) -> str:
    """What follows the last dot of a name, with it; "" if there is none. A dot alone is one, as in Python 3.14."""
    return path.suffix or ("." if path.name.rstrip(".") and path.name.endswith(".") else "")


def write_report(report: Report, name: str, columns: int = COLUMNS) -> bytes:
    """The report in the named format, one of OF_REPORTS; text is not wider than `columns`."""
    write = FORMATS[name].report
    if write is None:
        raise MsrtraceError(f"reports are not written as {name}")
    return write(report, columns)


def write_comparison(comparison: Comparison, name: str, columns: int = COLUMNS) -> bytes:
    """The comparison in the named format, one of OF_COMPARISONS; text is not wider than `columns`."""
    write = FORMATS[name].comparison
    if write is None:
        raise MsrtraceError(f"comparisons are not written as {name}")
    return write(comparison, columns)


def write_state(state: StateFile, shown: RowChoice, name: str, columns: int = COLUMNS) -> bytes:
    """The state in the named format, one of OF_STATES; text is not wider than `columns`."""
    write = FORMATS[name].state
    if write is None:
        raise MsrtraceError(f"states are not written as {name}")
    return write(state, shown, columns)


def write_state_diff(diff: StateDiff, name: str, columns: int = COLUMNS) -> bytes:
    """The comparison of two states in the named format, one of OF_STATES; text is not wider than `columns`."""
    write = FORMATS[name].state_diff
    if write is None:
        raise MsrtraceError(f"comparisons of states are not written as {name}")
    return write(diff, columns)
