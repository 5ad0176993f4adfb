"""Reports of many hosts from what a Prometheus stored of them: the engine for more than one machine.

Counts are taken from the stored samples themselves. PromQL's increase() extrapolates to the edges of its window, which
makes 12.98 calls of 13.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from tracer.errors import MsrtraceError
from tracer.layout import LAYOUTS
from tracer.report import Report
from tracer.reporting import Circumstances, make
from tracer.snapshot import DURATION_BOUNDS, Call, Durations, Map, Outcome, Probe, Snapshot

_TIMEOUT_SECONDS = 60.0
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_UPDATE = "msrtrace_filter_update_duration_seconds"
#: With --by-vm these are by VM, and end with it; then there are others, called msrtrace_host_..., of all VMs together.
_PER_VM = (
    "msrtrace_intercept_calls_total",
    "msrtrace_intercept_redundant_calls_total",
    "msrtrace_filter_updates_total",
    f"{_UPDATE}_bucket",
    f"{_UPDATE}_sum",
)
_COUNTERS = (
    *_PER_VM,
    "msrtrace_probe_missed_total",
    "msrtrace_dropped_updates_total",
    "msrtrace_unpaired_returns_total",
    "msrtrace_read_failures_total",
    "msrtrace_reattachments_total",
)

Labels = Mapping[str, str]
Target = tuple[str, str]  # the labels job and instance


def seconds(text: str) -> int:
    """A duration as Prometheus writes it, such as 90s, 15m, 1h30m or 2d, in seconds. Raises ValueError."""
    if not re.fullmatch(r"(\d+[smhdw])+", text):
        raise ValueError(f"{text!r} is no duration such as 90s, 15m, 1h or 2d")
    total = sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+)([smhdw])", text))
    if not 0 < total <= 10 * 365 * 86400:
        raise ValueError(f"{text!r} is no duration of up to ten years")
    return total


@dataclass(frozen=True)
class Series:
    """A time series: its labels, and its samples by timestamp."""

    labels: Labels
    samples: Mapping[float, float]

    @property
    def target(self) -> Target:
        """Where it was scraped from."""
        return self.labels.get("job", ""), self.labels.get("instance", "")


class Prometheus:
    """A Prometheus server, or what speaks its HTTP API, at a URL (which may hold a user and a password)."""

    def __init__(self, url: str) -> None:
        """Raises MsrtraceError if URL is none."""
        try:
            parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        except ValueError:
            parts = urllib.parse.urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise MsrtraceError(f"{url!r} is no URL of a Prometheus, such as http://127.0.0.1:9090")
        host = parts.netloc.rpartition("@")[2]
        self.url = urllib.parse.urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
        self._headers = {"Accept": "application/json"}
        if parts.username:
            user = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            self._headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"

    def _query(self, expression: str, time: float | None = None) -> Any:
        """The `data` of an instant query. Raises MsrtraceError."""
        form = {"query": expression} | ({"time": f"{time:.3f}"} if time is not None else {})
        request = urllib.request.Request(
            f"{self.url}/api/v1/query", data=urllib.parse.urlencode(form).encode(), headers=self._headers
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
                said = json.load(answer)
        except urllib.error.HTTPError as error:
            raise MsrtraceError(f"Prometheus at {self.url} refuses: {_reason(error)}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error)
            raise MsrtraceError(f"cannot ask Prometheus at {self.url}: {why}") from None
        if not isinstance(said, dict) or said.get("status") != "success":
            raise self._strange()
        return said.get("data")

    def _strange(self) -> MsrtraceError:
        return MsrtraceError(f"{self.url} does not answer as a Prometheus does")

    def now(self) -> float:
        """The server's clock, in seconds since 1970."""
        try:
            return float(self._query("time()")["result"][1])
        except (KeyError, IndexError, TypeError, ValueError):
            raise self._strange() from None

    def samples(self, name: str, selector: str, window: int, end: float) -> list[Series]:
        """What was stored of the metric NAME in WINDOW seconds before END, as it was scraped."""
        found = self._query(f"{name}{{{selector}}}[{window}s]", end)
        try:
            return [
                Series(one["metric"], {float(t): float(value) for t, value in one["values"]}) for one in found["result"]
            ]
        except (KeyError, TypeError, ValueError):
            raise self._strange() from None


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"{error.code} {error.reason}"


def reports(prometheus: Prometheus, selectors: Iterable[str], window: int, end: float) -> list[Report]:
    """A report for each host that any of SELECTORS matches, in the WINDOW seconds before END (seconds since 1970).

    A selector is what stands between the braces of an instant vector selector, with or without them: `patch="x"`.
    Hosts on which no filter changed are left out, unless that leaves none. Raises MsrtraceError if no host matches.
    """
    found: dict[Target, Report] = {}
    for selector in selectors:
        inside = selector.strip().removeprefix("{").removesuffix("}").strip().rstrip(",")
        hosts = _stored(prometheus, inside, window, end)
        if not hosts:
            raise MsrtraceError(f"Prometheus has stored nothing of msrtrace for {{{inside}}} in the last {window} s")
        found |= {target: _report(target[1], stored) for target, stored in hosts.items()}
    ordered = [found[target] for target in sorted(found)]
    return [report for report in ordered if report.totals.filter_updates] or ordered


def _stored(prometheus: Prometheus, inside: str, window: int, end: float) -> dict[Target, dict[str, list[Series]]]:
    """The series of each host by their name. Of a host that tells VMs apart, those that have all VMs together."""
    names = ("msrtrace_build_info", "process_start_time_seconds", "msrtrace_probe_attached", *_COUNTERS)
    stored: dict[Target, dict[str, list[Series]]] = defaultdict(lambda: {name: [] for name in names})
    for name in names:
        for series in prometheus.samples(name, inside, window, end):
            stored[series.target][name].append(series)
    for name in _PER_VM:
        together: dict[Target, list[Series]] = defaultdict(list)
        for series in prometheus.samples(name.replace("msrtrace_", "msrtrace_host_"), inside, window, end):
            together[series.target].append(series)
        for target, found in together.items():
            # The others are of a time without --by-vm.
            stored[target][name] = [series for series in stored[target][name] if "vm" not in series.labels] + found
    return {target: found for target, found in stored.items() if found["msrtrace_build_info"]}


def increase(samples: Mapping[float, float], scrapes: list[float], restarts: set[float]) -> float:
    """By how much a counter grew from the first to the last of SCRAPES (timestamps, in order).

    A series that is absent counts from 0 when it comes: msrtrace has a series from its first call on. RESTARTS are
    the scrapes that were the first of a new process, which counts from 0 again.
    """
    total, before = 0.0, samples.get(scrapes[0], 0.0)
    for scrape in scrapes[1:]:
        if scrape in restarts:
            before = 0.0
        value = samples.get(scrape)
        if value is not None:
            total += value - before if value >= before else value
            before = value
    return total


def _report(instance: str, stored: Mapping[str, list[Series]]) -> Report:
    infos = stored["msrtrace_build_info"]
    scrapes = sorted({time for info in infos for time in info.samples})
    starts = sorted(pair for series in stored["process_start_time_seconds"] for pair in series.samples.items())
    restarts = {time for (_, before), (time, now) in pairwise(starts) if now != before}
    last = max(infos, key=lambda info: max(info.samples)).labels
    layouts = {info.labels.get("layout", "") for info in infos}
    grown = {
        name: [(series.labels, increase(series.samples, scrapes, restarts)) for series in found]
        for name, found in stored.items()
        if name in _COUNTERS
    }
    snapshot = _snapshot(last, stored["msrtrace_probe_attached"], grown)
    notes = [f"{instance}: msrtrace was started anew {len(restarts)} times"] if restarts else []
    if len(layouts) > 1:
        notes.append(f"{instance} ran kernels of several layouts")
    return make(
        snapshot,
        Circumstances(kernel=last.get("kernel", "?"), version="", cpu="", kvm_intel={}),
        started=datetime.fromtimestamp(scrapes[0], UTC),
        duration=scrapes[-1] - scrapes[0],
        version=last.get("version", ""),
        label=instance,
        notes=notes,
    )


def _snapshot(info: Labels, attached: list[Series], grown: Mapping[str, list[tuple[Labels, float]]]) -> Snapshot:
    layout = next((known for known in LAYOUTS if known.name == info.get("layout")), None)
    exact = info.get("redundancy") == "exact"
    redundant: dict[tuple[str, ...], int] = defaultdict(int)
    for labels, value in grown["msrtrace_intercept_redundant_calls_total"]:
        redundant[_key(labels)] += round(value)
    calls: dict[tuple[str, ...], int] = defaultdict(int)
    for labels, value in grown["msrtrace_intercept_calls_total"]:
        calls[_key(labels)] += round(value)
    return Snapshot(
        layout=info.get("layout", "?"),
        redundancy="exact" if exact else "unknown",
        backend=info.get("backend", "?"),
        calls={
            _call(key): _outcome(key[1], count, redundant.get(key, 0) if exact else None)
            for key, count in calls.items()
            if count
        },
        updates={0: _durations(grown)} if grown["msrtrace_filter_updates_total"] else {},
        probes=tuple(
            Probe(
                function=series.labels.get("function", ""),
                symbol=None,
                attached=all(series.samples.values()),
                detail="",
                missed=_sum(grown["msrtrace_probe_missed_total"], "function", series.labels.get("function", "")),
            )
            for series in attached
        ),
        maps=tuple(
            Map(labels.get("map", ""), 0, 0, round(value)) for labels, value in grown["msrtrace_dropped_updates_total"]
        ),
        unpaired_returns=_sum(grown["msrtrace_unpaired_returns_total"]),
        read_failures=_sum(grown["msrtrace_read_failures_total"]),
        reattached=_sum(grown["msrtrace_reattachments_total"]),
        calls_observable=bool(layout is None or layout.calls),
        updates_observable=bool(grown["msrtrace_filter_updates_total"]),
    )


def _key(labels: Labels) -> tuple[str, ...]:
    return tuple(labels.get(name, "") for name in ("msr", "access", "action", "cause"))


def _call(key: tuple[str, ...]) -> Call:
    msr, access, action, cause = key
    try:
        return Call(int(msr, 16), access, action, cause, caller="")
    except ValueError:
        raise MsrtraceError(f"Prometheus has a series of another msrtrace: msr={msr!r}") from None


def _outcome(access: str, calls: int, redundant: int | None) -> Outcome:
    """The metrics have no count per bit; it follows, except of a call for both bits that changed something."""
    if redundant is None:
        return Outcome(calls)
    changed = calls - redundant
    read = changed if access == "read" else 0 if access == "write" or not changed else None
    write = changed if access == "write" else 0 if access == "read" or not changed else None
    return Outcome(calls, redundant, read, write)


def _durations(grown: Mapping[str, list[tuple[Labels, float]]]) -> Durations:
    cumulative: dict[float, float] = defaultdict(float)
    for labels, value in grown[f"{_UPDATE}_bucket"]:
        cumulative[float(labels.get("le", "inf"))] += value
    buckets, below = [], 0.0
    for bound in (*DURATION_BOUNDS, float("inf")):
        now = next((v for le, v in cumulative.items() if le == bound or abs(le - bound) < 1e-9 * bound), below)
        buckets.append(max(0, round(now - below)))
        below = max(now, below)
    count = _sum(grown["msrtrace_filter_updates_total"])
    return Durations(count, sum(value for _, value in grown[f"{_UPDATE}_sum"]), tuple(buckets))


def _sum(series: Iterable[tuple[Labels, float]], label: str = "", wanted: str = "") -> int:
    return round(sum(value for labels, value in series if not label or labels.get(label) == wanted))
