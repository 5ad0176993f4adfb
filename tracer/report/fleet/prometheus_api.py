# SPDX-License-Identifier: GPL-2.0-or-later
"""A client of the Prometheus HTTP API, which VictoriaMetrics has, too.

https://prometheus.io/docs/prometheus/latest/querying/api/
"""

from __future__ import annotations

import base64
import http.client
import json
import math
import re
import urllib.error
import urllib.parse
import urllib.request
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tracer.model.errors import MsrtraceError

_TIMEOUT_SECONDS = 60.0
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
#: No counter of ours is larger: they are unsigned 64-bit numbers in the kernel, and floats here.
_LARGEST = 2.0**63


def seconds(text: str) -> int:
    """A duration as Prometheus writes it, such as 90s, 15m, 1h30m or 2d, in seconds. Raises ValueError."""
    if not re.fullmatch(r"(\d+[smhdw])+", text):
        raise ValueError(f"{text!r} is not a duration such as 90s, 15m, 1h or 2d")
    total = sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+)([smhdw])", text))
    if not 0 < total <= 10 * 365 * 86400:
        raise ValueError(f"{text!r} is not between 1 s and ten years")
    return total


@dataclass(frozen=True)
class Samples:
    """Samples of one series in the order of time: timestamps (seconds since 1970) and values."""

    times: array[float]
    values: array[float]

    @classmethod
    def of(cls, samples: Mapping[float, float]) -> Samples:
        """Samples from values by timestamp; NaNs are stale markers and dropped. Raises ValueError."""
        kept = sorted((time, value) for time, value in samples.items() if not math.isnan(value))
        if any(abs(value) > _LARGEST or not math.isfinite(time) for time, value in kept):
            raise ValueError("a sample is out of range")
        return cls(array("d", (time for time, _ in kept)), array("d", (value for _, value in kept)))

    def merged(self, other: Samples) -> Samples:
        """The union with other samples."""
        if self.times == other.times and self.values == other.values:
            return self
        times = dict(zip(self.times, self.values, strict=True)) | dict(zip(other.times, other.values, strict=True))
        return Samples.of(times)

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
    """A server with the Prometheus HTTP API, at a URL (which may contain a user and a password)."""

    def __init__(self, url: str) -> None:
        """Raises MsrtraceError if the URL is invalid."""
        try:
            parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        except ValueError:
            parts = urllib.parse.urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise MsrtraceError(f"{url!r} is not the URL of a Prometheus, such as http://127.0.0.1:9090")
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
                reply = json.load(answer)
        except urllib.error.HTTPError as error:
            raise MsrtraceError(f"Prometheus at {self.url} refused the query: {_reason(error)}") from None
        except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error)
            raise MsrtraceError(f"cannot query Prometheus at {self.url}: {why}") from None
        if not isinstance(reply, dict) or reply.get("status") != "success":
            raise self._unexpected()
        return reply.get("data")

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
        """The raw samples of a metric in the `window` seconds before `end` (seconds since 1970)."""
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
        return [series for series in stored if series.samples.times]


def _number(value: object) -> float:
    """A sample's value; VictoriaMetrics' exports have null for a stale marker."""
    return math.nan if value is None else float(str(value))


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"{error.code} {error.reason}"
