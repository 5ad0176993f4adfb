# SPDX-License-Identifier: GPL-2.0-or-later
"""Every requirement of tracing: met or not, and the exact step that fixes it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import replace

from tracer.doctor import host, rights, tools
from tracer.doctor.check import Check, Found, State
from tracer.doctor.containers import check_processes, on_host
from tracer.kernel.machine import Machine, search

MODULE, SYMBOLS = "module", "symbols"
#: Checks of what reading the states of vCPUs does not need.
NEEDED_BY_PROBES_ALONE = (SYMBOLS, "livepatch", "library", "perf-event-paranoid", "tracefs")
#: In the order in which to fix them. MODULE is shown under the name of the vendor's module.
_CHECKS: dict[str, Callable[[Machine], Found]] = {
    "cpu": host.check_cpu,
    MODULE: host.check_module,
    SYMBOLS: host.check_symbols,
    "exits": host.check_exits,
    "livepatch": host.check_livepatch,
    "library": tools.check_library,
    "headers": tools.check_headers,
    "bcc": tools.check_bcc,
    "btf": host.check_btf,
    "lockdown": rights.check_lockdown,
    "capabilities": rights.check_capabilities,
    "perf-event-paranoid": rights.check_perf_event_paranoid,
    "bpf": rights.check_bpf,
    "processes": check_processes,
    "tracefs": rights.check_tracefs,
}


def examine(machine: Machine) -> list[Check]:
    """Every check, in the order in which a user would fix them. Never raises."""
    return list(_checked(replace(machine)))  # a copy, so that what it caches is not reused


def obstacle(machine: Machine, ignore: Collection[str] = ()) -> str | None:
    """What prevents tracing, as one line "what is wrong: what to do", or None.

    Of several obstacles the first, and the names of the others with the command that shows them all.

    The machine caches its symbols, which take 0.1 s to read, for the trace to come. BTF is not checked: it prevents
    nothing.

    :param ignore: names of checks to skip
    """
    failed = [check for check in _checked(machine, ("btf", *ignore)) if check.state is State.FAILED]
    if not failed:
        return None
    others = [check.name for check in failed[1:] if check.fix not in {f"fix {one.name} first" for one in failed}]
    first = f"{failed[0].detail}: {failed[0].fix}"
    return f"{first}; and not only that ({', '.join(others)}): {machine.command} doctor" if others else first


def explain_eperm(machine: Machine) -> str:
    """The probable reason for EPERM, which BCC reports as "Need super-user privileges" even to root: one line."""
    with suppress(OSError):
        if lockdown := rights.explain_lockdown(machine):
            return f"the kernel refused: {lockdown}"
    by_kprobes = replace(machine, expected=lambda _: ("kprobe",))  # what is tried last, if another was expected
    checks = {check.name: check for check in _checked(by_kprobes, ("btf", "bcc"))}
    for check in (checks["capabilities"], checks["perf-event-paranoid"]):
        if check.state in (State.FAILED, State.WARNING):
            return f"the kernel refused: {check.detail}: {check.fix}"
    why, fix = "probably SELinux or another security module", "see sudo dmesg and sudo ausearch -m avc -ts recent"
    if not rights.lockdown_asked(machine) and not machine.at(rights.LOCKDOWN).exists():
        why = "probably SELinux or another security module, or lockdown by the kernel's config"
        mount = on_host(machine, "sudo mount -t securityfs securityfs /sys/kernel/security")
        fix += f"; {mount}, which shows lockdown to msrtrace doctor"
    if search(r"^Seccomp:\s*(\d)", machine.text("/proc/self/status", "")) == "2":
        why, fix = "probably the seccomp filter of the container or service", rights.ALLOW_CALLS
    return f"the kernel refused: {why}: {fix}"


def _checked(machine: Machine, ignore: Collection[str] = ()) -> Iterator[Check]:
    for name in (name for name in _CHECKS if name not in ignore):
        try:
            state, detail, fix = _CHECKS[name](machine)
        except OSError as error:
            state, fix = State.UNKNOWN, f"{machine.command} doctor" if machine.euid else None
            detail = f"cannot read {error.filename}: {error.strerror}"
        except Exception as error:  # whatever is odd on this machine, run the other checks
            state, detail, fix = State.UNKNOWN, f"cannot be checked: {error}", None
        yield Check(machine.vendor.module_name if name == MODULE else name, state, " ".join(detail.split()), fix)
