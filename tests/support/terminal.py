# SPDX-License-Identifier: GPL-2.0-or-later
"""A process with a terminal of its own."""

from __future__ import annotations

import os
from pathlib import Path

REPO = Path(__file__).parents[2]


def clean_environment() -> dict[str, str]:
    unwanted = {"NO_COLOR", "COLUMNS", "LINES", "LC_ALL", "LC_CTYPE", "PYTHONIOENCODING"}
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return {**kept, "PYTHONPATH": f"{REPO}:{REPO / 'tests/support'}", "TERM": "xterm", "LANG": "C.UTF-8"}


def command(directory: Path, *arguments: str) -> list[str | Path]:
    """The arguments of Python that run `msrtrace top`."""
    return ["-m", "standin", directory, "top", *arguments]
