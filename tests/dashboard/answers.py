# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs every query of the dashboard on a Prometheus as Grafana does, with its variables substituted."""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from dashboards.grafana import POINTS
from tests.dashboard.prometheus import Prometheus

Json = dict[str, Any]

#: A panel whose description says this, or that some of it is, may have queries without an answer.
MAY_BE_EMPTY = "Empty unless "


@dataclass(frozen=True)
class Range:
    """The time shown, in seconds since the epoch, and how often Prometheus scrapes."""

    start: float
    end: float
    scrape: float

    @property
    def step(self) -> float:
        """The step of a graph."""
        return max(self.scrape, math.ceil((self.end - self.start) / POINTS))

    def variables(self) -> dict[str, str]:
        """Grafana's own variables, with $__rate_interval as in its manual."""
        rate = max(self.step + self.scrape, 4 * self.scrape)
        seconds = {"__rate_interval": rate, "__interval": self.step, "__range": self.end - self.start}
        times = {name: f"{value:.0f}s" for name, value in seconds.items()}
        return {**times, "__range_s": f"{seconds['__range']:.0f}"}


def substituted(expression: str, variables: dict[str, str]) -> str:
    """The expression with its variables substituted, formatted as they are. Raises KeyError for an unknown one."""
    return re.sub(r"\$(\w+)|\$\{(\w+)(?::pipe)?\}", lambda found: variables[found[1] or found[2]], expression)


def at_first(dashboard: Json) -> dict[str, str]:
    """The values that the dashboard's variables have when it is opened: most are `All`."""
    variables = [one for one in dashboard["templating"]["list"] if one["type"] != "datasource"]
    return {one["name"]: one["allValue"] if one["includeAll"] else one["current"]["value"] for one in variables}


def opened(dashboard: Json) -> list[Json]:
    """All panels, with headings, where they are once all rows are open: each row moves what is below it down."""
    found, moved = [], 0
    for panel in dashboard["panels"]:
        inside = panel.get("panels", [])
        for one in (panel, *inside):
            found.append(one | {"gridPos": one["gridPos"] | {"y": one["gridPos"]["y"] + moved}})
        if inside:
            moved += max(one["gridPos"]["y"] + one["gridPos"]["h"] for one in inside) - panel["gridPos"]["y"] - 1
    return found


def panels(dashboard: Json) -> list[Json]:
    """The panels with queries."""
    return [panel for panel in opened(dashboard) if panel.get("targets")]


Answers = dict[str, dict[str, list[Json]]]


@dataclass
class Asked:
    """The answers by panel and refId, what is wrong with them, and what each query took by the server's clock()."""

    answers: Answers = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def ask(
    prometheus: Prometheus, dashboard: Json, shown: Range, chosen: dict[str, str] | None = None, *, at_once: int = 4
) -> Asked:
    """Run every query, so many at once; variables have the chosen values, or else those at first."""
    variables = shown.variables() | at_first(dashboard) | (chosen or {})

    def one(target: Json) -> tuple[list[Json], float]:
        expression, begin = substituted(target["expr"], variables), prometheus.clock()
        if target["instant"]:
            found = prometheus.query(expression, shown.end)
        else:
            found = prometheus.query_range(expression, shown.start, shown.end, shown.step)
        return found, prometheus.clock() - begin

    asked = Asked()
    with ThreadPoolExecutor(at_once) as pool:
        running = [(p, t, pool.submit(one, t)) for p in panels(dashboard) for t in p["targets"]]
        for panel, target, answer in running:
            what = f"panel {panel['id']}, {panel['title']!r}, query {target['refId']}"
            try:
                found, asked.seconds[what] = answer.result()
            except ValueError as error:
                asked.complaints.append(f"{what}: {error}")
                continue
            asked.answers.setdefault(str(panel["id"]), {})[target["refId"]] = found
            if not found and MAY_BE_EMPTY.lower() not in panel["description"].lower():
                asked.complaints.append(f"{what}: no answer to {target['expr']}")
            if any(_not_numbers(series) for series in found):
                asked.complaints.append(f"{what}: NaN or infinity in an answer to {target['expr']}")
    return asked


def _not_numbers(series: Json) -> bool:
    values = series.get("values") or [series["value"]]
    return any(text in ("NaN", "+Inf", "-Inf") for _, text in values)
