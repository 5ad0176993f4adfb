# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages of the commands to the user."""

from __future__ import annotations

import sys

import click


def say(line: str) -> None:
    """Print a message to standard output."""
    click.echo(f"msrtrace: {line}")
    sys.stdout.flush()


def warn(line: str) -> None:
    """Print a warning to standard error."""
    click.echo(f"msrtrace: warning: {line}", err=True)


def version() -> str:
    """The version of this msrtrace."""
    from importlib import metadata

    return metadata.version("msrtrace")
