# SPDX-License-Identifier: GPL-2.0-or-later
"""The parts of a Grafana dashboard as plain dictionaries: what all panels of a kind have in common.

Every default of Grafana is written out, so that the JSON can be drawn without Grafana.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24  # of a dashboard, in the units of gridPos
RED, ORANGE, GREEN, BLUE, GREY, PLAIN = "red", "orange", "green", "blue", "#8e8e8e", "text"

CALLS_PER_SECOND, PER_SECOND, SHARE = "cps", "ops", "percentunit"
UID = "msrtrace"
#: The most points of a line. Each costs the Prometheus an evaluation of the query.
POINTS = 150


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


def only(variable: str, value: str) -> Json:
    """A link to the dashboard of the same time with a variable set to a value, which is an expression of Grafana's."""
    kept = "${__url_time_range}&${datasource:queryparam}&${job:queryparam}"
    return {
        "title": f"Only this {variable}",
        "url": f"/d/{UID}?{kept}&var-{variable}=${{{value}:percentencode}}",
        "targetBlank": False,
    }


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
    query: str | Sequence[Query],
    *,
    unit: str,
    absent: str,
    thresholds: Json | None = None,
    decimals: int | None = None,
    size: tuple[int, int] = (4, 4),
) -> Json:
    """One current number, or several with their names; `absent` is shown if there is none."""
    queries = [Query(query, title)] if isinstance(query, str) else query
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
        "targets": _targets(queries, instant=True, table=False),
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "colorMode": "value",
            "graphMode": "none",
            "justifyMode": "auto",
            "orientation": "auto",
            "percentChangeColorMode": "standard",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "showPercentChange": False,
            "textMode": "value" if isinstance(query, str) else "value_and_name",
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
    """Values over time, from 0 up to `top` if given. In a wide panel the legend has the last values.

    A line with the instance in its legend links to the dashboard of that host.
    """
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
    if any("{{instance}}" in query.legend for query in queries):
        defaults["links"] = [only("instance", "__field.labels.instance")]
    legend: Json = {"calcs": [], "displayMode": "list", "placement": "bottom"}
    if size[0] >= WIDTH // 2:
        legend = {"calcs": ["lastNotNull"], "displayMode": "table", "placement": "right"}
    return _panel("timeseries", title, description, size) | {
        "datasource": DATASOURCE,
        "maxDataPoints": POINTS,
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
    variable: str = ""  # to which a click sets the variable of that name

    def override(self) -> Json:
        """The field override for Grafana."""
        properties: list[Json] = [{"id": "unit", "value": self.unit}, {"id": "noValue", "value": "-"}]
        if self.width:
            properties.append({"id": "custom.width", "value": self.width})
        if self.variable:
            properties.append({"id": "links", "value": [only(self.variable, "__value.raw")]})
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
    """The panels of each row below its heading, from left to right, wrapped when a line is full.

    All rows but the first are collapsed: Grafana runs their queries once they are opened. Their panels are in them, at
    the place where they are then; headings are where they are as long as no row is open.
    """
    placed: list[Json] = []
    numbers = itertools.count(1)
    top = 0
    for title, panels in rows.items():
        row: Json = {"id": next(numbers), "type": "row", "title": title, "collapsed": bool(placed), "panels": []}
        placed.append(row | {"gridPos": {"x": 0, "y": top, "w": WIDTH, "h": 1}})
        top += 1
        inside, bottom = _lines(panels, top, numbers)
        if row["collapsed"]:
            placed[-1]["panels"] = inside
        else:
            placed += inside
            top = bottom
    return placed


def _lines(panels: Sequence[Json], y: int, numbers: Iterator[int]) -> tuple[list[Json], int]:
    """Numbered panels in lines from `y` on, and where they end."""
    placed = []
    x = height = 0
    for panel in panels:
        size = panel["gridPos"]
        if x + size["w"] > WIDTH:
            x, y, height = 0, y + height, 0
        placed.append(panel | {"gridPos": size | {"x": x, "y": y}, "id": next(numbers)})
        x, height = x + size["w"], max(height, size["h"])
    return placed, y + height


ALL = {"selected": True, "text": "All", "value": "$__all"}


def variable(name: str, series: str, *, all_value: str = ".+") -> Json:
    """A variable with the values that a label of these series has in the time shown."""
    return {
        "type": "query",
        "name": name,
        "label": name.title(),
        "datasource": DATASOURCE,
        "query": f"label_values({series}, {name})",
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": all_value,
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "hide": 0,
    }


def _options(values: Mapping[str, str]) -> Json:
    return {
        "type": "custom",
        "query": ", ".join(f"{text} : {value}" for text, value in values.items()),
        "options": [{"selected": False, "text": text, "value": value} for text, value in values.items()],
        "hide": 0,
    }


def choice(name: str, values: Mapping[str, str]) -> Json:
    """A variable with fixed values by their texts; several may be chosen, and `.*` stands for all."""
    made = _options(values)
    return made | {
        "name": name,
        "label": name.title(),
        "options": [ALL, *made["options"]],
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def setting(name: str, title: str, description: str, values: Mapping[str, str], first: str) -> Json:
    """A variable with one of some fixed values by their texts: at first that with the text `first`."""
    made = _options(values)
    chosen = {"selected": True, "text": first, "value": values[first]}
    options = [chosen if option["text"] == first else option for option in made["options"]]
    about = {"name": name, "label": title, "description": description}
    return made | about | {"options": options, "multi": False, "includeAll": False, "current": chosen}


def link(title: str, url: str) -> Json:
    """A link at the top of the dashboard."""
    return {
        "type": "link",
        "title": title,
        "url": url,
        "icon": "doc",
        "tooltip": "",
        "tags": [],
        "asDropdown": False,
        "includeVars": False,
        "keepTime": False,
        "targetBlank": True,
    }


def dashboard(
    title: str, description: str, panels: Iterable[Json], *, variables: Sequence[Json], links: Sequence[Json]
) -> Json:
    """The whole dashboard; the variable `datasource` comes before the others."""
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
        "uid": UID,
        "title": title,
        "description": description,
        "tags": ["kvm", "msrtrace"],
        "schemaVersion": 41,
        "editable": False,
        "graphTooltip": 1,
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "refresh": "1m",
        "annotations": {"list": []},
        "links": list(links),
        "templating": {"list": [source, *variables]},
        "panels": list(panels),
    }
