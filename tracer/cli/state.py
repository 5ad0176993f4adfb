# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace state`: Show which MSRs each vCPU intercepts now, and whether KVM or the VM's filter wants that."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import click

from tracer.cli.console import version
from tracer.cli.output import check_outputs, deliver, output_options
from tracer.cli.parameters import MSR
from tracer.cli.session import check_pid, state_reader
from tracer.model.errors import MsrtraceError
from tracer.model.state import State
from tracer.report.formats import OF_STATES, write_state
from tracer.report.state_view import Shown


@click.command()
@output_options(OF_STATES)
@click.option("--vm", "names", multiple=True, metavar="NAME", help="Only VMs of this name. May be given several times.")
@click.option("--pid", type=click.IntRange(min=1), help="Only the VMs of this process.")
@click.option(
    "--msr",
    "msrs",
    multiple=True,
    type=MSR,
    metavar="MSR",
    help="Only this MSR, by its number (0x48) or its name (IA32_SPEC_CTRL). May be given several times.",
)
@click.option("--all", "everything", is_flag=True, help="Also MSRs that KVM intercepts whatever the filter says.")
def state(  # noqa: PLR0917 (click passes them by name)
    outputs: tuple[Path, ...],
    fmt: str | None,
    names: tuple[str, ...],
    pid: int | None,
    msrs: tuple[int, ...],
    everything: bool,
) -> None:
    """Show which MSRs each vCPU intercepts now, and whether KVM or the VM's filter wants that.

    Every vCPU is found, those of VMs that started long ago, too. JSON has all MSRs, whatever the options say.
    """
    check_outputs(outputs, fmt)
    check_pid(pid)
    from tracer.report.making import HostInfo
    from tracer.report.state_making import make_state
    from tracer.trace.state_reader import named
    from tracer.trace.vm_info import VmInfos

    with state_reader() as reader:
        found = named(reader.read(steady=True), VmInfos())
    taken = datetime.now(timezone.utc)
    wanted = _chosen(found, names, pid)
    made = make_state(wanted, HostInfo.here(found.vendor.module), taken=taken, version=version(), also=msrs)
    deliver(partial(write_state, made, Shown(everything, frozenset(msrs))), fmt, outputs)


def _chosen(state: State, names: tuple[str, ...], pid: int | None) -> State:
    """The VMs that are asked for. Raises MsrtraceError if there is none of a name, or of the process."""
    vms = [vm for vm in state.vms if pid in (None, vm.pid)]
    if pid is not None and not vms:
        raise MsrtraceError(f"process {pid} has no vCPU")
    for name in names:
        if all(vm.name != name for vm in vms):
            others = ", ".join(sorted({vm.name for vm in vms})[:6])
            raise MsrtraceError(f"no VM is called {name}" + (f"; there are {others}" if others else ""))
    return replace(state, vms=tuple(vm for vm in vms if not names or vm.name in names))
