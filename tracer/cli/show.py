# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace show`: Show a saved report (JSON) again, in any format."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from tracer.cli.command import Argument, Documented
from tracer.cli.output import check_outputs, deliver, output_options
from tracer.cli.parameters import REPORT
from tracer.model.errors import MsrtraceError
from tracer.report.formats import OF_REPORTS, OF_STATES, write_report, write_state


@click.command(
    cls=Documented,
    examples={
        "msrtrace show before.json": "As text",
        "msrtrace show before.json -o before.html": "For a browser",
        "msrtrace show --state before.json": "What each vCPU intercepted when the trace ended",
        "ssh host sudo msrtrace report -d 10 --format json | msrtrace show -": "A report from another host",
    },
)
@output_options(OF_REPORTS)
@click.option(
    "--state",
    "state_alone",
    is_flag=True,
    help="Show what all vCPUs intercepted when the trace ended, as `msrtrace state --all` does; not as HTML.",
)
@click.argument(
    "file",
    cls=Argument,
    type=REPORT,
    metavar="REPORT",
    help="A file that `msrtrace report -o FILE.json` wrote, or - for standard input.",
)
def show(outputs: tuple[Path, ...], fmt: str | None, state_alone: bool, file: str) -> None:
    """Show a saved report (JSON) again, in any format."""
    from tracer.report.file import read

    check_outputs(outputs, fmt, OF_STATES if state_alone else OF_REPORTS)
    report = read(Path(file))
    if not state_alone:
        deliver(partial(write_report, report), fmt, outputs)
        return

    from tracer.report.state_making import state_of
    from tracer.report.state_view import RowChoice

    state = state_of(report)
    if state is None:
        raise MsrtraceError("that report does not have what vCPUs intercepted when the trace ended")
    deliver(partial(write_state, state, RowChoice(everything=True)), fmt, outputs)
