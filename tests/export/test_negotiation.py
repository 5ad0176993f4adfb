# SPDX-License-Identifier: GPL-2.0-or-later
"""What clients get for what they accept, from RFC 9110, and from what real clients send."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.export.negotiation import content_type, gzip_accepted, is_openmetrics

TEXT = "text/plain; version=0.0.4; charset=utf-8"
TEXT1 = "text/plain; version=1.0.0; charset=utf-8"
OM = "application/openmetrics-text; version=1.0.0; charset=utf-8"
PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,"
    "text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        # Quoted, odd, malformed
        ('text/plain;version="0.0.4"', TEXT),
        ('text/plain; version="1.0.0"', TEXT1),
        ("text/plain;version=v1", TEXT),
        ("text/plain;version=1.0.0rc1", TEXT),
        ("application/openmetrics-text;version=v1", TEXT),
        ("application/openmetrics-text;version=", OM),
        ('Application/OpenMetrics-Text; Version="1.0.0"', OM),
        ('text/plain;version="0.0.4', TEXT),
        ('text/plain;x="a,application/openmetrics-text;q=1"', TEXT),
        ("text/plain;version=1.", TEXT),
        (";;,=,/,;q=,text", TEXT),
        # Versions that are not made are not claimed
        ("application/openmetrics-text;version=2.0.0", TEXT),
        ("application/openmetrics-text;version=1.1.0, application/openmetrics-text;version=1.0.0;q=0.5", OM),
        ("text/plain;version=2.0.0", TEXT),
        ("text/plain;version=2.0.0, text/plain;version=1.0.0;q=0.5", TEXT),
        ("application/openmetrics-text;version=1.0", OM),
        ("text/plain;version=1", TEXT1),
        # Weights
        ("text/plain;q=0.9, application/openmetrics-text;q=0.1", TEXT),
        ("text/plain;q=0.1, application/openmetrics-text;q=0.9", OM),
        ("application/openmetrics-text;q=0, text/plain", TEXT),
        ("application/openmetrics-text;version=1.0.0;q=0.000", TEXT),
        ("application/openmetrics-text;q=0, */*", TEXT),
        ("text/plain;q=0, application/openmetrics-text", OM),
        ("text/plain;q=0, */*", OM),
        ("text/plain;q=0", OM),
        ("text/plain;version=0.0.4;q=0.5, text/plain;version=1.0.0;Q=0.6", TEXT1),
        ("text/plain;q=0, application/*;q=0", TEXT),
        ("application/openmetrics-text;q=x, text/plain;q=0.9", OM),
        ("application/openmetrics-text;q=0.5, text/*", TEXT),
        ("application/openmetrics-text;q=0.5, */*;q=0.4", OM),
        ("application/*", OM),
        ("*/*", TEXT),
        ("*/*;q=0", TEXT),
        ("application/json", TEXT),
        # Equal weights: as prometheus_client
        ("text/plain;version=0.0.4, application/openmetrics-text;version=1.0.0", OM),
        ("*/*, application/openmetrics-text", OM),
        # Real clients: Prometheus, a browser, Datadog
        (PROMETHEUS, OM),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", TEXT),
        ("application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1,text/plain", OM),
    ],
)
def test_the_format_is_what_is_accepted_most(accept: str, expected: str) -> None:
    assert content_type(accept).startswith(expected)
    assert is_openmetrics(content_type(accept)) is (expected == OM)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("", OM),
        (";version=0.0.1", TEXT),
        (";version=1.0.0", f"{OM}; escaping=underscores"),
        (";version=1.0.0;escaping=underscores", f"{OM}; escaping=underscores"),
        (";version=1.0.0;escaping=allow-utf-8", f"{OM}; escaping=allow-utf-8"),
        (";escaping=allow-utf-8;version=1.0.0;q=0.5", f"{OM}; escaping=allow-utf-8"),
        (";version=1.0.0;escaping=values", f"{OM}; escaping=values"),
        # Not what is asked for, and said so: names stay those of rules and panels, and the format is that of 1.0.0.
        (";version=1.0.0;escaping=dots", f"{OM}; escaping=underscores"),
        (";version=1.0.0;escaping=?", f"{OM}; escaping=underscores"),
        (";version=2.0.0;escaping=allow-utf-8", f"{OM}; escaping=allow-utf-8"),
        # Without a version there is no escaping scheme
        (";escaping=allow-utf-8", OM),
    ],
)
def test_the_version_and_the_escaping_scheme_are_named(parameters: str, expected: str) -> None:
    assert content_type(f"application/openmetrics-text{parameters}") == expected
    in_text = expected.replace(OM, TEXT1) if "escaping" in expected else TEXT
    assert content_type(f"text/plain{parameters}") == in_text


@given(st.text(st.sampled_from('text/plainopenmetrics*;,= "\\q0.1version'), max_size=40))
def test_no_header_is_an_error(header: str) -> None:
    assert content_type(header).startswith((TEXT, TEXT1, OM))
    assert gzip_accepted(header) in (True, False)


def test_no_header_takes_long() -> None:
    started = time.process_time()
    for part in ('"\\', ";", " ", "a", ";a=", "a/b;", ","):
        content_type("text/plain" + part * 30000)
        gzip_accepted(part * 30000)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ("", False),
        ("gzip", True),
        ("GZIP", True),
        ("deflate, gzip;q=1.0, *;q=0.5", True),
        ("gzip;q=0", False),
        ("gzip; q=0.0, *", False),
        ("gzip;q=0.001", True),
        ("*", True),
        ("*;q=0", False),
        ("identity", False),
        ("identity;q=0.5, gzip;q=1", True),
        ("identity, gzip;q=0.5", False),
        ("x-gzip", True),
        ("gzipped", False),
        ("gzip;q=0, identity;q=0", False),
        ("deflate;q=1,br", False),
    ],
)
def test_gzip_is_used_where_it_is_accepted(header: str, accepted: bool) -> None:
    assert gzip_accepted(header) is accepted
