# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that somebody has changed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def replaced(text: str | bytes, changes: Iterable[tuple[tuple[Any, ...], object]]) -> Any:
    """The content of a JSON text with the values at places replaced (...: taken away)."""
    content = json.loads(text)
    for place, value in changes:
        at = content
        try:
            for key in place[:-1]:
                at = at[key]
            if value is ...:
                del at[place[-1]]
            else:
                at[place[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took it away
    return content
