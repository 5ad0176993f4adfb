# SPDX-License-Identifier: GPL-2.0-or-later
"""Machines made of files."""

from __future__ import annotations

from pathlib import Path

import pytest
from machines import AMD, Host


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def amd(tmp_path: Path) -> Host:
    return Host(tmp_path, AMD)
