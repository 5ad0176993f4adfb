# SPDX-License-Identifier: GPL-2.0-or-later
"""Faults that are made to happen, and the figures by which they are judged. A pytest plugin with the option --faults.

A test of one is marked `@pytest.mark.fault(group, fault, done)`, puts what it measured into the fixture `figures`, and
asserts on it. With --faults, what passed, failed and was measured is added to build/faults.json, of which
docs/reliability.md is made (tests/reliability.py). Those marked with `dear=True` run with --faults alone
(`make test-faults`).
"""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

#: The groups, in the order of docs/reliability.md.
GROUPS = {
    "killed": "Killed and starved",
    "kernel": "The kernel moves",
    "many": "Many",
    "clients": "Clients",
    "hostile": "Hostile data",
    "weeks": "Weeks",
    "access": "Who gets in",
}
REPO = Path(__file__).parents[2]
RESULTS = REPO / "build/faults.json"

#: What a test measured: each name with its figure and unit, as the table shows them ("longest scrape": "12 ms").
Figures = dict[str, str]


@dataclass
class Fault:
    """A fault, what was done to bring it about, and what came of it."""

    group: str  # of GROUPS
    fault: str
    done: str
    test: str  # file and function
    host: str = ""  # the emulated host, if it was one
    passed: bool | None = None
    figures: Figures = field(default_factory=dict)


_KEY = pytest.StashKey[Fault]()


def fault_of(item: pytest.Item) -> Fault | None:
    """The fault that a test's marker names."""
    marker = item.get_closest_marker("fault")
    if marker is None:
        return None
    group, fault, done = marker.args
    if group not in GROUPS:
        raise pytest.UsageError(f"{item.nodeid}: {group} is none of {', '.join(GROUPS)}")
    function = getattr(item, "originalname", item.name)
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    values = {name: str(value) for name, value in parameters.items()}
    host = next((value for name, value in values.items() if value.endswith("-amd")), "")
    test = f"{item.path.relative_to(REPO)}::{function}"
    return Fault(group, fault.format(**values), done.format(**values), test, host)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", action="store_true", help="also the faults that take long (`make test-faults`)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "fault(group, fault, done, dear=False): a row of docs/reliability.md; {name} in its texts is a parameter of "
        "the test (tests/support/faults.py)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--faults"):
        return
    dear = [item for item in items if (mark := item.get_closest_marker("fault")) and mark.kwargs.get("dear")]
    if dear:
        config.hook.pytest_deselected(items=dear)
        items[:] = [item for item in items if item not in dear]


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    """What the test measures, for the table."""
    fault = fault_of(request.node)
    assert fault, "the fixture `figures` needs the marker `fault`"
    request.node.stash[_KEY] = fault
    return fault.figures


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and (fault := item.stash.get(_KEY, None)):
        fault.passed = report.passed
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    faults = [item.stash[_KEY] for item in session.items if _KEY in item.stash]
    if faults and session.config.getoption("--faults"):
        RESULTS.parent.mkdir(exist_ok=True)
        before = [Fault(**one) for one in json.loads(RESULTS.read_text())] if RESULTS.exists() else []
        now = {(fault.test, fault.fault, fault.host) for fault in faults}
        kept = [fault for fault in before if (fault.test, fault.fault, fault.host) not in now]
        RESULTS.write_text(json.dumps([asdict(fault) for fault in (*kept, *faults)], indent=1) + "\n")
