# SPDX-License-Identifier: GPL-2.0-or-later
"""Man pages and completions: valid, complete, and the same whenever they are made."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from needs import tool
from project import PROJECT, REPO

from tracer.cli import main as cli

COMMANDS = cli.cli.list_commands(click.Context(cli.cli))
EPOCH = "1795000000"  # 2026-11-18


def make(directory: Path, epoch: str = EPOCH) -> dict[str, str]:
    """What is written, by path, as a build has it: with another directory, locale and width of the terminal."""
    script = str(REPO / "packaging/pages.py")
    settings = {"SOURCE_DATE_EPOCH": epoch, "LC_ALL": "C", "COLUMNS": "40", "PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, script, directory], check=True, cwd="/", env=settings, timeout=60)
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pages")
    make(made)
    return made


@pytest.fixture(scope="module")
def pages(directory: Path) -> list[Path]:
    return sorted((directory / "man").iterdir())


def test_all_are_there(directory: Path, tmp_path: Path) -> None:
    names = ["msrtrace", *(f"msrtrace-{name}" for name in COMMANDS)]
    files = {f"man/{name}.1" for name in names} | {
        f"completions/{name}" for name in ("msrtrace", "_msrtrace", "msrtrace.fish")
    }
    assert set(make(tmp_path)) == files


def test_they_do_not_depend_on_when_they_are_made(directory: Path, tmp_path: Path) -> None:
    first = {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}
    assert make(tmp_path) == first
    another = make(tmp_path, "0")
    assert {name for name, text in another.items() if text != first[name]} == {n for n in first if n.endswith(".1")}


def test_mandoc_has_no_complaint(pages: list[Path]) -> None:
    done = subprocess.run([tool("mandoc"), "-T", "lint", "-W", "warning", *pages], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_groff_has_no_complaint(pages: list[Path]) -> None:
    groff = [tool("groff"), "-man", "-Tutf8", "-ww", "-z"]
    done = subprocess.run([*groff, *pages], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def shown(page: Path) -> str:
    """The page as a reader sees it, in one line for each paragraph."""
    rendered = subprocess.run(
        [tool("mandoc"), "-T", "ascii", "-O", "width=78", page], capture_output=True, text=True, check=True
    ).stdout
    return re.sub(r".\x08", "", rendered)


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_a_page_has_what_help_has(directory: Path, name: str | None) -> None:
    root = click.Context(cli.cli, info_name="msrtrace", **cli.cli.context_settings)
    command = cli.cli.get_command(root, name) if name else cli.cli
    assert command
    text = shown(directory / "man" / (f"msrtrace-{name}.1" if name else "msrtrace.1"))
    words = " ".join(text.split())
    assert text.splitlines()[-1].split()[:2] == ["msrtrace", PROJECT["version"]]
    assert "2026-11-18" in text
    for option in command.get_params(root):
        if isinstance(option, click.Option):
            names = ", ".join(sorted(option.opts, key=len))
            assert f"{names}{f' {option.metavar}' if option.metavar else ''}" in words
            assert " ".join((option.help or "").replace("`", "").split()) in words
    for example in command.examples:  # type: ignore[attr-defined]
        assert all(line in text for line in example.splitlines())
    headings = re.findall(r"^[A-Z][A-Z ]+$", text, re.MULTILINE)
    order = ["NAME", "SYNOPSIS", "DESCRIPTION", "ARGUMENTS", "OPTIONS", "COMMANDS", "EXAMPLES", "EXIT STATUS"]
    order += ["ENVIRONMENT", "FILES", "OVERHEAD", "SEE ALSO"]
    assert headings == [heading for heading in order if heading in headings]
    traces = name in ("report", "run", "state", "top")
    assert ("OVERHEAD" in headings) == ("FILES" in headings) == traces
    assert {*order} - {*headings} <= {"ARGUMENTS", "COMMANDS", "FILES", "OVERHEAD"}


def test_apropos_finds_them(pages: list[Path]) -> None:
    names = [re.search(r"^NAME\n\s+(msrtrace[\w-]*) - \w", shown(page), re.MULTILINE) for page in pages]
    assert [match[1] if match else None for match in names] == [page.stem for page in pages]


def test_what_may_be_copied_has_ascii_hyphens(pages: list[Path]) -> None:
    """groff typesets a hyphen that is not escaped as U+2010, which no shell knows, and would hyphenate words."""
    groff = [tool("groff"), "-man", "-Tutf8", "-rLL=78n"]
    rendered = subprocess.run([*groff, *pages], capture_output=True, text=True, check=True).stdout
    assert "\N{HYPHEN}" not in rendered
