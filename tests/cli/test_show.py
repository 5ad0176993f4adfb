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
from made import patched, report, toggle, unpatched
from made_vms import FS_BASE, denies, state, vcpu, vm

from tracer.report.file import STATE, encode, read_as
from tracer.report.formats import OF_REPORTS, write_report
from tracer.report.state_making import states_of_report

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


def test_the_state_at_the_end_may_be_shown_alone(main: Main) -> None:
    made = report(toggle(), state=states_of_report(state(vm("web-01", 812, vcpu(0, denies(FS_BASE))))))
    Path("s.json").write_bytes(encode(made))
    status, out, err = main("show", "--state", "s.json")
    assert (status, err) == (0, "")
    assert out.startswith("ada (Linux 6.1.0-53-amd64, Intel VMX): 1 VM, 1 vCPU\n\nweb-01 (pid 812): vCPU 0\n")
    assert "not shown" not in out
    assert main("show", "--state", "s.json", "-o", "state.json") == (0, "", "")
    assert read_as(STATE, Path("state.json")).vms == (made.state and made.state.vms)
    without = "msrtrace: error: that report does not have what vCPUs intercepted when the trace ended\n"
    assert main("show", "--state", "u.json") == (1, "", without)


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
        (["u.json", "--state", "--format", "html"], "cannot be written as html: text, markdown, json are possible"),
        (
            ["u.json", "--state", "-o", "x.json", "-o", "x.html"],
            "cannot be written as html: text, markdown, json are possible",
        ),
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
