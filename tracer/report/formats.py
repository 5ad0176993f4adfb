# SPDX-License-Identifier: GPL-2.0-or-later
"""The formats in which reports and comparisons are written: the one place that lists them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath

from tracer.model.errors import MsrtraceError
from tracer.model.text import COLUMNS
from tracer.report.changelog import changelog
from tracer.report.compare import Comparison
from tracer.report.comparison_json import comparison_json
from tracer.report.comparison_view import comparison_document
from tracer.report.file import encode
from tracer.report.report import Report
from tracer.report.report_view import report_document
from tracer.report.state_diff import StateDiff
from tracer.report.state_diff_view import state_diff_document, state_diff_json
from tracer.report.state_file import StateFile
from tracer.report.state_view import RowChoice, state_document


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


def _report_html(report: Report, _: int) -> bytes:
    from tracer.report.html import report_html  # the template engine takes long to import

    return report_html(report).encode()


def _comparison_html(comparison: Comparison, _: int) -> bytes:
    from tracer.report.html import comparison_html

    return comparison_html(comparison).encode()


#: By name; the first is the default, and that of files without a suffix.
FORMATS = {
    "text": Format(
        lambda report, columns: report_document(report).text(columns).encode(),
        lambda comparison, columns: comparison_document(comparison).text(columns).encode(),
        (".txt",),
        lambda state, shown, columns: state_document(state, shown).text(columns).encode(),
        lambda diff, columns: state_diff_document(diff).text(columns).encode(),
    ),
    "markdown": Format(
        lambda report, _: report_document(report).markdown().encode(),
        lambda comparison, _: comparison_document(comparison).markdown().encode(),
        (".md",),
        lambda state, shown, _: state_document(state, shown).markdown().encode(),
        lambda diff, _: state_diff_document(diff).markdown().encode(),
    ),
    "json": Format(
        lambda report, _: encode(report),
        lambda comparison, _: comparison_json(comparison),
        (".json",),
        lambda state, _, __: encode(state),
        lambda diff, _: state_diff_json(diff),
    ),
    "html": Format(_report_html, _comparison_html, (".html", ".htm")),
    "changelog": Format(None, lambda comparison, _: changelog(comparison).encode()),
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
