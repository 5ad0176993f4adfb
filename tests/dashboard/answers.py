# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs every query of the dashboard on a Prometheus as Grafana does, with its variables substituted."""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tests.dashboard.prometheus import Prometheus

Json = dict[str, Any]

POINTS = 400  # at most, in a graph
#: A panel whose description says this may be empty.
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
        """Grafana's variables: `All` for job and instance, and $__rate_interval as in its manual."""
        rate = max(self.step + self.scrape, 4 * self.scrape)
        seconds = {"__rate_interval": rate, "__interval": self.step, "__range": self.end - self.start}
        return {"job": ".+", "instance": ".+", **{name: f"{value:.0f}s" for name, value in seconds.items()}}


def substituted(expression: str, variables: dict[str, str]) -> str:
    """The expression with its variables substituted. Raises KeyError for an unknown one."""
    return re.sub(r"\$(\w+)|\$\{(\w+)\}", lambda found: variables[found[1] or found[2]], expression)


def panels(dashboard: Json) -> list[Json]:
    """The panels with queries."""
    return [panel for panel in dashboard["panels"] if panel.get("targets")]


def ask(
    prometheus: Prometheus, dashboard: Json, time: Range, **chosen: str
) -> tuple[dict[str, dict[str, list[Json]]], list[str]]:
    """The answers by panel and refId, and errors; variables have the given values, or else `All`."""
    variables = time.variables() | chosen

    def one(panel: Json, target: Json) -> list[Json]:
        expression = substituted(target["expr"], variables)
        if target["instant"]:
            return prometheus.query(expression, time.end)
        return prometheus.query_range(expression, time.start, time.end, time.step)

    answers: dict[str, dict[str, list[Json]]] = {}
    complaints = []
    with ThreadPoolExecutor(4) as pool:
        asked = [(p, t, pool.submit(one, p, t)) for p in panels(dashboard) for t in p["targets"]]
        for panel, target, answer in asked:
            what = f"panel {panel['id']}, {panel['title']!r}, query {target['refId']}"
            try:
                found = answer.result()
            except ValueError as error:
                complaints.append(f"{what}: {error}")
                continue
            answers.setdefault(str(panel["id"]), {})[target["refId"]] = found
            if not found and MAY_BE_EMPTY not in panel["description"]:
                complaints.append(f"{what}: no answer to {target['expr']}")
            if any(_not_numbers(series) for series in found):
                complaints.append(f"{what}: NaN or infinity in an answer to {target['expr']}")
    return answers, complaints


def _not_numbers(series: Json) -> bool:
    values = series.get("values") or [series["value"]]
    return any(text in ("NaN", "+Inf", "-Inf") for _, text in values)
