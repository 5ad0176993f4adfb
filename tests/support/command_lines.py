# SPDX-License-Identifier: GPL-2.0-or-later
"""Command lines as users type them: whether msrtrace would take them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click

from tracer.cli import main as cli
from tracer.cli.command import Documented

COMMANDS = cli.cli.list_commands(click.Context(cli.cli))
#: A pipe, and not in quotes.
_PIPE = re.compile(r""" \| (?=(?:[^'"]|'[^']*'|"[^"]*")*$)""")


def root() -> click.Context:
    """The context of msrtrace itself."""
    return click.Context(cli.cli, info_name="msrtrace", **cli.cli.context_settings)


def documented(name: str | None) -> Documented:
    """The command of that name, or msrtrace itself."""
    found = cli.cli.get_command(root(), name) if name else cli.cli
    assert isinstance(found, Documented)
    return found


def typed(line: str) -> Iterator[list[str]]:
    """The arguments of each msrtrace on a command line."""
    for part in _PIPE.split(line.replace("\\\n", " ").removesuffix("&")):
        words = shlex.split(part)
        if "msrtrace" in words:
            yield words[words.index("msrtrace") + 1 :]


def check(arguments: list[str]) -> None:
    """Raise click.UsageError if click would not take these arguments. Nothing is run."""
    if arguments:
        command, *others = arguments
        with documented(command).make_context(command, others, parent=root()) as ctx:
            assert ctx.args == []
