# SPDX-License-Identifier: GPL-2.0-or-later
"""The row on the health of the tracers: whether their counts are complete, and what they cost."""

from __future__ import annotations

from functools import partial

from dashboards.grafana import BAD, GREEN, ORANGE, RED, SHARE, Column, Json, Query, graph, names, stat, steps, table
from dashboards.queries import (
    BUILD,
    HOST,
    LOSS_OF_EXITS,
    LOSSES,
    LOST,
    NOW,
    RANGE,
    STEP,
    TEN_HIGHEST,
    UNPROBED,
    Over,
    by,
    count,
    gauge,
    highest,
    host_count,
    metric,
    selected,
    total,
)

HOST_LEGEND = "{{instance}}"

UP = {0: ("down", RED), 1: ("up", GREEN)}
ATTACHED = {0: ("no", RED), 1: ("yes", GREEN)}


def _full(over: Over = NOW) -> str:
    """How full each host's fullest map is."""
    return selected(f"max by ({HOST}) ({gauge('map_entries', over)} / {gauge('map_capacity', over)})", over)


def _of_host(name: str, over: Over = NOW) -> str:
    """A gauge with one series for each host."""
    return selected(f"max by ({HOST}) ({gauge(name, over)})", over)


def _lost(over: Over) -> str:
    """All counts that each host lost; those of exits are absent where these are not counted."""
    first, *others = (total(HOST, kind, over) for kind in LOSSES if kind != LOSS_OF_EXITS)
    return " + ".join((first, *others, f"({total(HOST, LOSS_OF_EXITS, over)} or 0 * {first})"))


#: Targets of jobs named as the alerts in rules.yml want it, and all others that are msrtrace.
_NAMED = metric("up", 'job=~".*msrtrace.*"')
_UP = f"({_NAMED} or {metric('up')} and on ({HOST}) {gauge('probe_attached')})"
_PROBE = f"max by ({HOST}, function)"
_ATTACHED = f"{_PROBE} ({gauge('probe_attached')})"
_BAD_PROBES = f"({_ATTACHED} == 0 or {_ATTACHED} and {_PROBE} ({count('probe_missed_total', over=RANGE)}) > 0)"


def health() -> list[Json]:
    """The row on the health of the tracers."""
    missed = total(f"{HOST}, function", "probe_missed_total", RANGE)
    return [
        stat(
            "Tracers down",
            "Targets that Prometheus cannot scrape now, of jobs with `msrtrace` in their name.",
            host_count(f"{_UP} == 0", _UP, RANGE),
            unit="none",
            absent="no targets",
            thresholds=BAD,
        ),
        stat(
            "Hosts with probes missing",
            "Hosts on which a function that should be probed is not. The table says which.",
            host_count(UNPROBED, metric("probe_attached")),
            unit="none",
            absent="no hosts",
            thresholds=BAD,
        ),
        stat(
            "Fullest map",
            "How full the fullest BPF map is. When one is full, counts are dropped.",
            f"max({_full()})",
            unit=SHARE,
            absent="no maps",
            thresholds=steps((None, GREEN), (0.8, ORANGE), (1, RED)),
            decimals=1,
        ),
        stat(
            "Slowest scrape",
            "The longest time that a tracer took to read its counts at the last scrape.",
            f"max({_of_host('scrape_duration_seconds')})",
            unit="s",
            absent="no hosts",
            thresholds=steps((None, GREEN), (1, ORANGE), (5, RED)),
        ),
        stat(
            "Failed scrapes",
            "Scrapes within the last minutes that showed older counts, because reading failed.",
            total("", "scrape_failures_total", STEP),
            unit="none",
            absent="no hosts",
            decimals=0,
            thresholds=BAD,
        ),
        stat(
            "Calls in progress",
            "Calls that are not counted yet. A call is counted once its vCPU is known to have left it, so a few are "
            "normal.",
            by("", gauge("open_calls")),
            unit="none",
            absent="no hosts",
            decimals=0,
        ),
        stat(
            "Reloads of KVM's module",
            "Within the last minutes. msrtrace attaches again and keeps its counters; but whether the patch is missing "
            "is then undecided, as the counts may be of two modules.",
            total("", "module_unloads_total", STEP),
            unit="none",
            absent="no hosts",
            decimals=0,
        ),
        table(
            "Tracers",
            "The selected targets, those first that Prometheus cannot scrape now: what runs there, since when, and "
            "how many counts it has lost since then. Any loss makes the counts of that host lower bounds. If a kernel, "
            "vendor or patch is selected, a target that is down is here if it was known in the time shown.",
            [
                selected(_UP, RANGE),
                selected(f"group by ({HOST}, version, backend) ({BUILD})"),
                f"time() - {_of_host('process_start_time_seconds')}",
                by(HOST, f"sum by ({HOST}) ({LOST})"),
            ],
            [
                Column("instance", "Host", variable="instance"),
                Column("Value #A", "State", unit="none", mappings=names(UP), width=110),
                Column("version", "Version", width=110),
                Column("backend", "Backend", width=110),
                Column("Value #C", "Running for", unit="s", decimals=1, width=130),
                Column("Value #D", "Lost counts", unit="none", decimals=0, thresholds=BAD, width=130),
            ],
            sort="State",
            descending=False,
            size=(20, 8),
        ),
        table(
            "Probes",
            "Functions that are not probed, or of which runs were missed in the time shown. One that is not attached "
            "is not counted; one with missed runs makes every count of its host a lower bound. Empty unless there is "
            "such a function.",
            [selected(_BAD_PROBES), f"{missed} and {selected(_BAD_PROBES)}"],
            [
                Column("instance", "Host", variable="instance"),
                Column("function", "Function"),
                Column("Value #A", "Attached", unit="none", mappings=names(ATTACHED), width=120),
                Column("Value #B", "Missed runs", unit="none", decimals=0, thresholds=BAD, width=130),
            ],
            sort="Attached",
            descending=False,
            absent="all probed, no runs missed",
            size=(12, 8),
        ),
        graph(
            "Counts lost",
            "What was not counted, in each step of the graph: runs of a function that its probes missed, updates of a "
            "BPF map that was full, returns without an entry, bitmaps that could not be read; refused accesses without "
            "an exit (empty unless a host runs `msrtrace run --exits`). Normally 0.",
            *(Query(total("", kind, STEP), what) for kind, what in LOSSES.items()),
            unit="none",
            size=(12, 8),
        ),
        graph(
            "Counts lost, by host",
            "The sum of these losses." + TEN_HIGHEST,
            Query(highest(_lost, STEP), HOST_LEGEND),
            unit="none",
            size=(8, 8),
        ),
        graph(
            "Scrape time",
            "Time that msrtrace took to read its counts from the kernel." + TEN_HIGHEST,
            Query(highest(partial(_of_host, "scrape_duration_seconds")), HOST_LEGEND),
            unit="s",
            size=(8, 8),
        ),
        graph(
            "Fullest map, by host",
            "How full each host's fullest map is." + TEN_HIGHEST,
            Query(highest(_full), HOST_LEGEND),
            unit=SHARE,
            size=(8, 8),
        ),
        graph(
            "Memory of msrtrace",
            "Resident memory of the tracer itself." + TEN_HIGHEST,
            Query(highest(partial(_of_host, "process_resident_memory_bytes")), HOST_LEGEND),
            unit="bytes",
            size=(8, 8),
        ),
        graph(
            "CPU of msrtrace",
            "CPU time of the tracer itself, without its probes in the kernel: 100 % is one full CPU." + TEN_HIGHEST,
            Query(highest(partial(total, HOST, "process_cpu_seconds_total")), HOST_LEGEND),
            unit=SHARE,
            size=(8, 8),
        ),
    ]
