"""Options of the whole suite."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# The emulated hosts take both cores while the unit tests run: how long an example takes says nothing then.
settings.register_profile("beside emulated hosts", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("beside emulated hosts")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--hosts",
        default="bookworm,trixie",
        help="emulated hosts to test on, by commas: bookworm, trixie, sid, filter-only; or none",
    )
