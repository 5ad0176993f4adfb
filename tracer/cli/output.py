# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the commands write what they made: the options -o and --format, and files in the format that they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from tracer.model.errors import MsrtraceError
from tracer.report.file import check_writable, write
from tracer.report.formats import DEFAULT, SUFFIXES, format_of


def output_options(formats: list[str], note: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options -o/--output and --format (one of FORMATS) of a command, which gets `outputs` and `fmt`."""

    def with_options(function: Callable[..., None]) -> Callable[..., None]:
        fmt = click.option("--format", "fmt", type=click.Choice(formats), help=f"[default: {DEFAULT}]{note}")
        output = click.option(
            "-o",
            "--output",
            "outputs",
            multiple=True,
            type=click.Path(dir_okay=False, path_type=Path),
            help=f"Write to this file, at once when all is known; its suffix ({', '.join(SUFFIXES)}) says the format. "
            "May be given several times.",
        )
        return output(fmt(function))

    return with_options


def check_outputs(outputs: tuple[Path, ...], fmt: str | None) -> None:
    """Say before any work is done that its result could not be written, or not in the format that a name asks for."""
    for output in outputs:
        if str(output) == "-":
            continue
        if fmt is None and format_of(output) is None:
            known = ", ".join(SUFFIXES)
            raise click.UsageError(f"-o {output}: no format is called {output.suffix} ({known}); --format chooses one")
        check_writable(output)


def deliver(
    made: Callable[[str], bytes], fmt: str | None, outputs: tuple[Path, ...], *, to_stderr: bool = False
) -> None:
    """Write what MADE gives for a format to each of OUTPUTS; if none, to standard output, or error if TO_STDERR.

    A file that cannot be written is reported when all others are; its content is printed, lest it be lost.
    """

    def show(text: bytes, to_stderr: bool) -> None:
        try:
            click.echo(text, nl=False, err=to_stderr)
        except BrokenPipeError:
            raise
        except OSError as error:
            where = "error" if to_stderr else "output"
            raise MsrtraceError(f"cannot write to standard {where}: {error.strerror}") from None

    if not outputs:
        show(made(fmt or DEFAULT), to_stderr)
    failure = None
    for output in outputs:
        text = made(fmt or format_of(output) or DEFAULT)
        if str(output) == "-":
            show(text, to_stderr=False)
            continue
        try:
            write(output, text)
        except MsrtraceError as error:
            failure = error
            show(text, to_stderr)
    if failure:
        raise failure
