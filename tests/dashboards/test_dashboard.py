# SPDX-License-Identifier: GPL-2.0-or-later
"""dashboards/grafana.json, without Grafana; `make test-dashboard` draws it (tests/dashboard/)."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, ProcessCollector

from dashboards import make
from dashboards.patterns import msr_pattern
from dashboards.queries import HOSTS
from dashboards.savings import PATCHABLE, UNPATCHABLE
from tests.dashboard import hosts
from tests.dashboard.answers import MAY_BE_EMPTY, Range, at_first, opened, panels, substituted
from tests.dashboard.lint import complaints, is_hosts, metric, selectors
from tracer.export.metrics import SnapshotCollector
from tracer.model.verdict import ALSO_ENABLED, LOOP

Json = dict[str, Any]

DASHBOARD: Json = make.made()
QUERIES = [(panel, target) for panel in panels(DASHBOARD) for target in panel["targets"]]


def test_the_committed_files_are_generated_from_the_source() -> None:
    assert json.loads(make.FILE.read_text()) == DASHBOARD, "python -m dashboards.make"
    assert make.RULES.read_text() == make.rules(), "python -m dashboards.make"
    assert not re.search(r"@\w+@", make.rules())


def test_patterns_match_the_msrs_of_the_table() -> None:
    """They match exactly the MSRs of the table, of all in the bitmap."""
    numbers = [*range(0x2100), *range(0xBFFFFF00, 0xC0002100)]
    for msrs in (LOOP, ALSO_ENABLED, (*LOOP, *ALSO_ENABLED)):
        pattern = re.compile(msr_pattern(msrs))
        listed = {number for one in msrs for number in one}
        assert {number for number in numbers if pattern.fullmatch(f"{number:#x}")} == listed
        assert not any(pattern.fullmatch(text) for text in ("0x", "0x010", "0x58", "10", "0xC0000100", "0x58d0", ""))


@given(st.integers(0, 0x2100), st.integers(1, 0x2100))
def test_a_pattern_matches_its_range(first: int, count: int) -> None:
    pattern = re.compile(msr_pattern([range(first, first + count)]))
    for number in {first - 1, first, first + count // 2, first + count - 1, first + count} - {-1}:
        assert bool(pattern.fullmatch(f"{number:#x}")) == (first <= number < first + count), pattern.pattern


@given(st.integers(0, 0x2100), st.integers(1, 0x2100), st.integers(0, 0x4300))
def test_a_pattern_matches_nothing_else(first: int, count: int, number: int) -> None:
    assert bool(re.fullmatch(msr_pattern([range(first, first + count)]), f"{number:#x}")) == (
        first <= number < first + count
    )


def test_the_dashboard_breaks_no_rule() -> None:
    assert complaints(DASHBOARD) == []


def _query(panel: Json, **changes: Any) -> None:
    panel["targets"][0].update(changes)


def _replaced(old: str, new: str) -> Callable[[Json, Json], None]:
    def replace(_: Json, panel: Json) -> None:
        assert old in panel["targets"][0]["expr"]
        _query(panel, expr=panel["targets"][0]["expr"].replace(old, new, 1))

    return replace


#: Ways to break a dashboard, given it and its panel "Calls by host", and the rule that says so.
BREAKS: dict[str, list[Callable[[Json, Json], object]]] = {
    "template-datasource-rule": [lambda d, _: d["templating"]["list"][0].update(name="prometheus")],
    "template-job-rule": [lambda d, _: d["templating"]["list"][1].update(allValue=".*")],
    "template-kernel-rule": [lambda d, _: d["templating"]["list"][2].update(allValue=".+")],
    "template-vendor-rule": [lambda d, _: d["templating"]["list"][3].update(allValue=None)],
    "template-patch-rule": [lambda d, _: d["templating"]["list"][4].update(multi=False)],
    "template-instance-rule": [lambda d, _: d["templating"]["list"][5].update(multi=False)],
    "template-on-time-change-reload-rule": [lambda d, _: d["templating"]["list"][5].update(refresh=1)],
    "template-label-promql-rule": [lambda d, _: d["templating"]["list"][1].update(query="label_values(a{, job)")],
    "uneditable-dashboard": [lambda d, _: d.update(editable=True)],
    "provisioning": [lambda d, _: d.update(__inputs=[]), lambda d, _: d.update(schemaVersion=42)],
    "layout": [lambda _, p: p["gridPos"].update(w=9), lambda _, p: p["gridPos"].update(x=20)],
    "ids": [lambda _, p: p.update(id=1)],
    "panel-kind": [lambda _, p: p.update(type="heatmap")],
    "panel-title-description-rule": [lambda _, p: p.update(title=""), lambda _, p: p.pop("description")],
    "panel-datasource-rule": [lambda _, p: p.update(datasource={"type": "prometheus", "uid": "abc"})],
    "panel-units-rule": [lambda _, p: p["fieldConfig"]["defaults"].pop("unit")],
    "no-value": [lambda _, p: p["fieldConfig"]["defaults"].pop("noValue")],
    "target-promql-rule": [_replaced("(", "(("), _replaced("$job", "$jab"), lambda _, p: _query(p, expr="")],
    "target-rate-interval-rule": [
        _replaced("[$__rate_interval]", "[5m]"),
        _replaced("[$__rate_interval]", "[$__range]"),
    ],
    "target-job-rule": [_replaced('job=~"$job", ', ""), _replaced('job=~"$job"', 'job="$job"')],
    "target-instance-rule": [_replaced('instance=~"$instance"', 'instance=~".*"')],
    "target-counter-agg-rule": [_replaced("rate(", "max_over_time(")],
    "target-selection": [
        _replaced(f" and on (job, instance) {HOSTS}", ""),
        _replaced("and on (job, instance) {", "and on (instance) {"),
        _replaced("and on (job, instance) {", "unless on (job, instance) {"),
        _replaced('kernel=~"$kernel"', 'kernel=~".*"'),
        _replaced('verdict=~"${patch:pipe}"', 'verdict="missing"'),
    ],
    "highest": [
        _replaced("topk(10, ", "topk(11, "),
        _replaced("topk(10, ", "sum("),
        _replaced("[$__range] @ end()", "[$__range]"),
        lambda _, p: p.update(description="Calls."),
    ],
}


@pytest.mark.parametrize(("rule", "break_"), [(rule, b) for rule, breaks in BREAKS.items() for b in breaks])
def test_a_broken_rule_is_found(rule: str, break_: Callable[[Json, Json], object]) -> None:
    broken = copy.deepcopy(DASHBOARD)
    break_(broken, next(panel for panel in broken["panels"] if panel["title"] == "Calls by host"))
    assert rule in {complaint.partition(":")[0] for complaint in complaints(broken)}


@cache
def _exported() -> dict[str, set[str]]:
    """The labels of every metric of msrtrace in a Prometheus, with targets labelled as in the example."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(SnapshotCollector(lambda: hosts.FLEET[0].snapshot(60), "0.1.0"))
    target = {"job", "instance", "patch"}
    found: dict[str, set[str]] = {"up": target}
    families = [*registry.collect(), *(family for host in hosts.FLEET for family in host.metrics(60))]
    for sample in (sample for family in families for sample in family.samples):
        found[sample.name] = found.get(sample.name, target) | sample.labels.keys()
    return found


@pytest.mark.parametrize(("panel", "target"), QUERIES, ids=[f"{p['title']}-{t['refId']}" for p, t in QUERIES])
def test_queries_use_exported_metrics_and_labels(panel: Json, target: Json) -> None:
    exported = _exported()
    for selector in selectors(target["expr"]):
        if is_hosts(selector):
            continue  # each of its series lacks some of the labels, on purpose
        names = [name for name in exported if re.fullmatch(metric(selector), name)]
        assert names, f"nothing exports {metric(selector)}"
        for label in {matcher.name for matcher in selector.matchers.matchers} - {"__name__"}:
            assert all(label in exported[name] for name in names), f"{names} have no label {label}"


def test_every_metric_is_shown() -> None:
    patterns = {metric(selector) for _, target in QUERIES for selector in selectors(target["expr"])}
    of_ours = {name for name in _exported() if name.startswith("msrtrace_")}
    assert {name for name in of_ours if not any(re.fullmatch(pattern, name) for pattern in patterns)} == set()


def test_figures_of_the_estimate_are_those_of_the_docs() -> None:
    """Those in docs/cost.md, which `make saving` prints."""
    rows = re.findall(
        r"^\| ([\w-]+) +\| (\d+); (\d+) +\| +[\d,]+ \| +[\d,]+ \| +([\d,]+) \|",
        (make.FILE.parents[1] / "docs/cost.md").read_text(),
        re.MULTILINE,
    )
    found = {host: (int(before) - int(after), int(saved.replace(",", ""))) for host, before, after, saved in rows}
    used = [one for kind in (PATCHABLE, UNPATCHABLE) for one in kind.measured]
    assert found == {one.host: (one.calls, one.instructions) for one in used}


def test_only_the_first_row_is_open() -> None:
    """Grafana runs the queries of a row when it is opened; then its panels are right below its heading."""
    rows = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert [row["collapsed"] for row in rows] == [False] + [True] * (len(rows) - 1)
    assert len(opened(DASHBOARD)) == len(DASHBOARD["panels"]) + sum(len(row["panels"]) for row in rows)
    for row in rows[1:]:
        assert min(panel["gridPos"]["y"] for panel in row["panels"]) == row["gridPos"]["y"] + 1


def test_tables_have_columns_for_their_queries() -> None:
    for panel in (panel for panel in panels(DASHBOARD) if panel["type"] == "table"):
        shown = panel["transformations"][1]["options"]["include"]["names"]
        values = [f"Value #{target['refId']}" for target in panel["targets"]]
        assert set(values) - set(shown) <= {"Value #A", "Value #B"}, panel["title"]
        assert len(panel["fieldConfig"]["overrides"]) == len(shown), panel["title"]


def test_panels_that_may_be_empty_say_why() -> None:
    empty = {panel["title"] for panel in panels(DASHBOARD) if MAY_BE_EMPTY in panel["description"]}
    assert {"VMs", "Calls by VM", "Calls saved by the patch"} <= empty
    assert not empty & {"Hosts", "Calls by host", "Hosts without the patch", "Tracers"}


def test_variables_are_substituted_as_grafana_does() -> None:
    hour = Range(0, 3600, 15)
    assert (hour.step, hour.variables()["__rate_interval"]) == (24, "60s")
    day = Range(0, 86400, 15)
    assert (day.step, day.variables()["__rate_interval"], day.variables()["__range_s"]) == (576, "591s", "86400")
    variables = hour.variables() | at_first(DASHBOARD)
    assert substituted('a{job=~"$job"}[${__range}]', variables) == 'a{job=~".+"}[3600s]'
    assert substituted('a{vendor=~"${vendor:pipe}"} / $ips', variables) == 'a{vendor=~".*"} / 3e9'
    with pytest.raises(KeyError):
        substituted("$nothing", hour.variables())
