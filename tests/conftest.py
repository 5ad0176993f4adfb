"""Options of the whole suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--hosts",
        default="bookworm,trixie",
        help="emulated hosts to test on, by commas: bookworm, trixie, sid, filter-only; or none",
    )
