# SPDX-License-Identifier: GPL-2.0-or-later
"""Damaged and hostile report files: each is a report that every view can show, or one line says why not."""

from __future__ import annotations

import json
from typing import Any

from hostile import anything, places, replaced
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made import any_reports, report, toggle, views

from tracer.model.errors import MsrtraceError
from tracer.report.file import decode, encode
from tracer.report.report import Report

EXAMPLE = encode(report(toggle(pid=100)))


def checked(text: str) -> None:
    assert text.isprintable()
    assert len(text) < 500


def survives(data: bytes) -> None:
    try:
        found = decode(data)
    except MsrtraceError as error:
        checked(str(error))
    else:
        views(found)
        assert decode(encode(found)) == found


PLACES = [place for place in places(json.loads(EXAMPLE)) if place and (place[0] != "calls" or place[1:2] in ((), (0,)))]


@given(st.lists(st.tuples(st.sampled_from(PLACES), st.one_of(anything, st.just(...))), min_size=1, max_size=3))
def test_a_report_with_replaced_values_is_read_or_refused(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    survives(json.dumps(replaced(EXAMPLE, changes)).encode())


@given(st.lists(st.tuples(st.integers(0, len(EXAMPLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_report_with_replaced_bytes_is_read_or_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(EXAMPLE)
    for at, byte in changes:
        data[at] = byte
    survives(bytes(data))


@given(st.integers(0, len(EXAMPLE) - 1), st.integers(0, len(EXAMPLE) - 1), st.binary(max_size=9))
def test_a_report_with_a_piece_cut_out_is_read_or_refused(one: int, other: int, put: bytes) -> None:
    survives(EXAMPLE[: min(one, other)] + put + EXAMPLE[max(one, other) :])


@given(st.binary(max_size=200))
@example(b'{"schema":"msrtrace-report/1"')
def test_random_bytes_are_read_or_refused(data: bytes) -> None:
    survives(data)


@given(anything)
def test_any_json_is_read_or_refused(value: Any) -> None:
    survives(json.dumps(value).encode(errors="surrogatepass"))


@settings(max_examples=min(60, settings().max_examples))
@given(any_reports)
def test_whatever_can_be_read_can_be_shown(made: Report) -> None:
    survives(encode(made))
