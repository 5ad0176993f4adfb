# SPDX-License-Identifier: GPL-2.0-or-later
"""From the probe to Prometheus: emulated hosts of both vendors, one without the patch, scraped by a real server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from chain import Node, chain

from tracer.report.file import read
from tracer.report.report import Report

NODES = [
    Node("kvm1", ("unpatched",), "unpatched"),
    Node("kvm2", ("patched",), "patched"),
    Node("kvm3", ("unpatched",), "none", host="trixie-amd"),
]
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
    verdicts: dict[str, set[str]]
    per_update: dict[str, tuple[float, float]]
    vendors: dict[str, str]
    reports: dict[str, Report]
    compared: subprocess.CompletedProcess[str]
    refused: subprocess.CompletedProcess[str]
    of_both: list[subprocess.CompletedProcess[str]]


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
            wide = {**os.environ, "COLUMNS": "300"}  # sentences are one line each
            return subprocess.run(command, capture_output=True, text=True, env=wide, check=False)

        last = "last_over_time({}[1h])"
        ratio = "instance:msrtrace_filter_change_{}_per_filter_updates:ratio"
        calls, redundant = (by_host(last.format(ratio.format(what))) for what in ("calls", "redundant_calls"))
        vendors = server.query("group by (host, vendor) (last_over_time(msrtrace_build_info[1h]))")
        verdicts = server.query(last.format("instance:msrtrace_patch_verdict:info"))
        both = ("--base", 'patch="patched"', "--new", 'patch="none"', "--since", "30m")
        return Asked(
            calls=_counts(server.query(last.format("msrtrace_intercept_calls_total"))),
            redundant=_counts(server.query(last.format("msrtrace_intercept_redundant_calls_total"))),
            updates=by_host(last.format("msrtrace_filter_updates_total")),
            up=by_host("max_over_time(up[1h])"),
            verdicts={host: {dict(one)["verdict"] for one in verdicts if dict(one)["host"] == host} for host in calls},
            per_update={host: (calls[host], redundant[host]) for host in calls},
            vendors={dict(labels)["host"]: dict(labels)["vendor"] for labels in vendors},
            reports={node.name: read(folder / node.name / f"{node.modules[0]}.json") for node in NODES},
            compared=compare("--base", 'patch="unpatched"', "--new", '{patch="patched"}', "--since", "30m"),
            refused=compare("--base", 'patch="unpatched"', "--new", 'patch="gone"'),
            of_both=[compare(*both), compare(*both, "--force")],
        )


pytestmark = pytest.mark.beside(boot=scraped, host=NODES[0].host)


def test_prometheus_has_what_the_report_of_the_same_run_says(beside: Asked) -> None:
    assert beside.up == {"kvm1": 1, "kvm2": 1, "kvm3": 1}
    assert beside.vendors == {"kvm1": "vmx", "kvm2": "vmx", "kvm3": "svm"}
    assert beside.per_update == {"kvm1": (30, 28), "kvm2": (13, 11), "kvm3": (47, 46)}
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
    """At some time; before the first filter update nothing is known."""
    assert beside.verdicts["kvm1"] - {"undecided"} == {"missing"}
    assert beside.verdicts["kvm2"] - {"undecided"} == {"present"}
    assert beside.verdicts["kvm3"] == {"not_applicable"}  # it makes more enables, and never had the patch


def test_hosts_of_both_vendors_are_compared_if_asked_to(beside: Asked) -> None:
    """Metrics do not say which bit a call for both has changed."""
    refused, done = beside.of_both
    assert (refused.returncode, refused.stdout) == (3, "")
    assert "--force" in refused.stderr
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == (
        'patch="patched" names 13 bits a filter update, 11 of them redundant; '
        'patch="none" 94, ? redundant: 81 more bits, +623.1%'
    )
    assert "not the same kind of hardware" in done.stdout + done.stderr
