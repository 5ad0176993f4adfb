# SPDX-License-Identifier: GPL-2.0-or-later
"""A client of the Prometheus HTTP API, which VictoriaMetrics, Thanos, Mimir and Cortex have, too.

https://prometheus.io/docs/prometheus/latest/querying/api/
"""

from __future__ import annotations

import http.client
import json
import math
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec

from tracer.model.errors import MsrtraceError
from tracer.model.text import printable
from tracer.report.fleet.http_client import HttpConfig, basic_credentials

#: Without a byte of an answer, and until it is complete: Prometheus gives a query two minutes (--query.timeout).
_TIMEOUT_SECONDS, _LONGEST_SECONDS = 60.0, 300.0
#: The most bytes of an answer: ten million samples, which take 2 GB here while they are read.
_LARGEST_ANSWER = 256 << 20
#: The most bytes of an error that are read, and characters of a remark that are shown.
_LONGEST_ERROR, _REMARK = 1 << 16, 500
#: Thanos' own parameters, which others ignore: replicas as one, and never downsampled.
_THANOS = {"dedup": "true", "max_source_resolution": "0s"}
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
#: No counter of ours is larger: up to here floats, which Prometheus stores, count one by one.
_LARGEST = 2.0**53
#: How much sooner or later than asked a sample may be, in seconds.
_OUTSIDE = 1.0


def seconds(text: str) -> int:
    """A duration as Prometheus writes it, such as 90s, 15m, 1h30m or 2d, in seconds. Raises ValueError."""
    if not re.fullmatch(r"(\d+[smhdw])+", text):
        raise ValueError(f"{text!r} is not a duration such as 90s, 15m, 1h or 2d")
    total = sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+)([smhdw])", text))
    if not 0 < total <= 10 * 365 * 86400:
        raise ValueError(f"{text!r} is not between 1 s and ten years")
    return total


def point_in_time(text: str) -> float:
    """A time as promtool takes it, RFC 3339 or Unix seconds, in seconds since 1970. Raises ValueError."""
    if re.fullmatch(r"\+?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", text, re.IGNORECASE):
        found = float(text)
    elif re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}([.,][0-9]+)?", text, re.IGNORECASE):
        raise ValueError(f"{text!r} has no time zone: add Z for UTC, or an offset such as +02:00")
    elif match := re.fullmatch(
        r"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2})(?:[.,]([0-9]+))?(Z|[+-][0-9]{2}:[0-9]{2})",
        text,
        re.IGNORECASE,
    ):
        second, fraction, zone = match.groups(default="0")
        try:  # with neither Z nor a fraction, which Python 3.10 does not read in all forms
            whole = datetime.fromisoformat(second.upper() + zone.upper().replace("Z", "+00:00"))
            found = whole.timestamp() + float(f"0.{fraction}")
        except ValueError as error:
            raise ValueError(f"{text!r} is not a time: {error}") from None
    else:
        raise ValueError(f"{text!r} is neither a time such as 2024-05-01T12:00:00Z nor Unix seconds such as 1714564800")
    if found < 0:
        raise ValueError(f"{text!r} is before 1970")
    return found


@dataclass(frozen=True)
class Samples:
    """Samples of one series in the order of time: timestamps (seconds since 1970) and values."""

    times: array[float]
    values: array[float]

    @classmethod
    def of(cls, samples: Mapping[float, float]) -> Samples:
        """Samples from values by timestamp; NaNs are stale markers and dropped."""
        kept = sorted((time, value) for time, value in samples.items() if not math.isnan(value))
        return cls(array("d", (time for time, _ in kept)), array("d", (value for _, value in kept)))

    def merged(self, other: Samples) -> Samples:
        """The union with other samples. Raises ValueError if they have different values at a time."""
        if self.times == other.times and self.values == other.values:
            return self
        one, two = (dict(zip(samples.times, samples.values, strict=True)) for samples in (self, other))
        if any(one[time] != two[time] for time in one.keys() & two.keys()):
            raise ValueError("different values at one time")
        return Samples.of(one | two)

    def between(self, first: float, last: float) -> Samples:
        """The samples from `first` to `last`, both included."""
        low, high = bisect_left(self.times, first), bisect_right(self.times, last)
        return self if high - low == len(self.times) else Samples(self.times[low:high], self.values[low:high])

    def at(self, time: float) -> float | None:
        """The value at exactly that time."""
        place = bisect_left(self.times, time)
        return self.values[place] if place < len(self.times) and self.times[place] == time else None


@dataclass(frozen=True)
class Series:
    """A stored time series, with all labels except the name of the metric."""

    labels: Mapping[str, str]
    samples: Samples


class Prometheus:
    """A server with the Prometheus HTTP API, at a URL (which may contain a user and a password).

    `notices` is what the server remarked on its answers; `incomplete` are remarks after which series may be missing,
    as from Thanos' partial responses.
    """

    def __init__(self, url: str, config: HttpConfig | None = None) -> None:
        """Raises MsrtraceError if the URL is invalid, or both it and `config` have credentials."""
        config = config or HttpConfig()
        parts = _split(url)
        host = parts.netloc.rpartition("@")[2]
        self.url = urllib.parse.urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
        self._headers = {"Accept": "application/json", **config.headers}
        self._secrets = config.secrets
        if parts.username or parts.password:
            if "Authorization" in config.headers:
                raise MsrtraceError("both the URL and --http.config.file have credentials; leave one of them out")
            user, password = urllib.parse.unquote(parts.username or ""), urllib.parse.unquote(parts.password or "")
            self._headers["Authorization"] = basic_credentials(user, password)
            self._secrets = (*self._secrets, *filter(None, (password, parts.password)))
        self._opener = config.opener()
        self.notices: list[str] = []
        self.incomplete: list[str] = []

    def _query(self, expression: str, time: float | None = None) -> Any:
        """The `data` of an instant query. Raises MsrtraceError."""
        form = {"query": expression} | _THANOS | ({"time": f"{time:.3f}"} if time is not None else {})
        request = urllib.request.Request(
            f"{self.url}/api/v1/query", data=urllib.parse.urlencode(form).encode(), headers=self._headers
        )
        try:
            reply = self._reply(request)
        except (OSError, ValueError, RecursionError, http.client.HTTPException, msgspec.DecodeError) as error:
            why = self._without_secrets(str(getattr(error, "reason", error)))
            raise MsrtraceError(f"cannot query Prometheus at {self.url}: {why}") from None
        if not isinstance(reply, dict) or reply.get("status") != "success":
            raise self._unexpected()
        self._heed(reply)
        return reply.get("data")

    def _reply(self, request: urllib.request.Request) -> Any:
        """The JSON of an answer, which must neither be too large nor take too long, however it is sent."""
        done: Future[bytearray] = Future()

        def read() -> None:
            try:
                with self._opener.open(request, timeout=_TIMEOUT_SECONDS) as answer:
                    content = bytearray()
                    while len(content) <= _LARGEST_ANSWER and (piece := answer.read(1 << 20)):
                        content += piece
                    done.set_result(content)
            except urllib.error.HTTPError as error:
                with error:
                    why = self._without_secrets(_reason(error))
                done.set_exception(MsrtraceError(f"Prometheus at {self.url} refused the query: {why}"))
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=read, daemon=True).start()  # which may be left behind
        try:
            content = done.result(_LONGEST_SECONDS)
        except FutureTimeoutError:
            raise OSError(f"its answer is not complete after {_LONGEST_SECONDS:.0f} s") from None
        if len(content) > _LARGEST_ANSWER:
            size = f"{_LARGEST_ANSWER >> 20} MB"
            raise OSError(f"its answer has more than {size}: select fewer hosts, or a shorter time (--since)")
        return msgspec.json.decode(content)

    def _heed(self, reply: Mapping[str, Any]) -> None:
        """Keep what the server remarked on its answer.

        `warnings` may mean that series are missing (a store of Thanos or a remote read failed), unless PromQL's own
        annotations say otherwise (util/annotations in Prometheus); `infos` never do. VictoriaMetrics' cluster has
        `isPartial` instead.
        """
        for key in ("warnings", "infos"):
            remarks = reply.get(key)
            for remark in remarks if isinstance(remarks, list) else []:
                text = printable(self._without_secrets(str(remark)), _REMARK)
                missing = key == "warnings" and not text.startswith("PromQL ")
                kept = self.incomplete if missing else self.notices
                if text not in kept:
                    kept.append(text)
        partial = "the answer is partial (isPartial)"
        if reply.get("isPartial") is True and partial not in self.incomplete:
            self.incomplete.append(partial)

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "<secret>")
        return text

    def _unexpected(self) -> MsrtraceError:
        return MsrtraceError(f"{self.url} does not answer like a Prometheus; check the URL")

    def now(self) -> float:
        """The server's clock, in seconds since 1970.

        time() is a scalar, [TIME, "VALUE"]. VictoriaMetrics answers with a vector of one sample, whose value is
        `-search.latencyOffset` (30 s) older than its time; samples stored since then can be queried nevertheless.
        """
        try:
            result = self._query("time()")["result"]
            time, value = result[0]["value"] if isinstance(result[0], dict) else result
            clocks = float(time), float(value)
        except (KeyError, IndexError, TypeError, ValueError):
            raise self._unexpected() from None
        if not all(map(math.isfinite, clocks)):
            raise self._unexpected()
        return max(clocks)

    def series(self, name: str, selector: str, window: int, end: float) -> list[Series]:
        """The raw samples of a metric in the `window` seconds before `end` (seconds since 1970).

        Raises MsrtraceError also for samples that no counter or gauge of ours has, or of other times.
        """
        found = self._query(f"{name}{{{selector}}}[{window}s]", end)
        try:
            stored = [
                Series(
                    {str(label): str(value) for label, value in one["metric"].items() if label != "__name__"},
                    Samples.of({float(time): _number(value) for time, value in one["values"]}),
                )
                for one in found["result"]
            ]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise self._unexpected() from None
        for series in stored:
            times, values = series.samples.times, series.samples.values
            wrong = next((value for value in values if not 0 <= value <= _LARGEST), None)
            if wrong is not None:
                raise MsrtraceError(f"{self.url} has stored {wrong:g} as {name}, which no msrtrace counts")
            wrong = next((time for time in times if not -_OUTSIDE <= end - time <= window + _OUTSIDE), None)
            if wrong is not None:
                raise MsrtraceError(
                    f"{self.url} was asked for {name} in the {window} s before {end:.0f}, and answers with {wrong:.0f}"
                )
        return [series for series in stored if series.samples.times]


def _number(value: object) -> float:
    """A sample's value; VictoriaMetrics' exports have null for a stale marker."""
    return math.nan if value is None else float(str(value))


def _split(url: str) -> urllib.parse.SplitResult:
    """The parts of a URL. Raises MsrtraceError, which has nothing of it that may be a password or a token."""
    try:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number, or an address in brackets is wrong
        valid = False
    if valid and "@" in parts.path + parts.query + parts.fragment:
        raise MsrtraceError(
            "the URL of Prometheus has an @ after its host: write /, ?, # and @ in a password as %2F, ..."
        )
    if not valid:
        shown = "the given text" if re.search(r"[@?#]|:(?!//)", url) else repr(url)
        raise MsrtraceError(f"{shown} is not the URL of a Prometheus, such as http://127.0.0.1:9090")
    return parts


def _reason(error: urllib.error.HTTPError) -> str:
    """Why a server refused: the error in its JSON; or the status and, as Mimir has it, a line of plain text."""
    status = f"{error.code} {error.reason}"
    if 300 <= error.code < 400:
        to = urllib.parse.urlsplit(error.headers.get("Location", ""))
        place = urllib.parse.urlunsplit((to.scheme, to.netloc.rpartition("@")[2], to.path, "", ""))
        return f"{status}: it redirects to {printable(place, _REMARK)}"
    try:
        body = error.read(_LONGEST_ERROR)
    except (OSError, http.client.HTTPException):
        return status
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = body.decode(errors="replace").strip()
    if error.headers.get_content_type() != "text/plain" or not text or text.startswith("<"):
        return status
    return f"{status}: {printable(text.splitlines()[0], _REMARK)}"
