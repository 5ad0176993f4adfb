# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests need on the machine. A pytest plugin with the option --check.

What is missing is a failure: without it nothing is proved. With --check, which is `make check`, it is left out, and at
the end there is what was left out and why.
"""

from __future__ import annotations

import shutil
from collections import Counter
from typing import NoReturn

import pytest

_LEFT_OUT = "left out: needs "
_HOSTS = "emulated hosts, or their kernels"
#: Why tests that load BPF programs, make maps or give up capabilities are skipped.
ROOT_ALONE = "left out: needs root (sudo build/venv/bin/pytest)"
_checking = [False]


def checking() -> bool:
    """Whether this is `make check`: neither emulated hosts nor the network may be used."""
    return _checking[0]


def tool(name: str) -> str:
    """The path of a program."""
    return shutil.which(name) or missing(name, f"{name} is missing: `make test` installs it")


def missing(what: str, why: str) -> NoReturn:
    """A requirement is missing: the test fails with the reason, or is skipped under --check."""
    if checking():
        leave_out(what)
    pytest.fail(why)


def leave_out(what: str) -> NoReturn:
    """Skip a test that needs something that is not available."""
    pytest.skip(f"{_LEFT_OUT}{what}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--check", action="store_true", help="no emulated hosts, no network; leave out and name what cannot be done"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    _checking[0] = bool(config.getoption("--check"))
    if checking():
        config.option.hosts = "none"


def _need(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test was skipped."""
    reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    reason = reason.removeprefix("Skipped: ").removeprefix(_LEFT_OUT)
    return _HOSTS if reason.startswith(("got empty parameter set", "--hosts none")) else reason


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = Counter(_need(report) for report in terminalreporter.stats.get("skipped", []))
    if not checking() or not skipped:
        return
    terminalreporter.section(f"LEFT OUT: {skipped.total()} tests, which `make test` runs", red=True, bold=True)
    for need, number in skipped.most_common():
        terminalreporter.write_line(f"{number:5} need {need}", red=True)
