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
            "does not answer",
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
    values = [[1, "5"], [2, "NaN"], [3, None], [4, "6"]]
    answer = json.dumps({"status": "success", "data": {"result": [{"metric": {"a": "b"}, "values": values}]}})
    with serving(lambda form, headers: (200, answer.encode())) as url:
        [series] = Prometheus(url).series("x", "", 60, NOW)
    assert (list(series.samples.times), list(series.samples.values)) == ([1, 4], [5, 6])


def test_a_series_of_only_stale_markers_is_dropped() -> None:
    answer = b'{"status":"success","data":{"result":[{"metric":{},"values":[[1,"NaN"]]}]}}'
    with serving(lambda form, headers: (200, answer)) as url:
        assert Prometheus(url).series("x", "", 60, NOW) == []


def test_samples_between_two_times() -> None:
    samples = Samples.of({3: 30, 1: 10, 2: 20})
    assert list(samples.between(2, 3).values) == [20, 30]
    assert (samples.at(2), samples.at(2.5), samples.at(9)) == (20, None, None)
