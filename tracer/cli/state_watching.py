# SPDX-License-Identifier: GPL-2.0-or-later
"""Watching what vCPUs intercept: the state, then a line for each change."""

from __future__ import annotations

import sys
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING

import click

from tracer.cli.console import columns, version, warn
from tracer.cli.session import following_states
from tracer.model.module_change import RETRY_SECONDS, ModuleChange
from tracer.model.state import is_called, of
from tracer.report.formats import DEFAULT, write_state
from tracer.report.making import HostInfo
from tracer.report.state_changes import Vms, changes
from tracer.report.state_making import make_state, make_states
from tracer.report.state_view import RowChoice
from tracer.trace.signals import EndSignals

if TYPE_CHECKING:
    from tracer.trace.state_follower import StateFollower


def watch(names: tuple[str, ...], pid: int | None, shown: RowChoice, interval: float) -> None:
    """Print the state, then what changes, until SIGINT or SIGTERM.

    :param names: or UUIDs of the VMs that are asked for, as `pid` is their process: none is all
    :param interval: how often to read the state, in seconds
    """
    with EndSignals() as signals, following_states(pid) as follower:
        watched = _Watched(follower, names, pid, shown)
        host = HostInfo.here(watched.state.vendor.module)
        made = make_state(watched.state, host, taken=datetime.now(timezone.utc), version=version(), also=shown.only)
        click.echo(write_state(made, shown, DEFAULT, columns()))
        for name in names:
            if not any(is_called(vm, [name]) for vm in watched.state.vms):
                warn(f"no VM is called {name} now")
        _say(f"watching for changes, every {interval:g} s", interval)
        while not signals.wait(interval):
            for line in watched.changes():
                _say(line, interval)


class _Watched:
    """The VMs that are watched, as they were read last."""

    def __init__(self, follower: StateFollower, names: tuple[str, ...], pid: int | None, shown: RowChoice) -> None:
        self._follower, self._shown = follower, shown
        self._chosen = partial(of, names=names, pid=pid)
        self.state = self._chosen(follower.read())
        self._vms = self._made()

    def _made(self) -> Vms:
        """The VMs by what identifies them: their process and KVM's address of them."""
        made = make_states(self.state, self._shown.only).vms
        return {(vm.pid, vm.key): shown for vm, shown in zip(self.state.vms, made, strict=True)}

    def changes(self) -> list[str]:
        """Read once more: what changed, a line each. Warns of what cannot be had."""
        module = self._follower.follow()
        before, vms = self.state, self._vms
        self.state = self._chosen(self._follower.read())
        lines = []
        if self.state != before:
            self._vms = self._made()
            lines = changes(vms, self._vms, self._shown)
        if module and module.problem:
            warn(_module_line(module))
        elif module:  # VMs go before it does, and come after it
            lines.insert(0 if module.traced else len(lines), _module_line(module))
        for note in self.state.notes:
            if note not in before.notes:
                warn(note)
        return lines


def _module_line(change: ModuleChange) -> str:
    if change.problem:
        return f"{change.module} cannot be read, trying again in {RETRY_SECONDS:.0f} s: {change.problem}"
    return f"{change.module} was {'loaded again' if change.traced else 'unloaded'}"


def _say(line: str, interval: float) -> None:
    """Print a line with the local time of day, at once, whoever reads it."""
    now = datetime.now().time()
    click.echo(f"{now.isoformat('seconds' if interval >= 1 else 'milliseconds')} {line}")
    sys.stdout.flush()
