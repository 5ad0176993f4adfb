# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of this room."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "module").write_text("1")
    return tmp_path
