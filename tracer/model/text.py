# SPDX-License-Identifier: GPL-2.0-or-later
"""Text from elsewhere (command lines, files, other people's reports), made safe to print on one line."""

from __future__ import annotations

import textwrap

LIMIT = 4096
"""The most characters a text in a report has; a longer one ends with three dots."""


COLUMNS = 80
"""The width of text that is not for a terminal, or for one whose width is unknown."""


def wrap(text: str, columns: int | None, first: str = "", later: str = "") -> list[str]:
    """The text as lines that are not wider than `columns` (None: one line), after these indents. Never empty."""
    if columns is None or len(first) + len(text) <= columns:
        return [first + text]
    return textwrap.wrap(
        text, columns, initial_indent=first, subsequent_indent=later, break_on_hyphens=False, expand_tabs=False
    ) or [first]


def printable(text: str, limit: int = LIMIT) -> str:
    r"""The text with non-printable characters escaped as in Python (`\n`, `\x1b`, `\u202e`), cut to `limit` characters.

    Line breaks, terminal escape sequences, bidirectional marks, and the lone surrogates that stand for bytes that are
    not UTF-8 are not printable. Text that is printable and short enough is returned as it is.
    """
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return text if len(text) <= limit else text[: limit - 3] + "..."
