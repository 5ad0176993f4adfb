"""Text from elsewhere (command lines, files, other people's reports), made fit to be shown on one line."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

LIMIT = 4096
"""The most characters a text in a report has; a longer one ends with three dots."""

Text = Annotated[str, Meta(max_length=LIMIT)]


def printable(text: str, limit: int = LIMIT) -> str:
    r"""TEXT with what is not printable escaped as in Python (`\n`, `\x1b`, `\u202e`), cut to LIMIT characters.

    Line breaks, terminals' escape sequences, marks that turn the direction of text, and the halves of characters that
    stand for bytes that are no UTF-8 are not printable. What is printable and short enough comes back as it is.
    """
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return text if len(text) <= limit else text[: limit - 3] + "..."


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """A struct whose every text is `printable`, so that no view has to mind, wherever it was made or read."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            clean = _clean(value)
            if clean is not value:
                msgspec.structs.force_setattr(self, name, clean)


def _clean(value: Any) -> Any:
    """VALUE, the same object if there is nothing to mend in it."""
    if isinstance(value, str):
        return value if value.isprintable() and len(value) <= LIMIT else printable(value)
    if isinstance(value, list) and any(isinstance(item, str) and _clean(item) is not item for item in value):
        return [_clean(item) for item in value]
    if isinstance(value, dict) and any(_clean(part) is not part for pair in value.items() for part in pair):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return value
