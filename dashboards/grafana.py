# SPDX-License-Identifier: GPL-2.0-or-later
"""The parts of a Grafana dashboard as plain dictionaries: what all panels of a kind have in common.

Every default of Grafana is written out, so that the JSON can be drawn without Grafana.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24  # of a dashboard, in the units of gridPos
RED, ORANGE, GREEN, BLUE, GREY, PLAIN = "red", "orange", "green", "blue", "#8e8e8e", "text"

CALLS_PER_SECOND, PER_SECOND, SHARE = "cps", "ops", "percentunit"


@dataclass(frozen=True)
class Query:
    """A PromQL expression, and the format of its legend."""

    expr: str
    legend: str = ""


def steps(*limits: tuple[float | None, str]) -> Json:
    """Thresholds: colours from a value on; the first limit is None."""
    return {"mode": "absolute", "steps": [{"color": color, "value": limit} for limit, color in limits]}


def names(values: Mapping[int, tuple[str, str]]) -> list[Json]:
    """Mappings of a value to a text and a colour."""
    options = {
        str(value): {"text": text, "color": color, "index": index}
        for index, (value, (text, color)) in enumerate(values.items())
    }
    return [{"type": "value", "options": options}]


#: For a number that should be 0, and for the share of redundant calls.
BAD = steps((None, GREEN), (1, RED))
WASTE = steps((None, GREEN), (0.5, ORANGE), (0.9, RED))


def _targets(queries: Sequence[Query], *, instant: bool, table: bool) -> list[Json]:
    return [
        {
            "refId": chr(ord("A") + index),
            "datasource": DATASOURCE,
            "editorMode": "code",
            "expr": query.expr,
            "format": "table" if table else "time_series",
            "instant": instant,
            "range": not instant,
            "legendFormat": query.legend or "__auto",
        }
        for index, query in enumerate(queries)
    ]


def _panel(kind: str, title: str, description: str, size: tuple[int, int]) -> Json:
    return {
        "type": kind,
        "title": title,
        "description": description,
        "gridPos": {"x": 0, "y": 0, "w": size[0], "h": size[1]},
    }


def text(title: str, description: str, markdown: str, *, size: tuple[int, int]) -> Json:
    """A text panel."""
    return _panel("text", title, description, size) | {"options": {"mode": "markdown", "content": markdown}}


def stat(
    title: str,
    description: str,
    query: str,
    *,
    unit: str,
    absent: str,
    thresholds: Json | None = None,
    decimals: int | None = None,
    size: tuple[int, int] = (4, 4),
) -> Json:
    """One current number; `absent` is shown if the query has no result."""
    defaults: Json = {
        "unit": unit,
        "noValue": absent,
        "mappings": [],
        "color": {"mode": "thresholds"},
        "thresholds": thresholds or steps((None, PLAIN)),
    }
    if decimals is not None:
        defaults["decimals"] = decimals
    return _panel("stat", title, description, size) | {
        "datasource": DATASOURCE,
        "targets": _targets([Query(query, title)], instant=True, table=False),
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "colorMode": "value",
            "graphMode": "none",
            "justifyMode": "auto",
            "orientation": "auto",
            "percentChangeColorMode": "standard",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "showPercentChange": False,
            "textMode": "value",
            "wideLayout": True,
        },
    }


def graph(
    title: str,
    description: str,
    *queries: Query,
    unit: str,
    absent: str = "No data",
    stacked: bool = False,
    top: float | None = None,
    size: tuple[int, int] = (8, 8),
) -> Json:
    """Values over time, from 0 up to `top` if given. In a wide panel the legend has the last values."""
    defaults: Json = {
        "unit": unit,
        "min": 0,
        "noValue": absent,
        "mappings": [],
        "color": {"mode": "palette-classic"},
        "thresholds": steps((None, PLAIN)),
        "custom": {
            "drawStyle": "line",
            "lineInterpolation": "linear",
            "lineWidth": 2,
            "fillOpacity": 40 if stacked else 0,
            "gradientMode": "none",
            "showPoints": "never",
            "pointSize": 4,
            "spanNulls": False,
            "insertNulls": False,
            "axisPlacement": "auto",
            "axisLabel": "",
            "axisColorMode": "text",
            "axisBorderShow": False,
            "axisCenteredZero": False,
            "scaleDistribution": {"type": "linear"},
            "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
            "hideFrom": {"legend": False, "tooltip": False, "viz": False},
            "thresholdsStyle": {"mode": "off"},
        },
    }
    if top is not None:
        defaults["max"] = top
    legend: Json = {"calcs": [], "displayMode": "list", "placement": "bottom"}
    if size[0] >= WIDTH // 2:
        legend = {"calcs": ["lastNotNull"], "displayMode": "table", "placement": "right"}
    return _panel("timeseries", title, description, size) | {
        "datasource": DATASOURCE,
        "targets": _targets(queries, instant=False, table=False),
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "legend": legend | {"showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }


@dataclass(frozen=True)
class Column:
    """A column of a table: the field that it shows, its heading, and the format of its values."""

    field: str
    heading: str
    unit: str = "string"
    width: int | None = None
    decimals: int | None = None
    mappings: Sequence[Json] = ()
    thresholds: Json | None = None
    top: float | None = None  # the largest value: the cell is then drawn as a bar

    def override(self) -> Json:
        """The field override for Grafana."""
        properties: list[Json] = [{"id": "unit", "value": self.unit}, {"id": "noValue", "value": "-"}]
        if self.width:
            properties.append({"id": "custom.width", "value": self.width})
        if self.decimals is not None:
            properties.append({"id": "decimals", "value": self.decimals})
        if self.thresholds:
            properties.append({"id": "thresholds", "value": self.thresholds})
        if self.mappings:
            properties.append({"id": "mappings", "value": list(self.mappings)})
        if self.mappings or (self.thresholds and self.top is None):
            properties.append({"id": "custom.cellOptions", "value": {"type": "color-text"}})
        if self.top is not None:
            bar = {"type": "gauge", "mode": "basic", "valueDisplayMode": "text"}
            properties += [
                {"id": "custom.cellOptions", "value": bar},
                {"id": "min", "value": 0},
                {"id": "max", "value": self.top},
            ]
        return {"matcher": {"id": "byName", "options": self.heading}, "properties": properties}


def table(
    title: str,
    description: str,
    queries: Sequence[str],
    columns: Sequence[Column],
    *,
    sort: str,
    descending: bool = True,
    absent: str = "No data",
    size: tuple[int, int] = (WIDTH, 8),
) -> Json:
    """The results of instant queries, with a row for each set of labels that they share. Other fields are left out."""
    return _panel("table", title, description, size) | {
        "datasource": DATASOURCE,
        "targets": _targets([Query(query) for query in queries], instant=True, table=True),
        "transformations": [
            {"id": "merge", "options": {}},
            {"id": "filterFieldsByName", "options": {"include": {"names": [column.field for column in columns]}}},
            {
                "id": "organize",
                "options": {
                    "excludeByName": {},
                    "indexByName": {column.field: index for index, column in enumerate(columns)},
                    "renameByName": {column.field: column.heading for column in columns},
                },
            },
        ],
        "fieldConfig": {
            "defaults": {
                "noValue": absent,
                "mappings": [],
                "color": {"mode": "thresholds"},
                "thresholds": steps((None, PLAIN)),
                "custom": {
                    "align": "auto",
                    "cellOptions": {"type": "auto"},
                    "filterable": True,
                    "inspect": False,
                },
            },
            "overrides": [column.override() for column in columns],
        },
        "options": {
            "cellHeight": "sm",
            "frameIndex": 0,
            "showHeader": True,
            "sortBy": [{"displayName": sort, "desc": descending}],
        },
    }


def laid_out(rows: Mapping[str, Sequence[Json]]) -> list[Json]:
    """The panels of each row below its heading, from left to right, wrapped when a line is full."""
    placed: list[Json] = []
    y = 0
    for title, panels in rows.items():
        row: Json = {"type": "row", "title": title, "collapsed": False, "panels": []}
        placed.append(row | {"gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}})
        y += 1
        x = height = 0
        for panel in panels:
            size = panel["gridPos"]
            if x + size["w"] > WIDTH:
                x, y, height = 0, y + height, 0
            placed.append(panel | {"gridPos": size | {"x": x, "y": y}})
            x, height = x + size["w"], max(height, size["h"])
        y += height
    return [panel | {"id": number} for number, panel in enumerate(placed, 1)]


def _variable(name: str, metric: str) -> Json:
    query = f"label_values({metric}, {name})"
    return {
        "type": "query",
        "name": name,
        "label": name.title(),
        "datasource": DATASOURCE,
        "query": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "hide": 0,
    }


def dashboard(uid: str, title: str, description: str, panels: Iterable[Json], *, metric: str) -> Json:
    """The whole dashboard; the values of `job` and `instance` are those of the metric."""
    source = {
        "type": "datasource",
        "name": "datasource",
        "label": "Data source",
        "query": "prometheus",
        "regex": "",
        "refresh": 1,
        "multi": False,
        "includeAll": False,
        "hide": 0,
    }
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["kvm", "msrtrace"],
        "schemaVersion": 41,
        "editable": False,
        "graphTooltip": 1,
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "refresh": "30s",
        "annotations": {"list": []},
        "links": [],
        "templating": {
            "list": [source, _variable("job", metric), _variable("instance", metric + '{job=~"$job"}')],
        },
        "panels": list(panels),
    }
