# SPDX-License-Identifier: GPL-2.0-or-later
"""The rules of grafana/dashboard-linter, by their names, and our own, for the JSON of a dashboard.

The linter itself is a Go program; these are its rules (docs/index.md there), stricter in two places: a
counter with matchers is seen too, and every kind of panel needs a unit. Ours: `target-selection`, each series is of the
hosts that all variables select; `highest`, a graph with a line for each host has ten at most.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import promql_parser as promql

from dashboards.queries import HOST, HOSTS, TOP
from tests.dashboard.answers import Json, opened, panels, substituted

#: Long enough that no query has them but by the variable.
_RATE_INTERVAL, _RANGE = timedelta(seconds=86_461), timedelta(seconds=86_467)
VARIABLES = {
    "__rate_interval": f"{_RATE_INTERVAL.total_seconds():.0f}s",
    "__range": f"{_RANGE.total_seconds():.0f}s",
    "job": "$job",
    "instance": "$instance",
    "kernel": "$kernel",
    "vendor": "$vendor",
    "patch": "$patch",
    "__range_s": "86467",
    "ips": "3e9",
}
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_KINDS = {"row", "text", "stat", "timeseries", "table"}
_COUNTING = {"rate", "irate", "increase"}

Node = tuple[Any, tuple[Any, ...]]


def nodes(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[Node]:
    """Every node of a parsed query, with its ancestors, the nearest last."""
    yield tree, above
    names = ("lhs", "rhs", "expr", "param", "vector_selector")
    below = [child for name in names if isinstance(child := getattr(tree, name, None), promql.Expr)]
    for child in [*below, *getattr(tree, "args", ())]:
        yield from nodes(child, (*above, tree))


def selectors(expression: str) -> list[promql.VectorSelector]:
    """The metrics in a query. Raises ValueError if it is not PromQL."""
    tree = promql.parse(substituted(expression, VARIABLES))
    return [node for node, _ in nodes(tree) if isinstance(node, promql.VectorSelector)]


def metric(selector: promql.VectorSelector) -> str:
    """The name of a metric, or the first pattern that it must match."""
    return selector.name or next(m.value for m in selector.matchers.matchers if m.name == "__name__")


def complaints(dashboard: Json) -> list[str]:
    """The broken rules, each with its place."""
    found = [f"{rule}: the dashboard" for rule in _of_dashboard(dashboard)]
    for panel in opened(dashboard):
        found += [f"{rule}: {panel['title']!r}" for rule in _of_panel(panel)]
    for panel in panels(dashboard):
        for target in panel["targets"]:
            found += [f"{rule}: {panel['title']!r} {target['refId']}" for rule in _of_query(panel, target)]
    return found


def _of_dashboard(dashboard: Json) -> Iterator[str]:
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    source = variables.get("datasource", {})
    if (source.get("type"), source.get("query"), source.get("label")) != ("datasource", "prometheus", "Data source"):
        yield "template-datasource-rule"
    for name, everything in {"job": ".+", "instance": ".+", "kernel": ".*"}.items():
        variable = variables.get(name, {})
        right = {"type": "query", "multi": True, "includeAll": True, "allValue": everything, "label": name.title()}
        if any(variable.get(key) != value for key, value in right.items()) or variable["datasource"] != _SOURCE:
            yield f"template-{name}-rule"
        elif variable["refresh"] != 2:
            yield "template-on-time-change-reload-rule"
        elif not (query := variable["query"]).startswith("label_values(") or not _parses(query[13:].rpartition(",")[0]):
            yield "template-label-promql-rule"
    if dashboard["editable"] is not False:
        yield "uneditable-dashboard"
    if "__inputs" in dashboard or dashboard["schemaVersion"] > 41 or dashboard.get("id") is not None:
        yield "provisioning"
    for name in ("vendor", "patch"):
        right = {"type": "custom", "multi": True, "includeAll": True, "allValue": ".*", "label": name.title()}
        if any(variables.get(name, {}).get(key) != value for key, value in right.items()):
            yield f"template-{name}-rule"
    places = [panel["gridPos"] for panel in opened(dashboard)]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    if len(set(cells)) < len(cells) or any(x >= 24 for x, _ in cells):
        yield "layout"
    ids = [panel["id"] for panel in opened(dashboard)]
    if len(set(ids)) < len(ids):
        yield "ids"


def _of_panel(panel: Json) -> Iterator[str]:
    if panel["type"] not in _KINDS:
        yield "panel-kind"
    if panel["type"] == "row":
        return
    if not panel["title"] or not panel.get("description"):
        yield "panel-title-description-rule"
    if panel["type"] == "text":
        return
    if panel.get("datasource") != _SOURCE or any(target["datasource"] != _SOURCE for target in panel["targets"]):
        yield "panel-datasource-rule"
    if not panel["targets"]:
        yield "panel-no-targets-rule"
    config = panel["fieldConfig"]
    columns = [{p["id"] for p in override["properties"]} for override in config["overrides"]]
    if not (config["defaults"].get("unit") or (columns and all("unit" in ids for ids in columns))):
        yield "panel-units-rule"
    if not config["defaults"].get("noValue"):
        yield "no-value"


def _parses(expression: str) -> bool:
    try:
        return bool(selectors(expression))
    except (ValueError, KeyError):
        return False


def _of_query(panel: Json, target: Json) -> Iterator[str]:
    expression = target["expr"]
    if not _parses(expression):
        yield "target-promql-rule"
        return
    tree = promql.parse(substituted(expression, VARIABLES))
    if panel["type"] == "timeseries" and "{{instance}}" in target["legendFormat"]:
        yield from (
            [] if _is_ten(tree) and re.search(r"\bten (hosts|VMs)\b", panel.get("description", "")) else ["highest"]
        )
    for node, above in nodes(tree):
        function = above[-1].func.name if above and isinstance(above[-1], promql.Call) else None
        if isinstance(node, promql.MatrixSelector):
            if node.range != _RATE_INTERVAL and (function in ("rate", "irate") or node.range != _RANGE):
                yield "target-rate-interval-rule"
        elif isinstance(node, promql.VectorSelector):
            matchers = [(m.name, m.op, m.value) for m in node.matchers.matchers]
            for label in ("job", "instance"):
                if (label, promql.MatchOp.Re, f"${label}") not in matchers:
                    yield f"target-{label}-rule"
            is_counter = metric(node).endswith(("_total", "_total)"))
            within = above[-2].func.name if len(above) > 1 and isinstance(above[-2], promql.Call) else None
            series = [one for one in above if isinstance(one, promql.AggregateExpr)][-1:]
            counts_series = bool(series) and str(series[0].op) == "count"
            # A bare counter is the count since msrtrace started, and the panel must say so.
            says_so = "since" in panel.get("description", "")
            if is_counter and within not in _COUNTING and not counts_series and not says_so:
                yield "target-counter-agg-rule"
            if not is_hosts(node) and not _is_selected(node, above):
                yield "target-selection"


def is_hosts(tree: Any) -> bool:
    """Whether it is HOSTS, now or over a time."""
    found = [_matchers(node) for node, _ in nodes(tree) if isinstance(node, promql.VectorSelector)]
    return found == [_matchers(selectors(HOSTS)[0])]


def _matchers(selector: promql.VectorSelector) -> set[str]:
    return {str(one) for one in selector.matchers.matchers}


def _is_selected(node: Any, above: tuple[Any, ...]) -> bool:
    """Whether a series is part of what is joined with HOSTS."""
    for parent, child in zip(above, (*above[1:], node), strict=True):
        if isinstance(parent, promql.BinaryExpr) and child is parent.lhs and str(parent.op) == "and":
            matching = parent.modifier.matching if parent.modifier else None
            if matching and matching.labels == HOST.split(", ") and is_hosts(parent.rhs):
                return True
    return False


def _is_ten(tree: Any) -> bool:
    """Whether it ends with the ten highest of something that is the same at each moment of the graph."""
    top = tree.rhs if isinstance(tree, promql.BinaryExpr) and str(tree.op) == "and" else None
    if not isinstance(top, promql.AggregateExpr) or (str(top.op), str(top.param)) != ("topk", str(TOP)):
        return False
    return all(node.at is not None for node, _ in nodes(top.expr) if isinstance(node, promql.VectorSelector))
