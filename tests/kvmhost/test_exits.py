# SPDX-License-Identifier: GPL-2.0-or-later
"""What msrtrace counted of the exits of scenarios/exits.py: as the guest, and as KVM's own tracepoints did."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from conftest import NO_FENTRY, PREEMPTIBLE, Collected
from exits import CASES, EFER, FS_BASE, ICR, RELOADS, TSC_DEADLINE, UNKNOWN, WITHOUT_BIT, Op, deny
from test_accesses import VMX, Exits, fate_of

from tracer.model import exits
from tracer.model.options import BACKENDS

Kind = tuple[int, str, str, str, str]


def engine(collected: Collected, name: str, case: str) -> dict[str, Any]:
    """What an engine counted in a case."""
    found: dict[str, Any] = collected.scenario("exits")["engines"][name][case]
    return found


def kinds(found: dict[str, Any]) -> Counter[Kind]:
    """Exits by MSR, access, path, result and guest."""
    members = ("msr", "access", "path", "result", "guest")
    return Counter({tuple(one[member] for member in members): one["exits"] for one in found["exits"]})


def result_of(op: Op, options: str, *, refused: bool, reflected: bool) -> str:
    """What is to become of an access that exits."""
    if reflected:
        return exits.REFLECTED
    if not refused:
        return exits.OK
    if deny(op.msr) in options or f"--deny-{op.access} {op.msr:#x}" in options:
        return exits.FILTERED
    return exits.UNKNOWN if op.msr in (UNKNOWN, WITHOUT_BIT) else exits.INVALID


def expected(name: str, host: str, vendor: str) -> Counter[Kind]:
    """Of a case. Only VMX has a fast path here: without the next RIP, SVM has none."""
    case, found = CASES[name], Counter[Kind]()
    for op in case.ops:
        fate = fate_of(op, case, host, vendor)
        if fate.exits:
            result = result_of(op, case.options, refused=fate.gp or bool(fate.user), reflected=fate.reflected)
            fast = vendor == VMX and op.access == "write" and op.msr in (ICR, TSC_DEADLINE)
            path, guest = exits.FAST if fast else exits.SLOW, exits.L2 if op.level == 2 else exits.L1
            found[op.msr, op.access, path, result, guest] += case.times * op.count
    return found


def backends_of(host: str) -> list[str]:
    """Those that a host has."""
    return [backend for backend in BACKENDS if backend == "kprobe" or host not in NO_FENTRY]


def test_every_backend_counted(collected: Collected) -> None:
    assert {*collected.scenario("exits")["engines"]} == {*backends_of(collected.host), "without"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_exits_are_those_that_the_guest_made(collected: Collected, name: str, backend: str) -> None:
    host, vendor = collected.host, collected.scenario("exits")["vendor"]
    if backend not in backends_of(host):
        assert backend not in collected.scenario("exits")["engines"]
        return
    found, wanted = engine(collected, backend, name), expected(name, host, vendor)
    assert (found["open"], found["refusals"], found["dropped"], found["unattached"]) == (0, 0, 0, [])
    if found["missed"]:  # and counted as such
        assert (backend, host in PREEMPTIBLE) == ("fentry", True)
        assert not kinds(found) - wanted
    else:
        assert kinds(found) == wanted


@pytest.mark.parametrize("name", CASES)
def test_exits_are_those_of_the_kernel_s_tracer(collected: Collected, name: str) -> None:
    seen = Exits.seen(collected.folder / "exits" / name)
    found = kinds(engine(collected, "kprobe", name))
    of: dict[str, Counter[str]] = {"all": Counter(), exits.L2: Counter(), exits.REFLECTED: Counter()}
    slow_writes = 0
    for (_, access, path, result, guest), count in found.items():
        of["all"][access] += count
        if guest == exits.L2:
            of[exits.L2][access] += count
        if result == exits.REFLECTED:
            of[exits.REFLECTED][access] += count
        elif (access, path) == ("write", exits.SLOW):
            slow_writes += count
    assert (of["all"], of[exits.L2], of[exits.REFLECTED]) == (seen.all, seen.of_l2, seen.to_l1)
    assert slow_writes == seen.slow_writes


@pytest.mark.parametrize("name", CASES)
def test_each_vm_s_exits_are_its_own(collected: Collected, name: str) -> None:
    """All VMs of a case are of one process, another in each."""
    pids = {one["pid"] for one in engine(collected, "kprobe", name)["exits"]}
    assert len(pids) == bool(expected(name, collected.host, collected.scenario("exits")["vendor"]))
    assert 0 not in pids


@pytest.mark.parametrize("name", CASES)
def test_counting_exits_changes_no_other_count(collected: Collected, name: str) -> None:
    assert engine(collected, "kprobe", name)["calls"] == engine(collected, "without", name)["calls"]


def test_no_exit_is_lost_when_modules_are_reloaded(collected: Collected) -> None:
    found = collected.scenario("exits")["reloads"]
    assert found["unloads"] == len(RELOADS)
    for at, seen in enumerate(found["seen"], start=1):
        count = sum(RELOADS[:at])
        of_both = {
            (EFER, "read", exits.SLOW, exits.OK, exits.L1),
            (FS_BASE, "read", exits.SLOW, exits.FILTERED, exits.L1),
        }
        assert kinds(seen) == Counter(dict.fromkeys(of_both, count))
        assert (seen["refusals"], seen["dropped"], seen["missed"]) == (0, 0, {})
