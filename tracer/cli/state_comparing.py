# SPDX-License-Identifier: GPL-2.0-or-later
"""Comparing two states: of two VMs of this host, or from two files."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import click
import msgspec

from tracer.cli.console import version
from tracer.model.errors import MsrtraceError
from tracer.model.state import is_called
from tracer.report.file import STATE, read_as
from tracer.report.formats import SUFFIXES
from tracer.report.state_diff import Side, StateDiff, compare_states
from tracer.report.state_file import StateFile, VmState
from tracer.report.state_view import RowChoice


def compared(given: tuple[str, str], names: tuple[str, ...], pid: int | None, shown: RowChoice) -> StateDiff:
    """The comparison of two files, of their VMs those that are asked for; or of two VMs of this host."""
    files = [_is_file(text) for text in given]
    if all(files):
        return compare_states(*_of_files(given, names, pid), shown)
    if any(files):
        raise click.UsageError("--diff: give two files or two VMs, not one of each")
    if names or pid is not None:
        raise click.UsageError("--diff of two VMs has their names or pids; --vm and --pid are for files")
    return compare_states(*_of_vms(given, shown), shown)


def _is_file(text: str) -> bool:
    """Whether it is meant to be a file: VMs have other names."""
    return text == "-" or "/" in text or Path(text).suffix.lower() in SUFFIXES or Path(text).is_file()


def _of_files(given: tuple[str, str], names: tuple[str, ...], pid: int | None) -> tuple[Side, Side]:
    one, other = (read_as(STATE, Path(text)) for text in given)
    short = ["standard input" if text == "-" else Path(text).name for text in given]
    if short[0] == short[1]:
        short = list(given) if given[0] != given[1] else ["A", "B"]
    found = []
    for title, file in zip(short, (one, other), strict=True):
        vms = [vm for vm in file.vms if (not names or is_called(vm, names)) and pid in (None, vm.pid)]
        if not vms:
            which = f" called {' or '.join(names)}" if names else ""
            raise MsrtraceError(f"{title} has no VM{which}" + (f" of process {pid}" if pid is not None else ""))
        found.append(_side(title, file, vms))
    return found[0], found[1]


def _side(title: str, file: StateFile, vms: list[VmState]) -> Side:
    return Side(title, file.host, file.taken, tuple(vms), tuple(file.notes))


def _of_vms(given: tuple[str, str], shown: RowChoice) -> tuple[Side, Side]:
    from tracer.cli.session import following_states
    from tracer.report.making import HostInfo
    from tracer.report.state_making import make_state

    with following_states() as follower:
        found = follower.read()
    made = make_state(
        found, HostInfo.here(found.vendor.module), taken=datetime.now(timezone.utc), version=version(), also=shown.only
    )
    one, other = (_vm(made, text) for text in given)
    titles = [one.name or one.title, other.name or other.title]
    if titles[0] == titles[1]:
        titles = [one.title, other.title]
    return _side(titles[0], made, [one]), _side(titles[1], made, [other])


def _vm(state: StateFile, text: str) -> VmState:
    """The VM of a pid, a name or a UUID. Raises MsrtraceError unless there is one, or several that are alike."""
    number = int(text) if text.isascii() and text.isdigit() else None
    found = [vm for vm in state.vms if vm.pid == number] or [vm for vm in state.vms if is_called(vm, [text])]
    if not found:
        others = ", ".join(sorted({vm.name for vm in state.vms if vm.name})[:6])
        what = f"{text} is neither a file nor the name, the UUID or the process of a VM"
        raise MsrtraceError(what + (f"; there are {others}" if others else ""))
    if len({msgspec.json.encode((vm.filter, vm.vcpus)) for vm in found}) > 1:
        pids = sorted({vm.pid for vm in found})
        if len(pids) == 1:
            raise MsrtraceError(f"the {len(found)} VMs of process {pids[0]} differ (msrtrace state --pid {pids[0]})")
        which = ", ".join(map(str, pids[:6]))
        raise MsrtraceError(f"{len(found)} VMs are called {text}, and differ: give one of the pids {which}")
    return found[0]
