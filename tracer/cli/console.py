# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages of the commands to the user."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress

import click

from tracer.cli import systemd
from tracer.cli.streams import OutputError
from tracer.model.text import COLUMNS, printable

_NARROWEST = 40  # columns

#: Values of TERM for terminals without escape sequences.
DUMB = ("", "dumb", "unknown")


def say(line: str) -> None:
    """Print a message to standard output."""
    click.echo(f"{systemd.prefix(systemd.INFO, sys.stdout)}msrtrace: {printable(line)}")
    sys.stdout.flush()


def warn(line: str) -> None:
    """Print a warning to standard error, if that can be written: what is warned of goes on."""
    with suppress(OutputError, OSError):
        click.echo(f"{systemd.prefix(systemd.WARNING, sys.stderr)}msrtrace: warning: {printable(line)}", err=True)


def is_dumb() -> bool:
    """Whether the terminal, if there is one, has no escape sequences."""
    return os.environ.get("TERM", "") in DUMB


def columns() -> int:
    """The width of the terminal; without one, COLUMNS in the environment, or the usual width."""
    found = shutil.get_terminal_size((COLUMNS, 24)).columns
    return max(_NARROWEST, found or COLUMNS)  # Python 3.10 passes on the 0 that a serial console says


def version() -> str:
    """The version of this msrtrace."""
    from importlib import metadata

    return metadata.version("msrtrace")
