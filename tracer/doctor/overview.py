# SPDX-License-Identifier: GPL-2.0-or-later
"""What a host is to msrtrace, and what to type next: for who types `msrtrace` alone."""

from __future__ import annotations

from contextlib import suppress

from tracer.doctor.examination import MODULE, SYMBOLS, obstacle
from tracer.kernel.layout import choose
from tracer.kernel.machine import Machine
from tracer.model.errors import MsrtraceError

#: Checks of what sudo changes.
_OF_RIGHTS = (SYMBOLS, "capabilities", "perf-event-paranoid", "lockdown", "bpf", "tracefs")
_TRACING = {
    "top": "the counts, live",
    "state": "what each vCPU intercepts now, and who wants that",
    "report": "trace for a while, then report",
    "run": "metrics for Prometheus",
}
_NOT_TRACING = {"doctor": "checks everything, and says how to fix it"}


def overview(machine: Machine) -> list[str]:
    """The host, what can be traced on it or what prevents that, and commands. Raises nothing."""
    vendors = " or ".join(vendor.title for vendor in machine.vendors)
    lines = [f"This host: Linux {machine.release}, {vendors}."]
    # Whoever is not root will type sudo, as the commands below say.
    ignored = _OF_RIGHTS if machine.euid else ()
    problem = obstacle(machine, ignored)
    if problem is None:
        lines.append(_observed(machine))
        commands = _TRACING
    else:
        lines.append(f"It cannot be traced now: {problem}")
        commands = _NOT_TRACING
        if obstacle(machine, (*ignored, MODULE, SYMBOLS)) is None:
            commands = {"run --wait-module": "waits until KVM's module is there", **commands}
    width = max(map(len, commands))
    lines.append("")
    lines += [f"  {machine.command} {name:{width}}  {what}" for name, what in commands.items()]
    return lines


def _observed(machine: Machine) -> str:
    """What can be counted here, as far as that can be read without rights."""
    with suppress(MsrtraceError, OSError):
        layout = choose(machine.symbols)
        if layout:
            calls = "calls and filter updates" if layout.calls else "filter updates, but no calls,"
            return f"{machine.symbols.vendor.module} is loaded: {calls} can be counted (layout {layout.name})."
    return "KVM's module is loaded."
