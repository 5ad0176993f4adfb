# SPDX-License-Identifier: GPL-2.0-or-later
"""Text from elsewhere (command lines, files, other people's reports), made fit to be shown on one line."""

from __future__ import annotations

LIMIT = 4096
"""The most characters a text in a report has; a longer one ends with three dots."""


def printable(text: str, limit: int = LIMIT) -> str:
    r"""TEXT with what is not printable escaped as in Python (`\n`, `\x1b`, `\u202e`), cut to LIMIT characters.

    Line breaks, terminals' escape sequences, marks that turn the direction of text, and the halves of characters that
    stand for bytes that are no UTF-8 are not printable. What is printable and short enough comes back as it is.
    """
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return text if len(text) <= limit else text[: limit - 3] + "..."
