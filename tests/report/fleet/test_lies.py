# SPDX-License-Identifier: GPL-2.0-or-later
"""A Prometheus that lies, or does not stop talking: the comparison is refused in one line, or its numbers are right."""

from __future__ import annotations

import copy
import json
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from command import ON_STANDIN
from faults import Figures
from fleets import CALLS, REDUNDANT, START, UPDATES, Stored, host, labelled, merged, serving, storing

from tracer.model.errors import MsrtraceError
from tracer.report.fleet import prometheus_api
from tracer.report.fleet.prometheus_api import Prometheus

Main = Callable[..., tuple[int, str, str]]
Lie = Callable[[Stored], object]

NOW = 1_000_000.0
SCRAPES = [NOW - 60, NOW - 45, NOW - 30, NOW - 15, NOW]
SECONDS = "msrtrace_filter_update_duration_seconds_sum"


def values(name: str, change: Callable[[int, float], float]) -> Lie:
    """Another value in place of each; it is given how many came before it."""

    def lie(stored: Stored) -> None:
        for _, samples in stored[name]:
            for place, (at, value) in enumerate(list(samples.items())):
                samples[at] = change(place, value)

    return lie


def moved(seconds: float) -> Lie:
    """All samples at other times."""

    def lie(stored: Stored) -> None:
        for name, series in stored.items():
            stored[name] = [(labels, {at + seconds: value for at, value in s.items()}) for labels, s in series]

    return lie


def twice(name: str, more: float) -> Lie:
    """A series twice, the second time with values that are higher by so much."""
    return lambda stored: stored[name].append(
        (stored[name][0][0], {t: v + more for t, v in stored[name][0][1].items()})
    )


def renamed(stored: Stored) -> None:
    """A label of calls that changes in the middle."""
    for name in (CALLS, REDUNDANT):
        for labels, samples in list(stored[name]):
            late = {at: samples.pop(at) for at in SCRAPES[2:]}
            stored[name].append(({**labels, "msr": labels["msr"].replace("0x", "0x9")}, late))


#: What the error says; None: nothing but right numbers come of it.
LIES: dict[str, tuple[Lie, str | None]] = {
    "calls fall": (values(CALLS, lambda n, v: v - 500 * (n > 1)), "falls while process_start_time_seconds stays"),
    "updates fall to 0 once": (values(UPDATES, lambda n, v: v * (n != 3)), "falls while process_start_time_seconds"),
    "no calls but NaN": (values(CALLS, lambda *_: math.nan), "is not stored: filter updates were counted"),
    "NaN in the middle": (values(CALLS, lambda n, v: math.nan if n == 2 else v), None),
    "calls infinite": (values(CALLS, lambda n, v: math.inf if n == 4 else v), f"stored inf as {CALLS}"),
    "updates minus infinity": (values(UPDATES, lambda n, v: -math.inf), f"stored -inf as {UPDATES}"),
    "calls negative": (values(CALLS, lambda n, v: v - 5000), f"stored -4000 as {CALLS}"),
    "seconds negative": (values(SECONDS, lambda n, v: -v), f"stored -1000 as {SECONDS}"),
    "a start before 1970": (values(START, lambda *_: -5), f"stored -5 as {START}"),
    "a start in the future": (values(START, lambda *_: NOW + 1e6), "later than the first sample: the clock"),
    "more calls than there can be": (values(CALLS, lambda n, v: 9e18), f"stored 9e+18 as {CALLS}"),
    "parts of calls": (values(CALLS, lambda n, v: v + 0.3 * n), "and counts whole things"),
    "more redundant calls than calls": (values(REDUNDANT, lambda n, v: 3 * v), "of which it is a part"),
    "samples a year ahead": (moved(365 * 86400.0), "was asked for msrtrace_build_info in the 3600 s before"),
    "samples a year old": (moved(-365 * 86400.0), "was asked for msrtrace_build_info in the 3600 s before"),
    "a series twice": (twice(CALLS, 0), None),
    "a series twice, and differently": (twice(CALLS, 7), "has two values at one time"),
    "labels of calls change": (renamed, "lost a kind of call while"),
}  # fmt: skip


def lying(lie: Lie) -> Stored:
    """An honest host of each side, and what a lie makes of the one of the other."""
    found = copy.deepcopy(host({"job": "msrtrace", "instance": "b", "side": "new"}, SCRAPES))
    lie(found)
    return merged(host({"job": "msrtrace", "instance": "a", "side": "base"}, SCRAPES, enables=17), found)


@pytest.mark.fault("hostile", "a Prometheus that lies", f"{len(LIES)} lies: {', '.join(LIES)}")
def test_a_lie_is_refused_or_changes_nothing(main: Main, figures: Figures) -> None:
    refused = []
    for name, (lie, why) in LIES.items():
        with serving(storing(lying(lie), NOW)) as url:
            sides = ("--base", 'side="base"', "--new", 'side="new"', "--since", "1h", "--format", "json")
            status, out, err = main("compare", "--prometheus", url, *sides)
        if why is None:
            assert (status, err) == (0, ""), name
            new = json.loads(out)["new"]
            assert (new["filter_updates"], new["per_filter_update"]["calls"]) == (100, 13), name
            continue
        refused.append(name)
        assert (status, out, err.count("\n")) == (1, "", 1), name
        assert why in err, name
        assert err.startswith("msrtrace: error: "), name
    figures["refused in one line"] = f"{len(refused)} of {len(LIES)}"
    figures["right numbers"] = f"{len(LIES) - len(refused)}"


def test_a_sample_in_another_order_counts_the_same(main: Main) -> None:
    """Prometheus sorts by time; what does not is sorted here."""
    stored = lying(lambda stored: None)
    for name, series in stored.items():
        stored[name] = [(labels, dict(reversed(samples.items()))) for labels, samples in reversed(series)]
    with serving(storing(labelled(stored, cluster="x"), NOW)) as url:
        sides = ("--base", 'side="base"', "--new", 'side="new"', "--format", "json")
        status, out, _ = main("compare", "--prometheus", url, *sides)
    assert status == 0
    assert [json.loads(out)[side]["per_filter_update"]["calls"] for side in ("base", "new")] == [30, 13]


# --- answers without end ---


@contextmanager
def raw(say: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that says this to whoever asks; yields the URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        clients: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                clients.append(client)
                with client:
                    try:
                        client.recv(1 << 16)
                        say(client)
                    except OSError:
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for one in (listener, *clients):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        thread.join(20)


def dripping(head: bytes) -> Callable[[socket.socket], None]:
    """Says the head, and then a byte at a time."""

    def say(client: socket.socket) -> None:
        client.sendall(head)
        while True:
            client.sendall(b"1")
            time.sleep(0.05)

    return say


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


DRIPPING = {
    "the status line": b"",
    "headers": OK + b"x: ",
    "JSON": OK + b"\r\n[",
    "an error": b"HTTP/1.1 500 no\r\n\r\n",
}


@pytest.mark.fault("hostile", "answers that drip", f"a byte each 50 ms, of {', '.join(DRIPPING)}")
def test_an_answer_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch, figures: Figures) -> None:
    monkeypatch.setattr(prometheus_api, "_LONGEST_SECONDS", 0.5)
    longest = 0.0
    for head in DRIPPING.values():
        with raw(dripping(head)) as url:
            started = time.monotonic()
            with pytest.raises(MsrtraceError, match="its answer is not complete after") as error:
                Prometheus(url).now()
            longest = max(longest, time.monotonic() - started)
        assert "\n" not in str(error.value)
    assert 0.4 < longest < 5
    figures["given up"] = f"after {longest:.1f} s of 0.5 s, {len(DRIPPING)} of {len(DRIPPING)}"


#: And says in the end how much memory it had at most, in KB, which getrusage() would have from its parent, too.
COMPARE = """
import re, sys
from tracer.cli.main import main
sys.argv[0] = 'msrtrace'
try:
    main()
finally:
    print(re.search("VmHWM:\\s*([0-9]+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.fault("hostile", "gigabytes of answer", "an answer without end, as fast as it is read", dear=True)
def test_an_answer_of_gigabytes_is_refused_in_bounded_memory(figures: Figures) -> None:
    sent = [0]

    def pour(client: socket.socket) -> None:
        client.sendall(OK + b'\r\n{"status":"success","data":{"result":[')
        while True:
            sent[0] += client.send(b'{"metric":{},"values":[[1,"1"]]},' * 2000)

    with raw(pour) as url:
        process = subprocess.run(
            [sys.executable, "-c", COMPARE, "compare", "--prometheus", url, "--base", "a", "--new", "b"],
            env=ON_STANDIN,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
    err, used = process.stderr, int(process.stdout) >> 10
    assert process.returncode == 1
    assert err.count("\n") == 1
    assert "its answer has more than 256 MB: select fewer hosts, or a shorter time (--since)" in err
    assert used < 500
    figures["refused"] = f"after {sent[0] >> 20} MB"
    figures["memory at most"] = f"{used} MB"
