# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace compare`: Compare two reports (JSON): what a filter update costs in each, and what NEW saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tracer.cli.command import Argument, Documented
from tracer.cli.output import check_outputs, deliver, output_options
from tracer.cli.parameters import REPORT
from tracer.report.formats import OF_COMPARISONS, write_comparison

if TYPE_CHECKING:
    from tracer.report.compare import Comparison

#: A time that a user takes from another clock may be so much ahead of the server's.
_SKEW_SECONDS = 5.0


class _Sides(Documented):
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


@click.command(
    cls=_Sides,
    examples={
        "msrtrace compare before.json after.json": "Two reports, of `msrtrace report -o FILE.json`",
        "msrtrace compare --base a1.json a2.json --new b1.json b2.json": "With repeats of both",
        "msrtrace compare --format changelog before.json after.json": "As text for a commit message",
        "msrtrace compare --prometheus http://localhost:9090 \\\n"
        """    --base 'patch="unpatched"' --new 'patch="patched"'""": "Two groups of hosts, by what Prometheus stored",
        "msrtrace compare --prometheus http://localhost:9090 \\\n"
        """    --base-at 2026-11-20T08:00Z --base 'job="kvm"' --new 'job="kvm"'""": "Before and after an upgrade",
    },
    statuses={"3": "the reports cannot be compared; --force does it all the same"},
)
@click.option("--base", multiple=True, type=REPORT, metavar="FILE...", help="Reports of one side, one for each repeat.")
@click.option("--new", multiple=True, type=REPORT, metavar="FILE...", help="Reports of the other side.")
@click.option(
    "--prometheus",
    metavar="URL",
    help="Compare many hosts by what this Prometheus stored; --base and --new are then label selectors.",
)
@click.option("--since", metavar="DURATION", help="How far back to look there, such as 15m or 2d.  [default: 1h]")
@click.option("--base-at", metavar="TIME", help="When the base's window ends (RFC 3339, Unix seconds).  [default: now]")
@click.option("--new-at", metavar="TIME", help="When that of the other side ends; the hosts may then be the same.")
@click.option(
    "--http.config.file",
    "http_config",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="How to talk to Prometheus: credentials, TLS, headers, as promtool takes it (YAML).",
)
@output_options(OF_COMPARISONS, " (75 columns, for a commit message)")
@click.option("--force", is_flag=True, help="Compare even what should not be compared; the result says why.")
@click.argument(
    "files",
    cls=Argument,
    nargs=-1,
    type=REPORT,
    metavar="[BASE NEW]",
    help="The reports (JSON); - is standard input. For repeats, or with --prometheus: --base and --new.",
)
def compare(  # noqa: PLR0917 (click passes them by name)
    base: tuple[str, ...],
    new: tuple[str, ...],
    prometheus: str | None,
    since: str | None,
    base_at: str | None,
    new_at: str | None,
    http_config: str | None,
    outputs: tuple[Path, ...],
    fmt: str | None,
    force: bool,
    files: tuple[str, ...],
) -> None:
    """Compare two reports (JSON): what a filter update costs in each, and what NEW saves.

    With several files per side, `--base a1.json a2.json --new b1.json b2.json`, counts must agree in all repeats,
    and times have a median and a confidence interval. Reports that cannot be compared are refused with exit status 3.

    With --prometheus, --base and --new are label selectors: the hosts that match them are compared, by what Prometheus
    stored. With --base-at TIME these are hosts before and after an upgrade.
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
    asking = {"--since": since, "--base-at": base_at, "--new-at": new_at, "--http.config.file": http_config}
    for option, value in asking.items():
        if value is not None and not prometheus:
            raise click.UsageError(f"{option} is for --prometheus")
    check_outputs(outputs, fmt)
    if prometheus:
        comparison = _of_stored(prometheus, http_config, (base, new), since or "1h", (base_at, new_at), force=force)
    else:
        comparison = _of_files(base, new, force=force)
    deliver(partial(write_comparison, comparison), fmt, outputs)


def _of_files(base: Sequence[str], new: Sequence[str], *, force: bool) -> Comparison:
    """Compare the reports in these files."""
    from tracer.report.compare import compare
    from tracer.report.file import read

    return compare(*([read(Path(name)) for name in names] for names in (base, new)), force=force)


def _of_stored(
    url: str,
    http_config: str | None,
    sides: tuple[Sequence[str], Sequence[str]],
    since: str,
    at: tuple[str | None, str | None],
    *,
    force: bool,
) -> Comparison:
    """Compare the hosts that the selectors of the sides match, by what Prometheus stored before the times `at`."""
    from tracer.report.compare import Window
    from tracer.report.compare import compare as compare_reports
    from tracer.report.fleet.fleet import Prometheus, before_and_after, compared, seconds
    from tracer.report.fleet.http_config import read_http_config

    try:
        window = seconds(since)
    except ValueError as error:
        raise click.UsageError(f"--since: {error}") from None
    times = [_time(option, text) for option, text in zip(("--base-at", "--new-at"), at, strict=True)]
    server = Prometheus(url, read_http_config(Path(http_config)) if http_config is not None else None)
    now = server.now()
    base_end, new_end = _checked_ends(times, now, window)
    titles = (", ".join(sides[0]), ", ".join(sides[1]))
    if base_end == new_end:
        fleet = compared(server, sides, window, base_end, past=times[0] is not None)
    else:
        fleet = before_and_after(server, sides, window, (base_end, new_end))
        if titles[0] == titles[1]:
            titles = (f"before ({titles[0]})", f"after ({titles[1]})")
    comparison = compare_reports(
        *fleet.sides,
        force=force,
        titles=titles,
        windows=(Window(*_window(base_end, window)), Window(*_window(new_end, window))),
        apart=fleet.apart,
    )
    return replace(comparison, warnings=(*fleet.warnings, *comparison.warnings))


def _time(option: str, text: str | None) -> float | None:
    """The time that an option was given, in seconds since 1970."""
    from tracer.report.fleet.fleet import point_in_time

    try:
        return None if text is None else point_in_time(text)
    except ValueError as error:
        raise click.UsageError(f"{option}: {error}") from None


def _checked_ends(times: Sequence[float | None], now: float, window: int) -> tuple[float, float]:
    """When the windows end; `now` is by the server's clock.

    Raises click.UsageError for times in the future, and unless base's window is before the other, or both are one.
    """
    for option, time in zip(("--base-at", "--new-at"), times, strict=True):
        if time is not None and time > now + _SKEW_SECONDS:
            raise click.UsageError(f"{option} is in the future: at Prometheus it is {_utc(now)}")
    base, new = (now if time is None else time for time in times)
    if base > new:
        raise click.UsageError(f"the base's window ends at {_utc(base)}, after that of the other side, at {_utc(new)}")
    if base != new and base > new - window:
        raise click.UsageError(
            f"the windows overlap: one ends at {_utc(base)}, the other begins at {_utc(new - window)}; "
            "choose a shorter --since, or other times"
        )
    return base, new


def _utc(time: float) -> str:
    return f"{datetime.fromtimestamp(time, timezone.utc):%Y-%m-%d %H:%M:%S} UTC"


def _window(end: float, seconds: int) -> tuple[datetime, datetime]:
    return datetime.fromtimestamp(end - seconds, timezone.utc), datetime.fromtimestamp(end, timezone.utc)
