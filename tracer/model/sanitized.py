# SPDX-License-Identifier: GPL-2.0-or-later
"""Structs whose strings are safe to print, wherever they come from: what reports are made of."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from tracer.model.text import LIMIT, printable

Text = Annotated[str, Meta(max_length=LIMIT)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class Sanitized(msgspec.Struct, frozen=True, kw_only=True):
    """A struct whose every string is `printable`, whether made here or read from a file; views need not check."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            clean = _clean(value)
            if clean is not value:
                msgspec.structs.force_setattr(self, name, clean)


def _clean(value: Any) -> Any:
    """The value with every string printable; the same object if nothing had to change."""
    if isinstance(value, str):
        return value if value.isprintable() and len(value) <= LIMIT else printable(value)
    if isinstance(value, list) and any(isinstance(item, str) and _clean(item) is not item for item in value):
        return [_clean(item) for item in value]
    if isinstance(value, dict) and any(_clean(part) is not part for pair in value.items() for part in pair):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return value
