# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that live at the top of the checkout and inside the installed package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def resource(name: str) -> Path:
    """The path of `name`, such as `bpf/msrtrace.c`: below the package if it was installed, else in the checkout."""
    installed = _PACKAGE / name
    return installed if installed.exists() else _PACKAGE.parent / name
