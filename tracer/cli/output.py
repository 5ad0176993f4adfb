# SPDX-License-Identifier: GPL-2.0-or-later
"""The output of the commands: the options -o and --format, and writing in the chosen formats."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import click

from tracer.cli.console import columns
from tracer.model.errors import MsrtraceError
from tracer.model.text import COLUMNS
from tracer.report.formats import DEFAULT, FORMATS, SUFFIXES, format_of, suffix_of


def output_options(formats: list[str], note: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command with -o/--output and --format (one of `formats`), which it gets as `outputs` and `fmt`."""

    def with_options(function: Callable[..., None]) -> Callable[..., None]:
        fmt = click.option(
            "--format",
            "fmt",
            type=click.Choice(formats),
            metavar="FORMAT",
            help=f"{', '.join(formats[:-1])} or {formats[-1]}{note}.  [default: {DEFAULT}]",
        )
        output = click.option(
            "-o",
            "--output",
            "outputs",
            multiple=True,
            type=click.Path(dir_okay=False, path_type=Path),
            metavar="FILE",
            help=f"Write to this file, atomically at the end; its suffix ({', '.join(SUFFIXES)}) selects the format. "
            "May be given several times.",
        )
        return output(fmt(function))

    return with_options


def check_outputs(outputs: tuple[Path, ...], fmt: str | None, formats: Collection[str] = FORMATS) -> None:
    """Fail before any work is done if its result could not be written, or a suffix is not that of one of `formats`."""
    from tracer.report.file import check_writable

    for name in {fmt or format_of(output) or DEFAULT for output in outputs} or {fmt or DEFAULT}:
        if name not in formats:
            raise click.UsageError(f"what is shown cannot be written as {name}: {', '.join(formats)} are possible")
    for output in outputs:
        if str(output) == "-":
            continue
        if not output.name:
            raise click.UsageError(f"-o {output}: that is no name of a file")
        if fmt is None and format_of(output) is None:
            known = ", ".join(SUFFIXES)
            raise click.UsageError(f"-o {output}: no format has the suffix {suffix_of(output)} ({known}); set --format")
        check_writable(output)


def deliver(
    render: Callable[[str, int], bytes], fmt: str | None, outputs: tuple[Path, ...], *, to_stderr: bool = False
) -> None:
    """Write the result to each of `outputs`; if there are none, to standard output or standard error.

    A file that cannot be written is reported after all others are; its content is printed, so that it is not lost.

    :param render: returns the result in a format, given by name, with text that is at most so many columns wide; raises
        MsrtraceError where the format cannot have it
    """
    from tracer.report.file import write

    if not outputs:
        click.echo(render(fmt or DEFAULT, columns()), nl=False, err=to_stderr)
    failure = None
    for output in outputs:
        to_stdout = str(output) == "-"
        try:
            text = render(fmt or format_of(output) or DEFAULT, columns() if to_stdout else COLUMNS)
        except MsrtraceError as error:
            failure = error
            continue
        if to_stdout:
            click.echo(text, nl=False)
            continue
        try:
            write(output, text)
        except MsrtraceError as error:
            failure = error
            click.echo(text, nl=False, err=to_stderr)
    if failure:
        raise failure
