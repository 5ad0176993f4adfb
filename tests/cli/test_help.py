# SPDX-License-Identifier: GPL-2.0-or-later
"""What commands say of themselves: each parameter, examples that can be typed, exit statuses, the environment."""

from __future__ import annotations

import re

import click
import pytest
from command import ROOT, command
from command_lines import COMMANDS, check, documented, typed

from tracer.cli.command import ENVIRONMENT, STATUSES, Argument

COLUMNS = 80


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_every_parameter_is_described(name: str | None) -> None:
    for parameter in documented(name).params:
        assert isinstance(parameter, click.Option | Argument)
        assert parameter.help, parameter
        if not (isinstance(parameter, click.Option) and parameter.is_flag):
            assert parameter.metavar, parameter
            assert parameter.metavar.upper() == parameter.metavar


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_examples_can_be_typed(name: str | None) -> None:
    """click takes them, with this command or (those of msrtrace itself) with any."""
    examples = documented(name).examples
    assert 2 <= len(examples) <= 5
    for example in examples:
        found = list(typed(example))
        assert found, example
        for arguments in found:
            if name:
                assert arguments[0] in (name, *(["report"] if name == "show" else []))
            check(arguments)


def test_a_wrong_example_is_found() -> None:
    [arguments] = typed("sudo msrtrace state --vms web \\\n  --all | grep 'a | b'")
    assert arguments == ["state", "--vms", "web", "--all"]
    with pytest.raises(click.NoSuchOption):
        check(arguments)


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_fits_a_terminal(name: str | None) -> None:
    shown = command(*([name] if name else []), "--help", COLUMNS=str(COLUMNS)).stdout.splitlines()
    assert [line for line in shown if len(line) > COLUMNS] == []
    headings = [line for line in shown if line.endswith(":") and not line.startswith(" ")]
    arguments = ["Arguments:"] if documented(name).arguments() else []
    assert headings == [*arguments, "Options:", *([] if name else ["Commands:"]), "Examples:"]


def test_statuses_are_those_of_the_docs() -> None:
    table = (ROOT / "docs/reports.md").read_text().partition("## Exit statuses")[2].partition("\n\n")[2]
    in_docs = set(re.findall(r"^\| (\d+) \|", table.partition("\n\n")[0], re.MULTILINE))
    of_commands = {status for name in COMMANDS for status in documented(name).statuses}
    assert in_docs <= of_commands
    assert {"3", "125", *STATUSES} <= in_docs


def test_the_environment_that_is_told_is_read() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "tracer").rglob("*.py") if path.name != "command.py")
    read = set(re.findall(r"""environ(?:ment)?(?:\.get\(|\[)"([A-Z_]+)\"""", sources))
    # The loader's, that of completion, and whom systemd means by others
    untold = {"LD_LIBRARY_PATH", "COMP_WORDS", "LISTEN_PID", "WATCHDOG_PID"}
    assert read - untold == ENVIRONMENT.keys() - {"COLUMNS"}  # which is read by shutil.get_terminal_size()
