# SPDX-License-Identifier: GPL-2.0-or-later
"""From the probe to Prometheus: two emulated hosts, one without the patch, scraped by a real server."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from chain import Node, chain

from tracer.report.file import read
from tracer.report.report import Report

NODES = [Node("kvm1", ("unpatched",), "unpatched"), Node("kvm2", ("patched",), "patched")]
UPDATES = NODES[0].updates * 2 * 2  # by two vCPUs of two VMs
KEY = ("msr", "access", "action", "cause")
Counts = dict[tuple[str, ...], int]


@dataclass(frozen=True)
class Asked:
    """What Prometheus answered, and the nodes' own reports of the same time."""

    calls: dict[str, Counts]
    redundant: dict[str, Counts]
    updates: dict[str, float]
    up: dict[str, float]
    enables: dict[str, float]
    reports: dict[str, Report]
    compared: subprocess.CompletedProcess[str]
    refused: subprocess.CompletedProcess[str]


def _counts(answer: dict[tuple[tuple[str, str], ...], float]) -> dict[str, Counts]:
    """An answer by host, then by the labels of KEY."""
    found: dict[str, Counter[tuple[str, ...]]] = {}
    for labels, value in answer.items():
        named = dict(labels)
        found.setdefault(named["host"], Counter())[tuple(named[name] for name in KEY)] += round(value)
    return {host: dict(counts) for host, counts in found.items()}


def of_report(report: Report, what: str) -> Counts:
    """The same from a report."""
    counts: Counter[tuple[str, ...]] = Counter()
    for row in report.calls:
        counts[tuple(getattr(row, name) for name in KEY)] += getattr(row, what)
    return dict(counts)


def scraped(folder: Path) -> Asked:
    """Run the chain and ask."""
    with chain(folder, NODES) as server:

        def by_host(expression: str) -> dict[str, float]:
            return {dict(labels)["host"]: value for labels, value in server.query(expression).items()}

        def compare(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "tracer.cli.main", "compare", "--prometheus", server.url, *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=False)

        last = "last_over_time({}[1h])"
        return Asked(
            calls=_counts(server.query(last.format("msrtrace_intercept_calls_total"))),
            redundant=_counts(server.query(last.format("msrtrace_intercept_redundant_calls_total"))),
            updates=by_host(last.format("msrtrace_filter_updates_total")),
            up=by_host("max_over_time(up[1h])"),
            enables=by_host(last.format("instance_kernel:msrtrace_filter_change_enables_total:sum")),
            reports={node.name: read(folder / node.name / f"{node.modules[0]}.json") for node in NODES},
            compared=compare("--base", 'patch="unpatched"', "--new", '{patch="patched"}', "--since", "30m"),
            refused=compare("--base", 'patch="unpatched"', "--new", 'patch="gone"'),
        )


pytestmark = pytest.mark.beside(boot=scraped)


def test_prometheus_has_what_the_report_of_the_same_run_says(beside: Asked) -> None:
    assert beside.up == {"kvm1": 1, "kvm2": 1}
    for host, report in beside.reports.items():
        assert report.totals.filter_updates == UPDATES
        assert beside.calls[host] == of_report(report, "calls")
        assert beside.redundant[host] == of_report(report, "redundant")
        assert beside.updates[host] == report.totals.filter_updates


def test_the_fleet_is_compared_from_what_prometheus_stored(beside: Asked) -> None:
    done = beside.compared
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == (
        'patch="unpatched" makes 30 calls a filter update, 28 of them redundant; '
        '{patch="patched"} 13, 11 redundant: 17 fewer calls, -56.7%'
    )
    assert beside.refused.returncode == 1
    assert beside.refused.stderr.splitlines() == [
        'msrtrace: error: Prometheus has no series of msrtrace for {patch="gone"} in the last 3600 s'
    ]


def test_the_rules_see_which_host_lacks_the_patch(beside: Asked) -> None:
    assert beside.enables["kvm1"] == 17 * UPDATES
    assert not beside.enables.get("kvm2")
