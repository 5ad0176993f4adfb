# SPDX-License-Identifier: GPL-2.0-or-later
"""Synthetic fleets as a Prometheus stores them, and servers for them."""

from __future__ import annotations

import json
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from made import svm_pass

from tracer.model.snapshot import Snapshot
from tracer.model.svm import SVM
from tracer.report.fleet import prometheus_api
from tracer.report.fleet.fleet import reports
from tracer.report.fleet.prometheus_api import Prometheus, Series
from tracer.report.report import Report

Samples = dict[float, float]
Stored = dict[str, list[tuple[dict[str, str], Samples]]]
#: A server's answer (status and body) to a form and headers, and the path as `:path`.
Answer = Callable[[dict[str, str], dict[str, str]], tuple[int, bytes]]

CALLS = "msrtrace_intercept_calls_total"
REDUNDANT = "msrtrace_intercept_redundant_calls_total"
UPDATES = "msrtrace_filter_updates_total"
START = "process_start_time_seconds"
LOCAL = {"job": "msrtrace", "instance": "127.0.0.1:9753"}
#: The MSRs of a filter update that a patched kernel makes 13 disabling calls in, and their direction.
DISABLED = (("0x10", "read"), *((hex(0x174 + i), access) for i in range(6) for access in ("read", "write")))


@contextmanager
def serving(answer: Answer, tls: ssl.SSLContext | None = None, **more: str) -> Iterator[str]:
    """Serve answers, with `more` headers (`Content_Type`); yields the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            form = urllib.parse.parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode())
            status, body = answer(dict(form), {**dict(self.headers), ":path": self.path})
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in more.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def success(data: object) -> tuple[int, bytes]:
    """A successful answer with that data."""
    return 200, json.dumps({"status": "success", "data": data}).encode()


def fleet_reports(stored: Stored, now: float, *selectors: str, window: int = 3600) -> list[Report]:
    """The reports on the stored hosts that the selectors match (none: all)."""
    with serving(storing(stored, now)) as url:
        return reports(Prometheus(url), selectors or [""], window, now)


def counted(stored: Stored, now: float, *selectors: str, window: int = 3600) -> dict[str, tuple[int, int]]:
    """Filter updates and calls by the title of the report."""
    return {
        report.title: (report.totals.filter_updates or 0, report.totals.calls or 0)
        for report in fleet_reports(stored, now, *selectors, window=window)
    }


def storing(stored: Stored, now: float, asked: list[str] | None = None) -> Answer:
    """A Prometheus with these series. A selector is `label="value", ...`; without any such pair it matches all."""

    def answer(form: dict[str, str], headers: dict[str, str]) -> tuple[int, bytes]:
        query = form["query"]
        if asked is not None:
            asked.append(query)
        if query == "time()":
            return success({"resultType": "scalar", "result": [now, str(now)]})
        name, _, rest = query.partition("{")
        pairs = [part.strip().split("=", 1) for part in rest.partition("}")[0].split(",") if "=" in part]
        wanted = {label: value.strip('"') for label, value in pairs}
        series = [(labels, at) for labels, at in stored.get(name, []) if matches(labels, wanted)]
        matrix = [{"metric": labels, "values": [[t, str(v)] for t, v in at.items()]} for labels, at in series]
        return success({"resultType": "matrix", "result": matrix})

    return answer


def remembering(stored: Stored, now: float) -> Answer:
    """As `storing`, but only with the samples in the window that is asked for."""

    def answer(form: dict[str, str], headers: dict[str, str]) -> tuple[int, bytes]:
        if "time" not in form:
            return storing(stored, now)(form, headers)
        window = float(form["query"].rpartition("[")[2].removesuffix("s]"))
        end = float(form["time"])
        return storing(only(stored, end - window, end), now)(form, headers)

    return answer


class InMemory(Prometheus):
    """A server that stores the series in memory."""

    def __init__(self, stored: Stored) -> None:
        super().__init__("http://in-memory")
        self.stored = stored

    def series(self, name: str, selector: str, window: int, end: float) -> list[Series]:
        """As a Prometheus answers; the selector is one pair, or empty."""
        label, _, value = selector.partition("=")
        wanted = {label: value.strip('"')} if label else {}
        found = [(labels, samples) for labels, samples in self.stored.get(name, []) if matches(labels, wanted)]
        inside = [(labels, {t: v for t, v in s.items() if end - window < t <= end}) for labels, s in found]
        return [Series(labels, prometheus_api.Samples.of(samples)) for labels, samples in inside if samples]


def matches(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether labels have the wanted values; a missing label is empty."""
    return all(labels.get(name, "") == value for name, value in wanted.items())


def host(
    target: Mapping[str, str],
    scrapes: list[float],
    *,
    enables: int = 0,
    updates: int = 100,
    before: float = 1000,
    start: float | None = 5.0,
    info: Mapping[str, str] | None = None,
) -> Stored:
    """A host that made filter updates between the first scrape and the last, each of 13 disables and some enables.

    :param before: the value of its counters at the first scrape
    :param start: when msrtrace started there; None: not stored
    """

    def grown(total: float) -> Samples:
        return {t: before + total * i // (len(scrapes) - 1) for i, t in enumerate(scrapes)}

    def call(msr: str, access: str, action: str) -> dict[str, str]:
        return {**target, "msr": msr, "access": access, "action": action, "cause": "filter_change", "name": "?"}

    rows = [call(msr, access, "disable") for msr, access in DISABLED]
    rows += [call(hex(0x3F0 + i), "read", "enable") for i in range(enables)]
    labels = {"layout": "toggle", "redundancy": "exact", "kernel": "6.1", "version": "1", "backend": "kprobe"}
    always = dict.fromkeys(scrapes, 1.0)
    stored: Stored = {
        "msrtrace_build_info": [({**target, **labels, **(info or {})}, always)],
        CALLS: [(row, grown(updates)) for row in rows],
        REDUNDANT: [(row, grown(updates)) for row in rows],
        UPDATES: [(dict(target), grown(updates))],
        "msrtrace_filter_update_duration_seconds_sum": [(dict(target), grown(updates / 1000))],
        "msrtrace_probe_attached": [({**target, "function": "vmx_enable_intercept_for_msr"}, always)],
    }
    if start is not None:
        stored[START] = [(dict(target), dict.fromkeys(scrapes, start))]
    return stored


def amd_host(
    target: Mapping[str, str],
    scrapes: list[float],
    *,
    counted: Callable[[int], Snapshot] = svm_pass,
    updates: int = 100,
    changing: bool = True,
) -> Stored:
    """A host with kvm_amd: `counted` makes the counts of so many updates.

    :param changing: whether any call changes anything
    """
    made = counted(updates)
    always = dict.fromkeys(scrapes, 1.0)
    last = len(scrapes) - 1
    stored = host(
        target, scrapes, updates=updates, info={"layout": made.layout, "kernel": "6.12", "vendor": made.vendor}
    )
    functions = [name for layout in SVM.layouts if layout.name == made.layout for name in layout.calls]
    stored["msrtrace_probe_attached"] = [({**target, "function": name}, always) for name in functions]
    stored[CALLS], stored[REDUNDANT] = [], []
    for call, outcome in made.calls.items():
        if call.cause == "filter_change":
            kind = {
                "msr": hex(call.msr),
                "access": call.access,
                "action": call.action,
                "cause": call.cause,
                "name": "?",
            }
            redundant = outcome.redundant if changing else outcome.calls
            for metric, total in ((CALLS, outcome.calls), (REDUNDANT, redundant or 0)):
                samples = {time: 1000.0 + total * i // last for i, time in enumerate(scrapes)}
                stored[metric].append(({**target, **kind}, samples))
    return stored


def only(stored: Stored, first: float, last: float) -> Stored:
    """The samples from `first` to `last`, both included."""
    return {
        name: [(labels, {t: v for t, v in samples.items() if first <= t <= last}) for labels, samples in series]
        for name, series in stored.items()
    }


def upgraded(target: Mapping[str, str], at: float) -> Stored:
    """A host that made 100 updates without the patch in the minute before `at`, and 60 with it in the hour after."""
    old, new = {"kernel": "5.19.17"}, {"kernel": "6.1.0"}
    before = host(target, [at - 60, at - 30, at], enables=17, updates=100, start=at - 9000, info=old)
    later = [at + 2000, at + 2600, at + 3600]
    return merged(before, host(target, later, updates=60, before=0, start=at + 1990, info=new))


def labelled(stored: Stored, **labels: str) -> Stored:
    """The series with additional labels."""
    return {name: [({**old, **labels}, samples) for old, samples in series] for name, series in stored.items()}


def merged(*hosts: Stored) -> Stored:
    """The series of all hosts on one server."""
    names = {name for one in hosts for name in one}
    return {name: [series for one in hosts for series in one.get(name, [])] for name in names}


def relabelled(stored: Stored, since: float, changed: Mapping[str, str | None]) -> Stored:
    """The series with labels changed (None: removed) in the samples from `since` on."""

    def labels_after(labels: dict[str, str]) -> dict[str, str]:
        return {name: value for name, value in {**labels, **changed}.items() if value is not None}

    result: Stored = {}
    for name, series in stored.items():
        for labels, samples in series:
            before = {t: v for t, v in samples.items() if t < since}
            after = {t: v for t, v in samples.items() if t >= since}
            parts = ((labels, before), (labels_after(labels), after))
            result.setdefault(name, []).extend(part for part in parts if part[1])
    return result


def lines(stored: Stored, milliseconds: bool) -> Iterable[str]:
    """The series in the text format, with timestamps in milliseconds, or in seconds as in OpenMetrics."""
    for name, series in sorted(stored.items()):
        yield f"# TYPE {name.removesuffix('_total')} {'counter' if name.endswith('_total') else 'gauge'}"
        for labels, samples in series:
            inside = ",".join(f"{label}={json.dumps(value)}" for label, value in labels.items())
            for time, value in sorted(samples.items()):
                yield f"{name}{{{inside}}} {value!r} {round(time * 1000) if milliseconds else time}"


def openmetrics(stored: Stored) -> str:
    """The series for `promtool tsdb create-blocks-from openmetrics`."""
    return "\n".join([*lines(stored, milliseconds=False), "# EOF\n"])


def exposition(stored: Stored) -> str:
    """The series for VictoriaMetrics' /api/v1/import/prometheus."""
    return "\n".join([*lines(stored, milliseconds=True), ""])
