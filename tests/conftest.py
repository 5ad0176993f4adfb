# SPDX-License-Identifier: GPL-2.0-or-later
"""Options of the test suite, and the command line as a fixture."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

from tracer.cli import main as cli

pytest_plugins = ["children", "dispositions", "faults", "needs"]

# The emulated hosts take both cores while the unit tests run: how long an example takes says nothing then.
settings.register_profile("beside emulated hosts", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("beside emulated hosts")
# What a library or a Python may change shows in few examples (`make check-versions`).
settings.register_profile("few examples", parent=settings.default, max_examples=10)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--hosts",
        default="bookworm,trixie,bookworm-amd,trixie-amd",
        help="emulated hosts to test on, by commas: bookworm, trixie, sid, backports, filter-only, "
        "each also with -amd; bookworm-2-cpus, trixie-2-cpus; container, ansible, operators-hour; or none",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None) and config.getoption("--hosts") != "none":
        raise pytest.UsageError("-n: each of the processes would boot the hosts; give --hosts none, too")


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `msrtrace` with arguments in this process; returns its exit status, stdout and stderr."""

    from dispositions import dispositions_restored  # a plugin, which pytest is to import first

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["msrtrace", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end, dispositions_restored():
            cli.main()
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    return run
