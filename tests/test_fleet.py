"""Reports from a Prometheus: exact counts out of stored samples, and every way in which asking can fail."""

from __future__ import annotations

import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.compare import compare
from tracer.errors import MsrtraceError
from tracer.fleet import Prometheus, increase, reports, seconds
from tracer.views import sentence

NOW = 1_000_000.0
SCRAPES = [NOW - 60, NOW - 45, NOW - 30, NOW - 15, NOW]
Samples = dict[float, float]
Stored = dict[str, list[tuple[dict[str, str], Samples]]]


@pytest.fixture
def served() -> Iterator[Callable[[Callable[[dict[str, str], dict[str, str]], tuple[int, bytes]]], str]]:
    """Serve a function of the form and the headers at a URL."""
    servers: list[ThreadingHTTPServer] = []

    def serve(answer: Callable[[dict[str, str], dict[str, str]], tuple[int, bytes]]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                form = urllib.parse.parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode())
                status, body = answer(dict(form), dict(self.headers))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


Serve = Callable[[Callable[[dict[str, str], dict[str, str]], tuple[int, bytes]]], str]


def success(data: object) -> tuple[int, bytes]:
    return 200, json.dumps({"status": "success", "data": data}).encode()


def storing(stored: Stored, asked: list[str] | None = None) -> Callable[[dict[str, str], object], tuple[int, bytes]]:
    """A Prometheus that has stored that, whatever the selector."""

    def answer(form: dict[str, str], headers: object) -> tuple[int, bytes]:
        query = form["query"]
        if asked is not None:
            asked.append(query)
        if query == "time()":
            return success({"resultType": "scalar", "result": [NOW, str(NOW)]})
        found = stored.get(query.partition("{")[0], [])
        matrix = [{"metric": labels, "values": [[t, str(v)] for t, v in at.items()]} for labels, at in found]
        return success({"resultType": "matrix", "result": matrix})

    return answer


def host(instance: str, *, enables: int, updates: int, layout: str = "toggle", redundancy: str = "exact") -> Stored:
    """One that made UPDATES filter updates between the first scrape and the last, of 13 disables and ENABLES each."""
    target = {"job": "msrtrace", "instance": instance}

    def grown(total: float) -> Samples:
        return {t: 1000 + total * i // 4 for i, t in enumerate(SCRAPES)}

    def call(msr: str, access: str, action: str) -> dict[str, str]:
        return target | {"msr": msr, "access": access, "action": action, "cause": "filter_change", "name": "?"}

    disables = [call(hex(0x174 + i), access, "disable") for i in range(6) for access in ("read", "write")]
    rows = [call("0x10", "read", "disable"), *disables]
    rows += [call(hex(0x3F0 + i), "read", "enable") for i in range(enables)]
    info = target | {"layout": layout, "redundancy": redundancy, "kernel": "6.1", "version": "1", "backend": "kprobe"}
    return {
        "msrtrace_build_info": [(info, dict.fromkeys(SCRAPES, 1.0))],
        "process_start_time_seconds": [(target, dict.fromkeys(SCRAPES, 5.0))],
        "msrtrace_intercept_calls_total": [(labels, grown(updates)) for labels in rows],
        "msrtrace_intercept_redundant_calls_total": [(labels, grown(updates)) for labels in rows],
        "msrtrace_filter_updates_total": [(target, grown(updates))],
        "msrtrace_filter_update_duration_seconds_sum": [(target, grown(updates / 1000))],
        "msrtrace_probe_attached": [
            (target | {"function": "vmx_enable_intercept_for_msr"}, dict.fromkeys(SCRAPES, 1.0))
        ],
    }


def together(*hosts: Stored) -> Stored:
    names = {name for one in hosts for name in one}
    return {name: [series for one in hosts for series in one.get(name, [])] for name in names}


def test_many_hosts_are_compared_exactly(served: Serve) -> None:
    asked: list[str] = []
    missing = together(host("a", enables=17, updates=100), host("b", enables=17, updates=40))
    unpatched = reports(Prometheus(served(storing(missing, asked))), ['{patch="missing"}'], 3600, NOW)
    patched = reports(Prometheus(served(storing(host("c", enables=0, updates=60)))), ["x"], 3600, NOW)
    assert [r.totals.filter_updates for r in unpatched] == [100, 40]
    assert [r.verdict.patched for r in (*unpatched, *patched)] == [False, False, True]
    assert asked[0] == 'msrtrace_build_info{patch="missing"}[3600s]'
    comparison = compare(unpatched, patched, titles=("old", "new"))
    assert sentence(comparison).startswith("old makes 30 calls a filter update, 30 of them redundant; new 13, 13 ")
    assert not [warning for warning in comparison.warnings if "differ between" in warning]


def test_hosts_without_filter_updates_are_left_out(served: Serve) -> None:
    busy, idle = host("a", enables=17, updates=100), host("b", enables=17, updates=0)
    found = reports(Prometheus(served(storing(together(busy, idle)))), [""], 60, NOW)
    assert [report.title for report in found] == ["a"]
    [alone] = reports(Prometheus(served(storing(idle))), [""], 60, NOW)
    assert alone.totals.filter_updates == 0


def test_of_a_host_that_tells_vms_apart_the_sums_count(served: Serve) -> None:
    """Its series by VM end with the VMs."""
    apart = host("a", enables=17, updates=100)
    names = [name for name in apart if name.startswith(("msrtrace_intercept", "msrtrace_filter"))]
    sums = {name.replace("msrtrace_", "msrtrace_host_"): apart[name] for name in names}
    gone = {
        name: [(labels | {"vm": "x", "pid": "1"}, {SCRAPES[0]: 7.0})] for name in names for labels, _ in apart[name]
    }
    [found] = reports(Prometheus(served(storing(apart | gone | sums))), [""], 60, NOW)
    assert (found.totals.filter_updates, found.totals.calls) == (100, 3000)


def test_a_host_that_was_started_anew_with_by_vm_keeps_what_it_counted_before(served: Serve) -> None:
    target = {"job": "msrtrace", "instance": "a"}
    stored = host("a", enables=17, updates=100) | {
        "process_start_time_seconds": [(target, dict(zip(SCRAPES, [5.0, 5, 5, 9, 9], strict=True)))],
        "msrtrace_filter_updates_total": [
            (target, dict(zip(SCRAPES[:3], [10.0, 15, 30], strict=True))),
            (target | {"vm": "x", "pid": "1"}, {SCRAPES[4]: 7.0}),
        ],
        "msrtrace_host_filter_updates_total": [(target, dict(zip(SCRAPES[3:], [3.0, 7], strict=True)))],
    }
    [found] = reports(Prometheus(served(storing(stored))), [""], 60, NOW)
    assert found.totals.filter_updates == 20 + 7


def test_a_counter_that_restarts_counts_on() -> None:
    samples = dict(zip(SCRAPES, [100.0, 130.0, 5.0, 25.0, 25.0], strict=True))
    assert increase(samples, SCRAPES, set()) == 30 + 5 + 20
    # A new process may pass the old one's count before the next scrape: only its start tells.
    faster = dict(zip(SCRAPES, [100.0, 130.0, 140.0, 150.0, 150.0], strict=True))
    assert increase(faster, SCRAPES, {SCRAPES[2]}) == 30 + 140 + 10
    assert increase(faster, SCRAPES, set()) == 50


def test_a_series_that_comes_later_counts_from_zero_and_one_that_goes_keeps_its_count() -> None:
    assert increase({SCRAPES[2]: 7.0, SCRAPES[4]: 9.0}, SCRAPES, set()) == 9
    assert increase({SCRAPES[0]: 3.0, SCRAPES[1]: 9.0}, SCRAPES, set()) == 6
    assert increase({}, SCRAPES, set()) == 0


@given(st.lists(st.integers(0, 50), min_size=4, max_size=4), st.integers(0, 10**9))
def test_what_was_added_between_scrapes_is_the_increase(added: list[int], first: int) -> None:
    value, samples = first, {SCRAPES[0]: float(first)}
    for time, more in zip(SCRAPES[1:], added, strict=True):
        value += more
        samples[time] = float(value)
    assert increase(samples, SCRAPES, set()) == sum(added)


def test_losses_and_lost_probes_make_a_lower_bound(served: Serve) -> None:
    fine = host("a", enables=0, updates=8)
    assert not reports(Prometheus(served(storing(fine))), [""], 60, NOW)[0].lower_bound
    target = {"job": "msrtrace", "instance": "a"}
    lossy = fine | {"msrtrace_dropped_updates_total": [(target | {"map": "calls"}, {SCRAPES[0]: 1.0, SCRAPES[4]: 3.0})]}
    assert reports(Prometheus(served(storing(lossy))), [""], 60, NOW)[0].loss.dropped_updates == {"calls": 2}
    function = {"function": "vmx_enable_intercept_for_msr"}
    blind = fine | {"msrtrace_probe_attached": [(target | function, {SCRAPES[0]: 1.0, SCRAPES[1]: 0.0})]}
    found = reports(Prometheus(served(storing(blind))), [""], 60, NOW)[0]
    assert found.loss.not_probed == ["vmx_enable_intercept_for_msr"]
    assert found.lower_bound
    # Not probed, but of no consequence for the counts.
    other = fine | {"msrtrace_probe_attached": [(target | {"function": "vmx_vcpu_create"}, {SCRAPES[0]: 0.0})]}
    assert not reports(Prometheus(served(storing(other))), [""], 60, NOW)[0].lower_bound


def test_what_a_host_cannot_show_is_null_and_not_zero(served: Serve) -> None:
    unknown = host("a", enables=0, updates=8, redundancy="unknown") | {"msrtrace_intercept_redundant_calls_total": []}
    [found] = reports(Prometheus(served(storing(unknown))), [""], 60, NOW)
    assert (found.totals.calls, found.totals.redundant) == (8 * 13, None)
    degraded = host("a", enables=0, updates=8, layout="filter-only") | {"msrtrace_intercept_calls_total": []}
    [found] = reports(Prometheus(served(storing(degraded))), [""], 60, NOW)
    assert (found.totals.calls, found.totals.filter_updates) == (None, 8)


def test_kernels_of_different_layouts_need_outcomes_per_bit(served: Serve) -> None:
    """A call for both bits that changed something has changed either or both: the metrics do not tell."""
    new = host("b", enables=0, updates=8, layout="recalc")
    labels = new["msrtrace_intercept_calls_total"][0][0] | {"access": "read_write", "msr": "0xc0000100"}
    new["msrtrace_intercept_calls_total"].append((labels, dict(zip(SCRAPES, [0.0, 8, 8, 8, 8], strict=True))))
    [old] = reports(Prometheus(served(storing(host("a", enables=0, updates=8)))), [""], 60, NOW)
    with pytest.raises(MsrtraceError, match="takes outcomes per bit"):
        compare([old], reports(Prometheus(served(storing(new))), [""], 60, NOW))


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (400, b'{"status":"error","error":"parse error: unexpected }"}', "refuses: parse error: unexpected }"),
        (404, b"<html>not here</html>", "refuses: 404"),
        (200, b"<html>a proxy</html>", "cannot ask Prometheus"),
        (200, b'{"status":"error"}', "does not answer as a Prometheus does"),
        (200, b"[]", "does not answer as a Prometheus does"),
        (200, b'{"status":"success","data":{"result":[]}}', "stored nothing of msrtrace for {a} in the last 60 s"),
        (200, b'{"status":"success","data":{}}', "does not answer as a Prometheus does"),
        (200, b'{"status":"success","data":{"result":[{"values":[1]}]}}', "does not answer as a Prometheus does"),
    ],
)
def test_what_is_no_prometheus_is_said_in_a_line(served: Serve, status: int, body: bytes, said: str) -> None:
    with pytest.raises(MsrtraceError) as error:
        reports(Prometheus(served(lambda form, headers: (status, body))), ["{a}"], 60, NOW)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_nobody_there() -> None:
    with pytest.raises(MsrtraceError, match=r"cannot ask Prometheus at http://127\.0\.0\.1:1: .*refused"):
        Prometheus("127.0.0.1:1").now()


@pytest.mark.parametrize("url", ["ftp://x", "http://", "", "http://[::1"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(MsrtraceError, match="is no URL of a Prometheus"):
        Prometheus(url)


def test_a_user_and_a_password_are_sent_and_not_shown(served: Serve) -> None:
    seen: list[str] = []

    def answer(form: dict[str, str], headers: dict[str, str]) -> tuple[int, bytes]:
        seen.append(headers["Authorization"])
        return 401, b"{}"

    url = served(answer).replace("http://", "http://us%40er:secret@")
    with pytest.raises(MsrtraceError) as error:
        Prometheus(url).now()
    assert seen == ["Basic dXNAZXI6c2VjcmV0"]
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"), [("90s", 90), ("15m", 900), ("1h30m", 5400), ("2d", 172800), ("1w", 604800)]
)
def test_durations(text: str, value: int) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "5", "h", "1.5h", "-1h", "1y", "0s", "99999w"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        seconds(text)
