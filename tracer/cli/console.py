# SPDX-License-Identifier: GPL-2.0-or-later
"""How the commands speak to the user."""

from __future__ import annotations

import sys

import click


def say(line: str) -> None:
    """Tell what goes on, on standard output."""
    click.echo(f"msrtrace: {line}")
    sys.stdout.flush()


def warn(line: str) -> None:
    """Tell what is not as it should be, on standard error."""
    click.echo(f"msrtrace: warning: {line}", err=True)


def version() -> str:
    """The version of this msrtrace."""
    from importlib import metadata

    return metadata.version("msrtrace")
