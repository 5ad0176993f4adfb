# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace compare`: Compare two reports (JSON): what a filter update costs in each, and what NEW saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tracer.cli.output import check_outputs, deliver, output_options
from tracer.report.compare import compare as compare_reports
from tracer.report.file import read
from tracer.report.formats import OF_COMPARISONS, write_comparison

if TYPE_CHECKING:
    from tracer.report.fleet.fleet import Fleet


class _Sides(click.Command):
    """A command whose --base and --new take every file up to the next option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments after repeating --base and --new before each of their values."""
        repeated: list[str] = []
        option = ""
        for argument in args:
            if argument in ("--base", "--new"):
                option = argument
                repeated.append(option)
                continue
            if argument.startswith("-") and argument != "-":
                option = ""
            if option and repeated[-1] != option:
                repeated.append(option)
            repeated.append(argument)
        return super().parse_args(ctx, repeated)


@click.command(cls=_Sides)
@click.option("--base", multiple=True, metavar="FILE...", help="Reports of one side, one for each repeat.")
@click.option("--new", multiple=True, metavar="FILE...", help="Reports of the other side.")
@click.option(
    "--prometheus",
    metavar="URL",
    help="Compare many hosts by what this Prometheus stored; --base and --new are then label selectors.",
)
@click.option("--since", metavar="DURATION", help="How far back to look there, such as 15m or 2d.  [default: 1h]")
@output_options(OF_COMPARISONS, "; changelog: 75 columns, for a commit message.")
@click.option("--force", is_flag=True, help="Compare even what should not be compared; the result says why.")
@click.argument("files", nargs=-1, metavar="[BASE NEW]")
def compare(  # noqa: PLR0917 (click passes them by name)
    base: tuple[str, ...],
    new: tuple[str, ...],
    prometheus: str | None,
    since: str | None,
    outputs: tuple[Path, ...],
    fmt: str | None,
    force: bool,
    files: tuple[str, ...],
) -> None:
    """Compare two reports (JSON): what a filter update costs in each, and what NEW saves.

    With several files per side, `--base a1.json a2.json --new b1.json b2.json`, counts must agree in all repeats,
    and times have a median and a confidence interval. Reports that cannot be compared are refused with exit status 3.

    `compare --prometheus URL --base 'patch="unpatched"' --new 'patch="patched"'` compares the hosts that match the
    selectors, by what Prometheus stored.
    """
    if files and (base or new):
        raise click.UsageError("give either BASE and NEW, or --base FILE... and --new FILE...")
    if files and prometheus:
        raise click.UsageError("with --prometheus give --base SELECTOR and --new SELECTOR")
    if files:
        if len(files) != 2:
            raise click.UsageError("give two reports, BASE and NEW; for repeats, --base FILE... --new FILE...")
        base, new = files[:1], files[1:]
    if not (base and new):
        raise click.UsageError("give two reports, BASE and NEW")
    if since and not prometheus:
        raise click.UsageError("--since is for --prometheus")
    check_outputs(outputs, fmt)
    if prometheus:
        fleet, titles = _stored(prometheus, base, new, since or "1h"), (", ".join(base), ", ".join(new))
        comparison = compare_reports(*fleet.sides, force=force, titles=titles)
        comparison = replace(comparison, warnings=(*fleet.warnings, *comparison.warnings))
    else:
        comparison = compare_reports(*([read(Path(name)) for name in names] for names in (base, new)), force=force)
    deliver(partial(write_comparison, comparison), fmt, outputs)


def _stored(url: str, base: Sequence[str], new: Sequence[str], since: str) -> Fleet:
    """The reports on the hosts that the selectors match, from Prometheus."""
    from tracer.report.fleet.fleet import Prometheus, compared, seconds

    try:
        window = seconds(since)
    except ValueError as error:
        raise click.UsageError(f"--since: {error}") from None
    server = Prometheus(url)
    return compared(server, [base, new], window, server.now())
