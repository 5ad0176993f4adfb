# SPDX-License-Identifier: GPL-2.0-or-later
"""What a scrape costs on this machine: milliseconds of CPU (user and system), by the number of series.

`make scrape-cost` prints the table in docs/cost.md. The series are those of `--by-vm`. Each row is measured in a
process of its own; the client is another one. The best of several scrapes: what is more is other people's work.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))

from made import crowd
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from tabulate import tabulate

from tracer.export.exposition import exposed
from tracer.export.metrics import SnapshotCollector
from tracer.export.server import Server

SERIES = (100, 1_000, 10_000, 30_000)
_OF_A_VM, _OF_THE_HOST = 69, 80
_REPEATS = 7
#: What Prometheus 3 sends.
PROMETHEUS = {
    "Accept": "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.2",
    "Accept-Encoding": "gzip",
}
_CLIENT = """
import json, sys, urllib.request
for line in sys.stdin:
    url, headers = json.loads(line)
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
        print(len(answer.read()), flush=True)
"""


class Made(Collector):
    """Families that were collected before."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def milliseconds(work: Callable[[], object]) -> float:
    """The least CPU time that the work takes, in all threads of this process."""

    def once() -> float:
        before = time.process_time()
        work()
        return (time.process_time() - before) * 1000

    return min(once() for _ in range(_REPEATS))


def _resident() -> float:
    """The memory of this process, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def row(series: int) -> dict[str, float]:
    """The figures of a host with about that many series."""
    empty = _resident()
    snapshot = crowd(math.ceil((series - _OF_THE_HOST) / _OF_A_VM))
    registry, collector = CollectorRegistry(), SnapshotCollector(lambda: snapshot, "0.1.0")
    ProcessCollector(registry=registry)
    registry.register(collector)
    server = Server(registry, ("127.0.0.1", 0)).start()
    client = subprocess.Popen([sys.executable, "-c", _CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert client.stdin
    assert client.stdout

    def scrape(headers: dict[str, str]) -> int:
        print(json.dumps([server.url, headers]), file=client.stdin, flush=True)
        return int(client.stdout.readline())  # type: ignore[union-attr]

    first_at = time.process_time()
    Made(SnapshotCollector(lambda: snapshot, "0.1.0").collect())
    first = (time.process_time() - first_at) * 1000
    made = Made(registry.collect())
    figures = {
        "series": sum(len(family.samples) for family in made.collect()),
        "families": milliseconds(lambda: Made(collector.collect())),
        "... the first time": first,
        "text": milliseconds(lambda: exposed(made)),
        "... OpenMetrics": milliseconds(lambda: exposed(made, as_openmetrics=True)),
        "prometheus_client's text": milliseconds(lambda: generate_latest(made)),
        "... OpenMetrics ": milliseconds(lambda: openmetrics.generate_latest(made)),  # type: ignore[no-untyped-call]
        "whole scrape, plain": milliseconds(lambda: scrape({})),
        "... as Prometheus asks": milliseconds(lambda: scrape(PROMETHEUS)),
        "kB, plain": scrape({}) / 1000,
        "kB, gzip": scrape(PROMETHEUS) / 1000,
        "MB of memory more": _resident() - empty,
    }
    client.stdin.close()
    client.wait()
    return figures


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def main() -> None:
    """Print the table, or the figures of one process."""
    if len(sys.argv) > 1:
        print(json.dumps(row(int(sys.argv[1]))))
        return
    rows = [
        json.loads(subprocess.run([sys.executable, __file__, str(n)], check=True, stdout=subprocess.PIPE).stdout)
        for n in SERIES
    ]
    shown = [
        [name, *(f"{one[name]:,.0f}" if one[name] >= 100 else f"{one[name]:.1f}" for one in rows)] for name in rows[0]
    ]
    headers, *lines = shown
    print(tabulate(lines, headers, tablefmt="github", colalign=["left", *["right"] * len(rows)], disable_numparse=True))


if __name__ == "__main__":
    main()
