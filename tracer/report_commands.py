"""The commands that make reports and compare them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tracer.console import check_pid, version, warn
from tracer.doctor import Machine, obstacle
from tracer.errors import MsrtraceError

if TYPE_CHECKING:
    from tracer.compare import Comparison
    from tracer.report import Report

_FORMATS = {".txt": "text", ".json": "json", ".md": "markdown", ".html": "html", ".htm": "html"}
_LONGEST_SECONDS = 366 * 86400.0
_by_suffix = ", ".join(_FORMATS)


def _output(function: Callable[..., None]) -> Callable[..., None]:
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


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("-d", "--duration", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Trace so long.")
@_output
@click.option("--format", "form", type=click.Choice(["text", "json", "markdown", "html"]), help="[default: text]")
@click.option("--label", default="", help="What to call this side in comparisons, such as `patched`.")
@click.option("--by-vm", is_flag=True, help="Tell VMs apart, too.")
@click.option("--pid", type=click.IntRange(min=1), help="Trace the VMM with this process id alone.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def report(  # noqa: PLR0917 (click passes them by name)
    duration: float | None,
    outputs: tuple[Path, ...],
    form: str | None,
    label: str,
    by_vm: bool,
    pid: int | None,
    command: tuple[str, ...],
) -> None:
    """Trace for a time, until Ctrl-C, or while COMMAND runs; then report what was counted.

    The exit status is COMMAND's. Its output is left alone: the report of a COMMAND goes to standard error, unless -o
    says otherwise (`-o -`: standard output).
    """
    if duration is not None and command:
        raise click.UsageError("-d and COMMAND exclude each other: a COMMAND is traced as long as it runs")
    if duration is not None and not duration <= _LONGEST_SECONDS:  # not a number, too
        raise click.UsageError(f"-d {duration:g}: at most {_LONGEST_SECONDS:g} seconds")
    _check_outputs(outputs)
    machine = Machine.here()
    check_pid(pid)
    problem = obstacle(machine)
    if problem:
        raise MsrtraceError(problem)

    from tracer.record import check_command, record

    if command:
        check_command(command)

    from tracer.engine import Engine, Options
    from tracer.report import Circumstances, make
    from tracer.tracer import Tracer

    options = Options(by_vm=by_vm, pid=pid)
    tracer = Tracer(lambda layout, symbols: Engine(layout, symbols, options, machine), keep_gone=True)
    tracer.attach(machine.symbols)
    try:
        for warning in tracer.warnings:
            warn(warning)
        with _progress(duration, bool(command)) as progress:
            recording = record(tracer, seconds=duration, command=command, by_vm=by_vm, progress=progress)
        made = make(
            recording.counted,
            Circumstances.here(),
            started=recording.started,
            duration=recording.seconds,
            version=version(),
            label=label,
            command=command,
            exit_status=recording.status,
            notes=(*tracer.warnings, *recording.notes),
        )
    finally:
        tracer.close()
    _deliver(lambda form: _report_as(made, form), form, outputs, aside=bool(command))
    sys.exit(recording.status or 0)


class _Sides(click.Command):
    """A command whose --base and --new take every file up to the next option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """ARGS, with the option repeated before each of its values."""
        spread: list[str] = []
        option = ""
        for argument in args:
            if argument in ("--base", "--new"):
                option = argument
                spread.append(option)
                continue
            if argument.startswith("-") and argument != "-":
                option = ""
            if option and spread[-1] != option:
                spread.append(option)
            spread.append(argument)
        return super().parse_args(ctx, spread)


@click.command(cls=_Sides)
@click.option("--base", multiple=True, metavar="FILE...", help="Reports of one side, one for each repeat.")
@click.option("--new", multiple=True, metavar="FILE...", help="Reports of the other side.")
@click.option(
    "--prometheus",
    metavar="URL",
    help="Compare what this Prometheus stored of many hosts; --base and --new are then label selectors.",
)
@click.option("--since", metavar="DURATION", help="How far back to look there, such as 15m or 2d.  [default: 1h]")
@_output
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "markdown", "json", "html", "changelog"]),
    help="[default: text]; changelog: 75 columns, for a commit message.",
)
@click.option("--force", is_flag=True, help="Compare what should not be compared; the result says why.")
@click.argument("files", nargs=-1, metavar="[BASE NEW]")
def compare(  # noqa: PLR0917 (click passes them by name)
    base: tuple[str, ...],
    new: tuple[str, ...],
    prometheus: str | None,
    since: str | None,
    outputs: tuple[Path, ...],
    form: str | None,
    force: bool,
    files: tuple[str, ...],
) -> None:
    """Put two reports (JSON) side by side: what a filter update costs with each, and what NEW saves.

    With several files a side, `--base a1.json a2.json --new b1.json b2.json`, counts must agree in all repeats,
    and times get a median and an interval. Reports that cannot be compared are refused with exit status 3.

    `compare --prometheus URL --base 'patch="unpatched"' --new 'patch="patched"'` takes a report of each host that a
    selector matches from what Prometheus stored.
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
    _check_outputs(outputs)

    from tracer.compare import compare as put_together
    from tracer.reportfile import read

    if prometheus:
        sides, titles = _stored(prometheus, base, new, since or "1h"), (", ".join(base), ", ".join(new))
        comparison = put_together(*sides, force=force, titles=titles)
    else:
        comparison = put_together(*([read(Path(name)) for name in names] for names in (base, new)), force=force)
    _deliver(lambda form: _comparison_as(comparison, form), form, outputs)


def _stored(url: str, base: Sequence[str], new: Sequence[str], since: str) -> list[list[Report]]:
    """The reports of the hosts that the selectors BASE and NEW match."""
    from tracer.fleet import Prometheus, reports, seconds

    try:
        window = seconds(since)
    except ValueError as error:
        raise click.UsageError(f"--since: {error}") from None
    server = Prometheus(url)
    now = server.now()
    return [reports(server, selectors, window, now) for selectors in (base, new)]


def _report_as(report: Report, form: str) -> bytes:
    from tracer.reportfile import encode
    from tracer.views import report_document

    if form == "json":
        return encode(report)
    if form == "html":
        from tracer.html import report_html

        return report_html(report).encode()
    document = report_document(report)
    return (document.markdown() if form == "markdown" else document.text()).encode()


def _comparison_as(comparison: Comparison, form: str) -> bytes:
    from tracer.views import changelog, comparison_document, comparison_json

    if form == "json":
        return comparison_json(comparison)
    if form == "changelog":
        return changelog(comparison).encode()
    if form == "html":
        from tracer.html import comparison_html

        return comparison_html(comparison).encode()
    document = comparison_document(comparison)
    return (document.markdown() if form == "markdown" else document.text()).encode()


def _check_outputs(outputs: tuple[Path, ...]) -> None:
    """Say before any work is done that its result could not be written."""
    from tracer.reportfile import check_writable

    for output in outputs:
        if str(output) != "-":
            check_writable(output)


def _deliver(made: Callable[[str], bytes], form: str | None, outputs: tuple[Path, ...], aside: bool = False) -> None:
    """Write what MADE gives for a format to each of OUTPUTS; if none, to standard output, or ASIDE to standard error.

    A file that cannot be written is reported when all others are; its content is printed, lest it be lost.
    """
    from tracer.reportfile import write

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


@contextmanager
def _progress(duration: float | None, command: bool) -> Iterator[Callable[[float], None]]:
    """Show on a terminal how far a trace is; the value is told the seconds that have passed."""
    if command or not sys.stderr.isatty():
        yield lambda _: None
    elif duration is None:
        click.echo("msrtrace: tracing until Ctrl-C", err=True)
        yield lambda _: None
    else:
        shown = 0.0
        with click.progressbar(
            length=1000, label=f"tracing for {duration:g} s", file=sys.stderr, show_eta=False
        ) as progress_bar:

            def update(passed: float) -> None:
                nonlocal shown
                part = min(1000, int(passed / duration * 1000))
                progress_bar.update(part - int(shown))
                shown = part

            yield update
