# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the commands write what they made: the option -o, and files in the format that their names say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from tracer.model.errors import MsrtraceError
from tracer.report.file import check_writable, write

_FORMATS = {".txt": "text", ".json": "json", ".md": "markdown", ".html": "html", ".htm": "html"}
_by_suffix = ", ".join(_FORMATS)


def output_option(function: Callable[..., None]) -> Callable[..., None]:
    """The option -o/--output of a command."""
    return click.option(
        "-o",
        "--output",
        "outputs",
        multiple=True,
        type=click.Path(dir_okay=False, path_type=Path),
        help=f"Write to this file, at once when all is known; its suffix ({_by_suffix}) says the format. "
        "May be given several times.",
    )(function)


def check_outputs(outputs: tuple[Path, ...]) -> None:
    """Say before any work is done that its result could not be written."""
    for output in outputs:
        if str(output) != "-":
            check_writable(output)


def deliver(made: Callable[[str], bytes], form: str | None, outputs: tuple[Path, ...], aside: bool = False) -> None:
    """Write what MADE gives for a format to each of OUTPUTS; if none, to standard output, or ASIDE to standard error.

    A file that cannot be written is reported when all others are; its content is printed, lest it be lost.
    """

    def show(text: bytes, aside: bool) -> None:
        try:
            click.echo(text, nl=False, err=aside)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise MsrtraceError(
                f"cannot write to standard {'error' if aside else 'output'}: {error.strerror}"
            ) from None

    if not outputs:
        show(made(form or "text"), aside)
    failure = None
    for output in outputs:
        text = made(form or _FORMATS.get(output.suffix.lower(), "text"))
        if str(output) == "-":
            show(text, aside=False)
            continue
        try:
            write(output, text)
        except MsrtraceError as error:
            failure = error
            show(text, aside)
    if failure:
        raise failure
