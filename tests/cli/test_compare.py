# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace compare` on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made import patched, recalc, report, toggle, unpatched

from tracer.report.file import encode
from tracer.report.report import Report

ROOT = Path(__file__).parents[2]
FIGURES = "makes 30 calls a filter update, 28 of them redundant; patched 13, 11 redundant: 17 fewer calls, -56.7%"
SENTENCE = f"unpatched {FIGURES}"

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports in the current directory."""
    made: dict[str, Report] = {"p": patched(), "u": unpatched(), "new": report(recalc(), label="new")}
    made |= {"other": patched(command=["x"]), "seven": report(toggle(7), label="patched")}
    for name, one in made.items():
        (tmp_path / f"{name}.json").write_bytes(encode(one))
    (tmp_path / "-x.json").write_bytes(encode(patched()))
    (tmp_path / "bad.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    "arguments",
    [
        ["u.json", "p.json"],
        ["--base", "u.json", "--new", "p.json"],
        ["--new", "p.json", "--base", "u.json"],
        ["--base", "u.json", "u.json", "--new", "p.json", "seven.json", "p.json"],
        ["--base", "u.json", "--base", "u.json", "--new=p.json"],
        ["--base", "u.json", "u.json", "--force", "--new", "p.json", "--format", "text"],
        ["--format", "text", "--", "u.json", "p.json"],
    ],
)
def test_two_reports_are_compared(main: Main, arguments: list[str]) -> None:
    status, out, err = main("compare", *arguments)
    assert (status, err) == (0, "")
    assert out.startswith(SENTENCE + "\n")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("columns", ["40", "80", "120"])
def test_a_comparison_fits_the_terminal(main: Main, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    _, out, _ = main("compare", "u.json", "new.json")
    assert max(map(len, out.splitlines())) <= int(columns)
    _, out, _ = main("compare", "u.json", "new.json", "-o", "c.txt")
    assert max(map(len, Path("c.txt").read_text().splitlines())) <= 80


@pytest.mark.usefixtures("files")
def test_repeats_are_compared(main: Main) -> None:
    _, out, _ = main("compare", "--base", "u.json", "u.json", "u.json", "--new", "p.json", "seven.json")
    assert "unpatched: workload --updates 101 (303 filter updates, 3 reports)" in out
    assert "patched: workload --updates 101 (108 filter updates, 2 reports)" in out


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["u.json"],
        ["u.json", "p.json", "p.json"],
        ["--base", "u.json"],
        ["--new", "u.json", "p.json"],
        ["u.json", "--base", "u.json", "--new", "p.json"],
        ["--base", "u.json", "--new", "p.json", "--format", "text", "--", "p.json"],
        ["--base", "--new", "p.json"],
        ["--base", "u.json", "--new"],
        ["u.json", "p.json", "--format", "yaml"],
        ["u.json", "p.json", "--bogus"],
    ],
)
def test_wrong_usage_is_explained(main: Main, arguments: list[str]) -> None:
    status, out, err = main("compare", *arguments)
    assert (status, out) == (2, "")
    assert "Error: " in err


@pytest.mark.usefixtures("files")
def test_incomparable_reports_are_refused_with_status_3(main: Main) -> None:
    status, out, err = main("compare", "other.json", "u.json")
    refusal = (
        "msrtrace: error: the workloads differ: patched ran x, unpatched workload --updates 101 (--force compares them "
    )
    assert (status, out, err) == (3, "", refusal + "anyway)\n")
    status, out, err = main("compare", "--force", "other.json", "u.json")
    assert (status, err) == (0, "")
    assert "FORCED despite: the workloads differ: " in out


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("none.json", "cannot read none.json: No such file or directory"),
        (".", "cannot read .: Is a directory"),
        ("bad.json", "bad.json is not an msrtrace report: Object missing required field `schema`"),
        ("\x1b[2J", r"cannot read \x1b[2J: No such file or directory"),
    ],
)
def test_unreadable_reports_are_an_error(main: Main, name: str, why: str) -> None:
    for arguments in ([name, "u.json"], ["u.json", name]):
        assert main("compare", *arguments) == (1, "", f"msrtrace: error: {why}\n")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("options", "start"),
    [
        (["--format", "markdown"], "**unpatched makes"),
        (["--format", "json"], '{\n "schema": "msrtrace-comparison/1"'),
        (["--format", "html"], "<!doctype html>"),
        (["--format", "changelog"], "Unpatched makes"),
        (["-o", "-"], SENTENCE),
    ],
)
def test_a_comparison_has_every_format(main: Main, options: list[str], start: str) -> None:
    status, out, err = main("compare", *options, "u.json", "p.json")
    assert (status, err) == (0, "")
    assert out.lower().startswith(start.lower())


@pytest.mark.usefixtures("files")
def test_a_comparison_is_written_to_a_file(main: Main) -> None:
    assert main("compare", "u.json", "p.json", "-o", "c.json") == (0, "", "")
    assert json.loads(Path("c.json").read_text())["sentence"] == SENTENCE
    status, _, err = main("compare", "u.json", "p.json", "-o", "none/c.json")
    assert (status, err.startswith("msrtrace: error: cannot write none/c.json: there is no directory ")) == (1, True)


@pytest.mark.usefixtures("files")
def test_a_report_may_come_from_standard_input() -> None:
    def compare(*arguments: str) -> Any:
        command = [sys.executable, "-m", "tracer.cli.main", "compare", *arguments]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, input=encode(patched()), capture_output=True, env=env, check=False, timeout=60)

    for arguments in (["u.json", "-"], ["--base", "u.json", "--new", "-"]):
        assert compare(*arguments).stdout.decode().startswith(SENTENCE)
    assert compare("-", "-").stderr == b"msrtrace: error: standard input is empty\n"


def test_prometheus_is_queried_as_a_file_says(main: Main, tmp_path: Path) -> None:
    sides = ("--base", "a", "--new", "b", "--http.config.file")
    (tmp_path / "http.yml").write_text("x: 1")
    status, _, err = main("compare", "--prometheus", "127.0.0.1:1", *sides, str(tmp_path / "http.yml"))
    assert (status, err.startswith(f"msrtrace: error: {tmp_path}/http.yml: unknown key x (")) == (1, True)
    status, _, err = main("compare", "--prometheus", "127.0.0.1:1", *sides, "none.yml")
    assert (status, err) == (1, "msrtrace: error: cannot read none.yml: No such file or directory\n")
