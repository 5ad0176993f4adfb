# SPDX-License-Identifier: GPL-2.0-or-later
"""The same hosts before and after an upgrade: `msrtrace compare --base-at TIME --new-at TIME`."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator

import pytest
from fleets import LOCAL, host, merged, only, remembering, serving, upgraded

from tracer.report.fleet.prometheus_api import point_in_time

NOW = 1_700_010_000.0  # 2023-11-15 01:00:00 UTC
UPGRADE = NOW - 5400  # 2023-11-14 23:30:00 UTC
BEFORE = "2023-11-14 22:30:00 to 23:30:00 UTC"
AFTER = "2023-11-15 00:00:00 to 01:00:00 UTC"

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def url() -> Iterator[str]:
    """A Prometheus that stored two hosts, before and after an upgrade."""
    stored = merged(upgraded({**LOCAL, "host": "a"}, UPGRADE), upgraded({**LOCAL, "host": "b"}, UPGRADE))
    with serving(remembering(stored, NOW)) as found:
        yield found


def compare(main: Main, url: str, *options: str, base: str = 'job="msrtrace"', new: str = 'job="msrtrace"') -> str:
    status, out, err = main("compare", "--prometheus", url, "--base", base, "--new", new, *options)
    assert (status, err) == (0, "")
    return out


@pytest.mark.parametrize(
    "at",
    [
        "2023-11-14T23:30:00Z",
        "2023-11-15T01:30:00+02:00",
        "2023-11-14T18:00:00.000000000-05:30",
        "1700004600",
        "1700004600.0",
        "1.7000046e9",
    ],
)
def test_the_same_hosts_are_compared_before_and_after_an_upgrade(main: Main, url: str, at: str) -> None:
    made = json.loads(compare(main, url, "--base-at", at, "--format", "json"))
    assert made["sentence"].startswith(
        'before (job="msrtrace") makes 30 calls a filter update, 30 of them redundant; after (job="msrtrace") 13, 13 '
    )
    base, new = made["base"], made["new"]
    assert [(side["reports"], side["filter_updates"]) for side in (base, new)] == [(2, 200), (2, 120)]
    assert [side["host"]["kernel"] for side in (base, new)] == ["5.19.17", "6.1.0"]
    assert base["window"] == {"begin": "2023-11-14T22:30:00Z", "end": "2023-11-14T23:30:00Z"}
    assert new["window"] == {"begin": "2023-11-15T00:00:00Z", "end": "2023-11-15T01:00:00Z"}


@pytest.mark.parametrize("form", ["text", "markdown", "html", "changelog"])
def test_every_format_names_both_windows(main: Main, url: str, form: str) -> None:
    out = " ".join(compare(main, url, "--base-at", str(UPGRADE), "--format", form).split())
    assert BEFORE in out
    assert AFTER in out


def test_without_times_both_windows_end_now(main: Main, url: str) -> None:
    out = compare(main, url, "--format", "json", base='host="a"', new='host="b"')
    assert [json.loads(out)[side]["window"]["end"] for side in ("base", "new")] == ["2023-11-15T01:00:00Z"] * 2


def test_both_windows_may_be_one_in_the_past(main: Main, url: str) -> None:
    at = str(UPGRADE)
    out = compare(main, url, "--base-at", at, "--new-at", at, "--format", "json", base='host="a"', new='host="b"')
    assert [json.loads(out)[side]["per_filter_update"]["calls"] for side in ("base", "new")] == [30, 30]


def test_the_base_may_end_where_the_other_window_begins(main: Main, url: str) -> None:
    compare(main, url, "--base-at", str(UPGRADE), "--new-at", str(UPGRADE + 3600))


def test_one_window_of_the_same_hosts_is_refused(main: Main, url: str) -> None:
    at = ("--base-at", str(UPGRADE), "--new-at", str(UPGRADE))
    status, _, err = main("compare", "--prometheus", url, "--base", 'host="a"', "--new", 'host="a"', *at)
    assert (status, "one msrtrace is on both sides of the comparison" in err) == (1, True)


def test_a_window_without_samples_is_named(main: Main, url: str) -> None:
    sides = ("--base", 'host="a"', "--new", 'host="a"')
    assert main("compare", "--prometheus", url, *sides, "--base-at", "1600000000") == (
        1,
        "",
        'msrtrace: error: Prometheus has no series of msrtrace for {host="a"} in the last 3600 s before '
        "2020-09-13 12:26:40 UTC\n",
    )


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--base-at", "2023-11-15T02:00:00Z"], "--base-at is in the future: at Prometheus it is 2023-11-15 01:00:00"),
        (["--new-at", "1700010006"], "--new-at is in the future"),
        (["--new-at", "1700010000000"], "--new-at is in the future"),  # milliseconds
        (["--new-at", "1e300"], "--new-at is in the future"),
        (
            ["--new-at", "2023-11-14T23:30:00Z"],
            "the base's window ends at 2023-11-15 01:00:00 UTC, after that of the other side, at 2023-11-14 23:30:00",
        ),
        (
            ["--base-at", "2023-11-15T00:30:00Z"],
            "the windows overlap: one ends at 2023-11-15 00:30:00 UTC, the other begins at 2023-11-15 00:00:00 UTC",
        ),
        (["--base-at", "yesterday"], "--base-at: 'yesterday' is neither a time such as "),
        (["--new-at", ""], "--new-at: '' is neither a time"),
        (["--base-at", "2023-11-14T23:30:00"], "has no time zone: add Z for UTC, or an offset such as +02:00"),
        (["--base-at", "2023-02-30T23:30:00Z"], "'2023-02-30T23:30:00Z' is not a time: day is out of range"),
    ],
)
def test_wrong_times_are_usage_errors(main: Main, url: str, options: list[str], why: str) -> None:
    status, out, err = main("compare", "--prometheus", url, "--base", 'host="a"', "--new", 'host="a"', *options)
    assert (status, out) == (2, "")
    assert why in " ".join(err.split())


@pytest.mark.parametrize("option", ["--base-at", "--new-at", "--http.config.file"])
def test_the_options_are_for_prometheus(main: Main, option: str) -> None:
    status, _, err = main("compare", "a.json", "b.json", option, "5")
    assert (status, f"{option} is for --prometheus" in err) == (2, True)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("1700010000.25", 1700010000.25),
        ("+5", 5),
        ("1970-01-01T00:00:10Z", 10),
        ("1970-01-01t00:00:10z", 10),
        ("1970-01-01T00:00:10.5Z", 10.5),
        ("1970-01-01T00:00:10.123456789Z", 10.123456),
        ("1970-01-01T01:00:10+01:00", 10),
    ],
)
def test_times_as_promtool_takes_them(text: str, value: float) -> None:
    assert point_in_time(text) == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        *("now", "-5", "NaN", "inf", "1_0", " 5", "5 ", "0x5", "1h", "٣", "2023-11-14", "2023-11-14 23:30:00Z"),
        *("20231114T233000Z", "2023-11-14T23:30Z", "2023-11-14T23:30:00+02", "2023-11-14T24:30:00Z"),
        *("1969-12-31T23:59:59Z", "0000-01-01T00:00:00Z"),
    ],
)
def test_anything_else_is_not_a_time(text: str) -> None:
    with pytest.raises(ValueError, match=r"is (neither a time|not a time|before 1970)"):
        point_in_time(text)


# --- the same hosts ---


def of(name: str) -> dict[str, str]:
    return {**LOCAL, "host": name}


@pytest.fixture
def changing() -> Iterator[str]:
    """A Prometheus that stored the host a before and after an upgrade, b and c only before, and d only after."""
    before = [only(upgraded(of(name), UPGRADE), 0, UPGRADE) for name in "bc"]
    after = only(upgraded(of("d"), UPGRADE), UPGRADE + 1, NOW)
    with serving(remembering(merged(upgraded(of("a"), UPGRADE), *before, after), NOW)) as found:
        yield found


A, B, C, D = (f'127.0.0.1:9753 (host="{name}")' for name in "abcd")


def test_windows_of_other_hosts_are_not_compared(main: Main, changing: str) -> None:
    sides = ("--base", 'job="msrtrace"', "--new", 'job="msrtrace"', "--base-at", str(UPGRADE))
    assert main("compare", "--prometheus", changing, *sides) == (
        3,
        "",
        f'msrtrace: error: scraped only before: {B} and {C}; scraped only after: 127.0.0.1:9753 (host="d") '
        "(--force compares them anyway)\n",
    )


@pytest.mark.parametrize("form", ["text", "markdown", "html", "changelog", "json"])
def test_if_they_are_every_format_says_so(main: Main, changing: str, form: str) -> None:
    out = compare(main, changing, "--base-at", str(UPGRADE), "--force", "--format", form)
    shown = " ".join(html.unescape(out).replace("\\", "").split())
    assert f"scraped only before: {B} and {C}" in shown
    assert f"scraped only after: {D}" in shown


def test_hosts_may_be_chosen_that_are_the_same(main: Main, changing: str) -> None:
    at = ("--base-at", str(UPGRADE), "--format", "json")
    made = json.loads(compare(main, changing, *at, base='host="a"', new='host="a"'))
    assert [made[side]["hosts"] for side in ("base", "new")] == [["127.0.0.1:9753"]] * 2
    assert (made["forced"], "only" in str(made["warnings"])) == ([], False)


def test_of_sides_that_may_be_of_other_hosts_it_is_a_warning(main: Main, changing: str) -> None:
    def warnings(base: list[str], new: list[str]) -> list[str]:
        at = ("--base-at", str(UPGRADE), "--format", "json")
        status, out, _ = main("compare", "--prometheus", changing, "--base", *base, "--new", *new, *at)
        assert status == 0
        found: list[str] = json.loads(out)["warnings"]
        return found

    assert warnings(['host="a"', 'host="b"'], ['host="a"', 'host="d"'])[:2] == [
        f"scraped only before: {B}",
        f"scraped only after: {D}",
    ]
    assert "scraped" not in str(warnings(['host="b"'], ['host="d"']))


def test_a_host_whose_filters_changed_in_one_window_only_is_named(main: Main) -> None:
    times, info = [UPGRADE + 2000, UPGRADE + 3600], {"kernel": "6.1.0"}
    idle = host(of("b"), times, updates=0, before=0, start=UPGRADE + 1990, info=info)
    stored = merged(upgraded(of("a"), UPGRADE), only(upgraded(of("b"), UPGRADE), 0, UPGRADE), idle)
    with serving(remembering(stored, NOW)) as url:
        made = json.loads(compare(main, url, "--base-at", str(UPGRADE), "--format", "json"))
    assert made["warnings"][0] == f"counted only before, as in the other window no filter changed there: {B}"
    assert [made[side]["hosts"] for side in ("base", "new")] == [[A, B], [A]]


# --- the names of hosts ---


@pytest.mark.parametrize("form", ["text", "markdown", "html", "changelog", "json"])
def test_every_format_names_the_hosts(main: Main, url: str, form: str) -> None:
    out = compare(main, url, "--base-at", str(UPGRADE), "--format", form)
    shown = " ".join(html.unescape(out).replace("\\", "").split())
    assert f"{A} and {B}, Linux 5.19.17, 2023-11-14" in shown
    assert f"{A} and {B}, Linux 6.1.0, 2023-11-15" in shown


def test_of_many_hosts_some_are_named_and_json_has_all(main: Main) -> None:
    stored = merged(*(upgraded(of(f"h{number}"), UPGRADE) for number in range(7)))
    with serving(remembering(stored, NOW)) as url:
        out = " ".join(compare(main, url, "--base-at", str(UPGRADE)).split())
        made = json.loads(compare(main, url, "--base-at", str(UPGRADE), "--format", "json"))
    assert '127.0.0.1:9753 (host="h4") and 2 more (all: --format json), Linux 5.19.17' in out
    names = [f'127.0.0.1:9753 (host="h{number}")' for number in range(7)]
    assert [made[side]["hosts"] for side in ("base", "new")] == [names, names]
    assert "host" not in [difference["what"] for difference in made["differences"]]
