# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace show`: Show a saved report (JSON) again, in any format."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from tracer.cli.output import check_outputs, deliver, output_options
from tracer.report.file import read
from tracer.report.formats import OF_REPORTS, write_report


@click.command()
@output_options(OF_REPORTS)
@click.argument("file", metavar="REPORT")
def show(outputs: tuple[Path, ...], fmt: str | None, file: str) -> None:
    """Show a saved report (JSON) again, in any format.

    REPORT is a file that `msrtrace report -o FILE.json` wrote, or `-` for standard input.
    """
    check_outputs(outputs, fmt)
    report = read(Path(file))
    deliver(partial(write_report, report), fmt, outputs)
