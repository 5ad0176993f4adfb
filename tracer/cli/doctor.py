# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace doctor`: Check everything that tracing needs, and say how to fix what is missing."""

from __future__ import annotations

import os
import sys

import click

from tracer.cli.command import Documented
from tracer.cli.console import columns, is_dumb
from tracer.cli.session import this_machine
from tracer.doctor.check import State
from tracer.doctor.examination import examine
from tracer.doctor.output import as_json, as_text


@click.command(
    cls=Documented,
    examples={
        "sudo msrtrace doctor": "Is anything missing, and which command fixes it?",
        "sudo msrtrace doctor --json | jq '.checks[] | select(.state != \"ok\")'": "What is not right, for a script",
    },
    statuses={"1": "something that tracing needs is missing"},
    environment=("NO_COLOR", "TERM", "BCC_KERNEL_SOURCE"),
)
@click.option("--json", "as_json_", is_flag=True, help="Print the checks as JSON.")
def doctor(as_json_: bool) -> None:
    """Check everything that tracing needs, and say how to fix what is missing."""
    machine = this_machine()
    checks = examine(machine)
    if as_json_:
        click.echo(as_json(checks, machine))
    else:
        color = sys.stdout.isatty() and not is_dumb() and not os.environ.get("NO_COLOR")
        click.echo(as_text(checks, color, columns()))
    sys.exit(1 if any(check.state is State.FAILED for check in checks) else 0)
