# SPDX-License-Identifier: GPL-2.0-or-later
"""The client of Prometheus' HTTP API: its dialects, and every way in which asking can fail."""

from __future__ import annotations

import json

import pytest
from fleets import Answer, serving, success

from tracer.model.errors import MsrtraceError
from tracer.report.fleet.fleet import reports
from tracer.report.fleet.prometheus_api import Prometheus, Samples, seconds

NOW = 1_000_000.0


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (
            400,
            b'{"status":"error","error":"parse error: unexpected }"}',
            "refused the query: parse error: unexpected }",
        ),
        (404, b"<html>not here</html>", "refused the query: 404"),
        (  # Mimir
            422,
            b'{"status":"error","errorType":"execution","error":"the query time range exceeds the limit (query length: '
            b'744h0m0s, limit: 721h0m0s) (err-mimir-max-query-length)"}',
            "refused the query: the query time range exceeds the limit (query length: 744h0m0s, limit: 721h0m0s)",
        ),
        (  # VictoriaMetrics
            422,
            b'{"status":"error","errorType":"422","error":"error when executing query: too many points"}',
            "refused the query: error when executing query: too many points",
        ),
        (401, b'{"message":"no"}', "refused the query: 401"),
        (500, b"[]", "refused the query: 500"),
        (500, b"[" * 100_000, "refused the query: 500"),
        (200, b"<html>a proxy</html>", "cannot query Prometheus"),
        (200, b"[" * 100_000, "cannot query Prometheus"),
        (200, b'{"status":"error"}', "does not answer like a Prometheus"),
        (200, b"[]", "does not answer like a Prometheus"),
        (200, b'{"status":"success","data":{"result":[]}}', "no series of msrtrace for {a} in the last 60 s"),
        (200, b'{"status":"success","data":{}}', "does not answer like a Prometheus"),
        (200, b'{"status":"success","data":{"result":[{"values":[1]}]}}', "does not answer like a Prometheus"),
        (
            200,
            b'{"status":"success","data":{"result":[{"metric":{},"values":[[1,"+Inf"]]}]}}',
            "has stored inf as msrtrace_build_info, which no msrtrace counts",
        ),
        (200, b'{"status":"success","data":{"result":[{"metric":[],"values":[[1,"1"]]}]}}', "does not answer"),
    ],
)
def test_an_unexpected_answer_is_an_error_in_one_line(status: int, body: bytes, why: str) -> None:
    with serving(lambda form, headers: (status, body)) as url, pytest.raises(MsrtraceError) as error:
        reports(Prometheus(url), ["{a}"], 60, NOW)
    assert why in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unreachable_server_is_an_error() -> None:
    with pytest.raises(MsrtraceError, match=r"cannot query Prometheus at http://127\.0\.0\.1:1: .*refused"):
        Prometheus("127.0.0.1:1").now()


@pytest.mark.parametrize("url", ["ftp://x", "http://", "", "http://[::1"])
def test_an_invalid_url_is_an_error(url: str) -> None:
    with pytest.raises(MsrtraceError, match="is not the URL of a Prometheus"):
        Prometheus(url)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://user:secret@host",
        "http://user:secret",  # no host: the password looks like a port
        "http://user:sec/secret@host:9090",
        "http://user:sec#secret@host:9090",
        "http://user:1?secret@host:9090",
        "user:secret@host:port",
        "http://[::1/secret@",
        "ftp://host/?token=secret",
    ],
)
def test_an_invalid_url_never_shows_its_password(url: str) -> None:
    with pytest.raises(MsrtraceError) as error:
        Prometheus(url)
    assert "secret" not in str(error.value)
    assert "URL of " in str(error.value)


def test_a_user_and_a_password_are_sent_and_not_shown() -> None:
    seen: list[str] = []

    def answer(form: dict[str, str], headers: dict[str, str]) -> tuple[int, bytes]:
        seen.append(headers["Authorization"])
        return 401, b"{}"

    with serving(answer) as url, pytest.raises(MsrtraceError) as error:
        Prometheus(url.replace("http://", "http://us%40er:secret@")).now()
    assert seen == ["Basic dXNAZXI6c2VjcmV0"]
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("status", "body", "kind", "why"),
    [
        (401, b"no org id\n", "text/plain; charset=utf-8", "401 Unauthorized: no org id"),  # Mimir, Cortex
        (404, b"404 page not found\n", "text/plain", "404 Not Found: 404 page not found"),
        (502, b"a\x1b[2Jb\nc", "text/plain", r"502 Bad Gateway: a\x1b[2Jb"),
        (401, b"<html>sign in</html>", "text/plain", "401 Unauthorized"),
        (401, b"sign in", "text/html", "401 Unauthorized"),
        (401, b"", "text/plain", "401 Unauthorized"),
    ],
)
def test_an_error_in_plain_text_is_shown(status: int, body: bytes, kind: str, why: str) -> None:
    with serving(lambda form, headers: (status, body), Content_Type=kind) as url, pytest.raises(MsrtraceError) as error:
        Prometheus(url).now()
    assert str(error.value) == f"Prometheus at {url} refused the query: {why}"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed_but_named(status: int) -> None:
    """They would drop the query, or take credentials elsewhere."""
    to = "https://user:secret@login.example/start?state=secret"
    with serving(lambda form, headers: (status, b""), Location=to) as url, pytest.raises(MsrtraceError) as error:
        Prometheus(url.replace("//", "//user:secret@")).now()
    assert str(error.value).endswith(": it redirects to https://login.example/start")
    assert f"refused the query: {status} " in str(error.value)


def answer_with(**more: object) -> Answer:
    reply = {"status": "success", "data": {"resultType": "matrix", "result": []}, **more}
    return lambda form, headers: (200, json.dumps(reply).encode())


#: As Thanos' querier has it when a store cannot be reached and partial_response is on, as it is by default.
THANOS = (
    "No StoreAPIs matched for this query",
    'receive series from Addr: 10.0.0.7:10901 LabelSets: {replica="a"}: rpc error: code = Unavailable',
)


@pytest.mark.parametrize(
    ("more", "incomplete", "notices"),
    [
        ({"warnings": list(THANOS)}, list(THANOS), []),
        ({"warnings": [THANOS[0], THANOS[0]]}, [THANOS[0]], []),
        ({"isPartial": True}, ["the answer is partial (isPartial)"], []),  # VictoriaMetrics' cluster
        ({"isPartial": False}, [], []),
        ({"infos": ["PromQL info: x"]}, [], ["PromQL info: x"]),
        ({"warnings": ["PromQL warning: y"]}, [], ["PromQL warning: y"]),
        ({"warnings": None, "infos": None}, [], []),
        ({"warnings": "x", "infos": 5}, [], []),
        ({"warnings": ["a\x1b[2J"]}, [r"a\x1b[2J"], []),
    ],
)
def test_warnings_of_the_server_are_kept(more: dict[str, object], incomplete: list[str], notices: list[str]) -> None:
    with serving(answer_with(**more)) as url:
        server = Prometheus(url)
        for _ in range(2):
            server.series("x", "", 60, NOW)
    assert (server.incomplete, server.notices) == (incomplete, notices)


def test_a_selector_without_series_says_what_the_server_warned_of() -> None:
    with serving(answer_with(warnings=list(THANOS))) as url, pytest.raises(MsrtraceError) as error:
        reports(Prometheus(url), ["{a}"], 60, NOW)
    assert str(error.value).endswith(f"in the last 60 s; it warned: {THANOS[0]}; it warned: {THANOS[1]}")


def test_thanos_is_asked_for_replicas_as_one_and_for_raw_samples() -> None:
    asked: list[tuple[str, dict[str, str]]] = []

    def answer(form: dict[str, str], headers: dict[str, str]) -> tuple[int, bytes]:
        asked.append((headers[":path"], form))
        return answer_with()(form, headers)

    with serving(answer) as url:
        Prometheus(f"{url}/prometheus/").series("x", "", 60, NOW)
    [(path, form)] = asked
    assert path == "/prometheus/api/v1/query"  # Mimir's and Cortex' prefix
    assert (form["dedup"], form["max_source_resolution"]) == ("true", "0s")
    assert (form["query"], form["time"]) == ("x{}[60s]", "1000000.000")


@pytest.mark.parametrize(
    ("text", "value"), [("90s", 90), ("15m", 900), ("1h30m", 5400), ("2d", 172800), ("1w", 604800)]
)
def test_durations_as_prometheus_writes_them(text: str, value: int) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "5", "h", "1.5h", "-1h", "1y", "0s", "99999w"])
def test_anything_else_is_not_a_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not (a duration|between)"):
        seconds(text)


def clock(result: object) -> Answer:
    return lambda form, headers: success({"resultType": "any", "result": result})


@pytest.mark.parametrize(
    "result",
    [
        [NOW, "1000000"],
        [{"metric": {}, "value": [NOW, "1000000"]}],
        [{"metric": {}, "value": [NOW, "999970.0"]}],  # VictoriaMetrics 1.79: -search.latencyOffset older
    ],
)
def test_the_clock_is_a_scalar_or_a_vector(result: object) -> None:
    with serving(clock(result)) as url:
        assert Prometheus(url).now() == NOW


@pytest.mark.parametrize("result", [[], [{}], [{"value": []}], [{"value": [1]}], [1, "NaN"], ["x", "y"], {}, None, 5])
def test_an_unexpected_clock_is_an_error(result: object) -> None:
    with serving(clock(result)) as url, pytest.raises(MsrtraceError, match="does not answer like a Prometheus"):
        Prometheus(url).now()


def test_stale_markers_are_dropped() -> None:
    values = [[NOW - 4, "5"], [NOW - 3, "NaN"], [NOW - 2, None], [NOW - 1, "6"]]
    answer = json.dumps({"status": "success", "data": {"result": [{"metric": {"a": "b"}, "values": values}]}})
    with serving(lambda form, headers: (200, answer.encode())) as url:
        [series] = Prometheus(url).series("x", "", 60, NOW)
    assert (list(series.samples.times), list(series.samples.values)) == ([NOW - 4, NOW - 1], [5, 6])


def test_a_series_of_only_stale_markers_is_dropped() -> None:
    answer = b'{"status":"success","data":{"result":[{"metric":{},"values":[[1,"NaN"]]}]}}'
    with serving(lambda form, headers: (200, answer)) as url:
        assert Prometheus(url).series("x", "", 60, NOW) == []


def test_samples_between_two_times() -> None:
    samples = Samples.of({3: 30, 1: 10, 2: 20})
    assert list(samples.between(2, 3).values) == [20, 30]
    assert (samples.at(2), samples.at(2.5), samples.at(9)) == (20, None, None)
