# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace report`: Trace for a time, until Ctrl-C, or while COMMAND runs; then report the counts."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tracer.cli.command import Argument, Documented
from tracer.cli.console import is_dumb, version, warn
from tracer.cli.options import TRACING, tracing_options
from tracer.cli.output import check_outputs, deliver, output_options
from tracer.cli.parameters import COMMAND, Seconds
from tracer.cli.session import ready_machine, tracing
from tracer.model.errors import MsrtraceError
from tracer.model.options import Options
from tracer.model.vmm_id import pid_of
from tracer.report.formats import OF_REPORTS, write_report

if TYPE_CHECKING:
    from tracer.model.snapshot import VmInfo
    from tracer.model.state import State
    from tracer.report.state_file import States
    from tracer.trace.tracer import Tracer

_LONGEST_SECONDS = 366 * 86400.0
_TRACER_FAILED = 125  # as with env(1), timeout(1) and others that run a command


@click.command(
    cls=Documented,
    context_settings={"allow_interspersed_args": False},
    examples={
        "sudo msrtrace report -d 60": "What KVM does in a minute",
        "sudo msrtrace report --label before -o before.json -o before.html -- make -j8": "While a workload runs; for "
        "`msrtrace compare`, and for a browser",
        "sudo msrtrace report --exits --by-vm -d 30": "Which MSR accesses make VMs exit, and who wants that",
        "sudo msrtrace report --pid 4321": "Of one VM, until Ctrl-C",
    },
    statuses={
        "125": "with COMMAND, msrtrace itself failed",
        "126": "COMMAND cannot be run",
        "127": "there is no such COMMAND",
        "others": "that of COMMAND, which is 128 + N if signal N ended it",
    },
    **TRACING,
)
@click.option("-d", "--duration", type=Seconds(_LONGEST_SECONDS), metavar="SECONDS", help="How long to trace.")
@output_options(OF_REPORTS)
@click.option("--label", default="", metavar="NAME", help="The name of this report in comparisons, such as `patched`.")
@tracing_options
@click.argument(
    "command",
    cls=Argument,
    nargs=-1,
    type=COMMAND,
    metavar="[-- COMMAND...]",
    help="What to run, with its arguments; all VMs are traced until it ends. Without it: -d, or until Ctrl-C.",
)
def report(  # noqa: PLR0917 (click passes them by name)
    duration: float | None,
    outputs: tuple[Path, ...],
    fmt: str | None,
    label: str,
    options: Options,
    command: tuple[str, ...],
) -> None:
    """Trace for a time, until Ctrl-C, or while COMMAND runs; then report the counts.

    The exit status is that of COMMAND, or 125 if msrtrace itself fails. So that COMMAND's output is not mixed with the
    report, that goes to standard error, unless -o is given (`-o -`: standard output).
    """
    if duration is not None and command:
        raise click.UsageError("give either -d or COMMAND: a COMMAND is traced until it ends")
    if command and _is_report(Path(command[0])):
        what = "compare" if len(command) == 2 and _is_report(Path(command[1])) else "show"
        instead = shlex.join(("msrtrace", what, *command))
        raise click.UsageError(f"{command[0]} is a report, not a command; did you mean `{instead}`?")
    with _own_failures(_TRACER_FAILED if command else MsrtraceError.status):
        check_outputs(outputs, fmt)
        machine = ready_machine(options)

        from tracer.trace.last_states import LastStates
        from tracer.trace.recording import check_command, record

        if command:
            check_command(command)

        from tracer.report.making import HostInfo, make

        with tracing(machine, options, keep_gone=True, states=True, nested=True) as tracer:
            for warning in tracer.warnings:
                warn(warning)
            last = LastStates(tracer)
            with _progress(duration, bool(command)) as progress:

                def passed(seconds: float) -> None:
                    if options.exits:
                        last.look()
                    progress(seconds)

                recording = record(tracer, seconds=duration, command=command, by_vm=options.by_vm, progress=passed)
            # All is counted by now, so reading the state can prevent no probe from counting.
            at_end, state, problems = _state_at_end(tracer, recording.counted.vms)
            made = make(
                recording.counted,
                HostInfo.here(machine.vendor.module),
                started=recording.started,
                duration=recording.seconds,
                version=version(),
                label=label,
                command=command,
                exit_status=recording.status,
                state=state,
                intercepted=last.with_gone(at_end) if at_end else None,
                notes=(*tracer.warnings, *recording.notes, *problems),
            )
        deliver(partial(write_report, made), fmt, outputs, to_stderr=bool(command))
    sys.exit(recording.status or 0)


def _state_at_end(tracer: Tracer, infos: Mapping[int, VmInfo]) -> tuple[State | None, States | None, tuple[str, ...]]:
    """What vCPUs intercept now, and that as a report has it; None and why, if that cannot be read.

    :param infos: of VMs, as the trace has them
    """
    from tracer.report.state_making import states_of_report

    problem = tracer.state_problem
    infos = {pid_of(vmm): info for vmm, info in sorted(infos.items())}  # of one pid the last that began
    try:
        found = tracer.state(steady=True)
        if found:
            named = tuple(
                replace(vm, name=infos[vm.pid].name or vm.name) if vm.pid in infos else vm for vm in found.vms
            )
            found = replace(found, vms=named)
            return found, states_of_report(found), ()
    except Exception as error:
        problem = str(error)
    return None, None, (f"what vCPUs intercepted at the end is not in this report: {problem}",)


@contextmanager
def _own_failures(status: int) -> Iterator[None]:
    """Give errors this exit status; those that have one of their own keep it."""
    try:
        yield
    except MsrtraceError as error:
        if error.status == MsrtraceError.status:
            error.status = status
        raise
    except click.ClickException:
        raise
    except BrokenPipeError:  # the reader of the report has left
        sys.exit(status)
    except Exception as error:
        error.status = status  # type: ignore[attr-defined]
        raise


def _is_report(path: Path) -> bool:
    """Whether the path is that of a report file."""
    from tracer.report.file import BOM, read

    try:
        if not path.is_file():  # nor open a pipe
            return False
        with path.open("rb") as file:
            if not file.read(64).removeprefix(BOM).lstrip().startswith(b"{"):
                return False
        return bool(read(path))
    except (OSError, MsrtraceError):
        return False


@contextmanager
def _progress(duration: float | None, command: bool) -> Iterator[Callable[[float], None]]:
    """Show the progress of a trace on a terminal; yields a function to call with the seconds that have passed."""
    if command or not sys.stderr.isatty():
        yield lambda _: None
    elif duration is None or is_dumb():
        how_long = "until Ctrl-C" if duration is None else f"for {duration:g} s"
        click.echo(f"msrtrace: tracing {how_long}", err=True)
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
