# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace state`: Show which MSRs each vCPU intercepts now, and whether KVM or the VM's filter wants that."""

from __future__ import annotations

from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tracer.cli.command import Documented
from tracer.cli.console import version
from tracer.cli.options import TRACING
from tracer.cli.output import check_outputs, deliver, output_options
from tracer.cli.parameters import MSR, PID, VM, VM_OR_FILE, Seconds
from tracer.cli.session import check_pid, following_states
from tracer.model.errors import MsrtraceError
from tracer.report.formats import OF_STATES, write_state, write_state_diff

if TYPE_CHECKING:
    from tracer.model.state import State

_INTERVAL_SECONDS, _LONGEST_SECONDS = 1.0, 86400.0
_OVERHEAD = (
    "It attaches no probe: it reads the memory of KVM, and guests do not notice. docs/cost.md in msrtrace's source has "
    "what a read of 1,000 vCPUs takes.",
)


@click.command(
    cls=Documented,
    examples={
        "sudo msrtrace state": "Which accesses of which VMs exit, and who wants that",
        "sudo msrtrace state --vm web-01 --msr IA32_SPEC_CTRL": "One MSR of one VM",
        "sudo msrtrace state --diff web-01 web-02": "Why does web-01 exit where web-02 does not?",
        "sudo msrtrace state --watch": "Then a line for each change, until Ctrl-C",
        "sudo msrtrace state -o state.json": "All of it, for --diff and for scripts",
    },
    **{**TRACING, "overhead": _OVERHEAD},
)
@output_options(OF_STATES)
@click.option(
    "--vm",
    "names",
    multiple=True,
    type=VM,
    metavar="NAME",
    help="Only VMs with this name or UUID. May be given several times.",
)
@click.option("--pid", type=PID, metavar="PID", help="Only the VMs of this process.")
@click.option(
    "--msr",
    "msrs",
    multiple=True,
    type=MSR,
    metavar="MSR",
    help="Only this MSR, by its number (0x48) or its name (IA32_SPEC_CTRL). May be given several times.",
)
@click.option("--all", "everything", is_flag=True, help="Also MSRs that KVM intercepts whatever the filter says.")
@click.option("--watch", "watched", is_flag=True, help="Then print a line for each change, until SIGINT or SIGTERM.")
@click.option(
    "--interval",
    type=Seconds(_LONGEST_SECONDS, least=0.1),
    metavar="SECONDS",
    help=f"How often --watch reads what vCPUs intercept.  [default: {_INTERVAL_SECONDS:g}]",
)
@click.option(
    "--diff",
    nargs=2,
    type=VM_OR_FILE,
    metavar="A B",
    help="Why does A exit where B does not? Two VMs of this host, by name, UUID or pid, or two files of "
    "`-o FILE.json`.",
)
def state(  # noqa: PLR0917 (click passes them by name)
    outputs: tuple[Path, ...],
    fmt: str | None,
    names: tuple[str, ...],
    pid: int | None,
    msrs: tuple[int, ...],
    everything: bool,
    watched: bool,
    interval: float | None,
    diff: tuple[str, str] | None,
) -> None:
    """Show which MSRs each vCPU intercepts now, and whether KVM or the VM's filter wants that.

    Every vCPU is found, those of VMs that started long ago, too. JSON has all MSRs, whatever the options say.
    """
    from tracer.report.state_view import RowChoice

    shown = RowChoice(everything, frozenset(msrs))
    _check_usage(outputs, fmt, watched, interval, diff)
    check_outputs(outputs, fmt, OF_STATES)
    if diff:
        from tracer.cli.state_comparing import compared

        deliver(partial(write_state_diff, compared(diff, names, pid, shown)), fmt, outputs)
        return
    check_pid(pid)
    if watched:
        from tracer.cli.state_watching import watch

        watch(names, pid, shown, interval or _INTERVAL_SECONDS)
        return

    from tracer.report.making import HostInfo
    from tracer.report.state_making import make_state

    with following_states(pid) as follower:
        found = follower.read()
    taken = datetime.now(timezone.utc)
    wanted = _chosen(found, names, pid)
    made = make_state(wanted, HostInfo.here(found.vendor.module), taken=taken, version=version(), also=msrs)
    deliver(partial(write_state, made, shown), fmt, outputs)


def _check_usage(
    outputs: tuple[Path, ...], fmt: str | None, watched: bool, interval: float | None, diff: object | None
) -> None:
    """Raise click.UsageError for options that exclude each other."""
    if watched and diff:
        raise click.UsageError("give either --watch or --diff")
    if interval is not None and not watched:
        raise click.UsageError("--interval is for --watch")
    if watched and (outputs or fmt not in (None, "text")):
        raise click.UsageError("--watch prints text to standard output: it excludes -o and other formats")


def _chosen(state: State, names: tuple[str, ...], pid: int | None) -> State:
    """The VMs that are asked for. Raises MsrtraceError if there is none of a name, or of the process."""
    from tracer.model.state import is_called, of

    vms = [vm for vm in state.vms if pid in (None, vm.pid)]
    if pid is not None and not vms:
        raise MsrtraceError(f"process {pid} has no vCPU")
    for name in names:
        if not any(is_called(vm, [name]) for vm in vms):
            others = ", ".join(sorted({vm.name for vm in vms})[:6])
            raise MsrtraceError(f"no VM is called {name}" + (f"; there are {others}" if others else ""))
    return of(state, names, pid)
