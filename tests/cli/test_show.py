# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace show` on the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command import ROOT
from made import patched, unpatched

from tracer.report.file import encode
from tracer.report.formats import OF_REPORTS, write_report

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports in the current directory."""
    (tmp_path / "u.json").write_bytes(encode(unpatched()))
    (tmp_path / "p.json").write_bytes(b"\xef\xbb\xbf" + encode(patched()))
    (tmp_path / "utf16.json").write_bytes(encode(patched()).decode().encode("utf-16"))
    (tmp_path / "comparison.json").write_text('{"schema": "msrtrace-comparison/1"}')
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("fmt", OF_REPORTS)
def test_a_report_is_shown_in_every_format(main: Main, fmt: str) -> None:
    expected = write_report(unpatched(), fmt).decode()
    assert main("show", "u.json", "--format", fmt) == (0, expected, "")
    assert main("show", "u.json", "--format", fmt, "-o", "out") == (0, "", "")
    assert Path("out").read_text() == expected


def test_text_is_the_default_and_a_suffix_selects_the_format(main: Main) -> None:
    assert main("show", "u.json") == (0, write_report(unpatched(), "text").decode(), "")
    assert main("show", "u.json", "-o", "u.html", "-o", "again.json") == (0, "", "")
    assert Path("u.html").read_text().startswith("<!DOCTYPE html>")
    assert Path("again.json").read_bytes() == Path("u.json").read_bytes()


def test_a_byte_order_mark_is_skipped(main: Main) -> None:
    assert main("show", "p.json") == (0, write_report(patched(), "text").decode(), "")


def test_a_report_may_come_from_standard_input() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tracer.cli.main", "show", "-"],
        input=encode(patched()),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, write_report(patched(), "text"), b"")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("none.json", "cannot read none.json: No such file or directory"),
        ("comparison.json", "comparison.json is not an msrtrace report: its schema is msrtrace-comparison/1"),
        ("utf16.json", "utf16.json is UTF-16 text, and reports are UTF-8: convert it with iconv -f UTF-16 -t UTF-8"),
    ],
)
def test_an_unreadable_report_is_an_error(main: Main, name: str, why: str) -> None:
    assert main("show", name) == (1, "", f"msrtrace: error: {why}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'REPORT'"),
        (["u.json", "p.json"], "unexpected extra argument (p.json)"),
        (["u.json", "--format", "changelog"], "'changelog' is not one of"),
        (["u.json", "-o", "x.json."], "no format has the suffix . (.txt, .md, .json, .html, .htm); set --format"),
        (["u.json", "-o", "x.json.gz"], "no format has the suffix .gz (.txt, .md, .json, .html, .htm); set --format"),
        (["u.json", "-o", ""], "-o .: that is no name of a file"),
        (["u.json", "-o", "x.pdf"], "no format has the suffix .pdf (.txt, .md, .json, .html, .htm); set --format"),
    ],
)
def test_wrong_usage_is_explained(main: Main, arguments: list[str], message: str) -> None:
    status, out, err = main("show", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert not Path("x.pdf").exists()


@pytest.mark.parametrize(
    ("arguments", "instead"),
    [
        (["u.json"], "msrtrace show u.json"),
        (["u.json", "p.json"], "msrtrace compare u.json p.json"),
        (["--label", "x", "--", "./p.json", "--format", "html"], "msrtrace show ./p.json --format html"),
    ],
)
def test_a_report_that_is_given_as_a_command_was_meant_to_be_shown(
    main: Main, arguments: list[str], instead: str
) -> None:
    status, out, err = main("report", *arguments)
    assert (status, out) == (2, "")
    assert f"is a report, not a command; did you mean `{instead}`?" in err
