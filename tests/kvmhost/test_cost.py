# SPDX-License-Identifier: GPL-2.0-or-later
"""msrtrace costs no more than it did: instructions per traced call against the ceilings in ceilings.json."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from answers import PER_UPDATE, PER_VCPU
from conftest import NO_FENTRY, Collected
from cost import instructions_per_second, per_call
from guest import MEASURED_UPDATES
from metrics_text import Metrics

CEILINGS_FILE = Path(__file__).with_name("ceilings.json")
#: By host, what was measured, and MARGIN: instructions a call, by backend and variant; millions of them for a start.
CEILINGS: dict[str, dict[str, dict[str, int]]] = json.loads(CEILINGS_FILE.read_text())
MARGIN = 1.02  # a kernel update moves the kernel's part of the cost; on one kernel it repeats to the tick
RSS_KB = 45_000  # DESIGN.md, "Cost"
BY_VM = 1.15  # the same: what a call may cost with --by-vm, of what it costs without
SLACK = 0.9  # a ceiling that is further above than this holds nothing
#: A start takes what the guest's packages and kernel are built like, and what else the guest does meanwhile.
START_SLACK = 0.75
#: A start also waits until the kernel has seen every task switch. The kernel checks once in HZ/10 jiffies, so that the
#: same start may need one check more (rcu_tasks_wait_gp(), kernel/rcu/tasks.h; at 250 jiffies a second, 26 of them).
LOOK_SECONDS = 0.104


def hold(host: str, backend: str, variant: str, cost: float, slack: float = SLACK, *, by_chance: float = 0.0) -> None:
    """Fail if COST, in the unit of CEILINGS, is above its ceiling, or so far below that the ceiling holds nothing.

    BY_CHANCE may come on top of what it costs.
    """
    ceiling = CEILINGS[host][backend][variant]
    what = f"{host}, {backend}, {variant}: {cost:.1f}, the ceiling is {ceiling}"
    hint = f"{CEILINGS_FILE.name} should have {math.ceil(cost * MARGIN)}"
    assert cost <= ceiling + by_chance, f"{what}; if that is meant, {hint}"
    assert cost >= ceiling * slack, f"{what}: lower it, {hint}"


@pytest.mark.parametrize("backend", ["kprobe", "fentry"])
def test_a_traced_call_costs_no_more_than_recorded(timed: Collected, backend: str) -> None:
    ticks = timed.scenario("counts")["ticks"]
    if backend == "fentry" and timed.host in NO_FENTRY:
        assert backend not in CEILINGS[timed.host]
        return
    traced = ticks["traced"] if backend == "kprobe" else timed.scenario("fentry")["traced"]
    for variant in timed.variants:
        hold(timed.host, backend, variant, per_call(timed.host, variant, traced[variant], ticks["untraced"][variant]))


@pytest.mark.parametrize("backend", ["kprobe", "fentry"])
def test_counting_an_exit_costs_no_more_than_recorded(timed: Collected, backend: str) -> None:
    prices = timed.scenario("exits")["prices"]
    if backend == "fentry" and timed.host in NO_FENTRY:
        assert backend not in prices
        return
    for kind, untraced in prices["none"].items():
        hold(timed.host, backend, f"exit: {kind}", prices[backend][kind] - untraced)


@pytest.mark.parametrize("backend", ["kprobe", "fentry"])
def test_telling_vms_apart_costs_little(of_amd: Collected, backend: str) -> None:
    """And every call is counted; of the VM, which has ended, only the counts of the host are left."""
    found, host, variant = of_amd.scenario("by_vm_costs")[backend], of_amd.host, of_amd.variants[0]
    if backend == "fentry" and host in NO_FENTRY:
        assert "refused" in found
        return
    ticks = of_amd.scenario("counts")["ticks"]
    traced = ticks["traced"] if backend == "kprobe" else of_amd.scenario("fentry")["traced"]
    without, by_vm = (
        per_call(host, variant, one, ticks["untraced"][variant]) for one in (traced[variant], found["ticks"])
    )
    assert by_vm <= BY_VM * without, f"{host}, {backend}: {by_vm:.1f} instead of {without:.1f}"
    before, after = Metrics.of(found["before"]), Metrics.of(found["after"])
    calls, redundant = (MEASURED_UPDATES * number for number in PER_UPDATE[host][variant])
    created, useless = PER_VCPU[host]
    assert after.of_host().calls().total() == calls + created
    assert after.of_host().redundant().total() == redundant + useless
    assert after.of_host().updates() == MEASURED_UPDATES
    assert after.named("msrtrace_intercept_calls_total") == before.named("msrtrace_intercept_calls_total") == []
    assert after.lost() == []


@pytest.mark.parametrize("scenario", ["counts", "fentry"])
def test_what_was_measured_was_counted(timed: Collected, scenario: str) -> None:
    if scenario == "fentry" and timed.host in NO_FENTRY:
        assert "refused" in timed.scenario(scenario)
        return
    scrapes = timed.scenario(scenario)["scrapes"]
    for variant in timed.variants:
        before, after = (Metrics.of(scrapes[f"{variant} {when}"]) for when in ("after", "measured"))
        calls, redundant = (MEASURED_UPDATES * number for number in PER_UPDATE[timed.host][variant])
        created, useless = PER_VCPU[timed.host]
        assert (after.calls() - before.calls()).total() == calls + created
        assert (after.redundant() - before.redundant()).total() == redundant + useless
        assert after.updates() - before.updates() == MEASURED_UPDATES
        assert not after.lost()


def test_a_start_that_needs_no_compiler_is_quick(collected: Collected) -> None:
    """Until it serves; an earlier scenario has compiled. A newer kernel has more symbols and types to look through."""
    millions_a_second = instructions_per_second(collected.host) / 1e6
    cost = collected.scenario("killed")["started_in"] * millions_a_second
    hold(collected.host, "start", "kept", cost, START_SLACK, by_chance=LOOK_SECONDS * millions_a_second)


def test_the_process_that_stays_is_small_and_has_few_rights(collected: Collected) -> None:
    for scenario in ("counts", "fentry"):
        found = collected.scenario(scenario)
        if "refused" in found:
            continue
        process = found["process"]
        assert int(process["Rss"]) < RSS_KB
        bpf, perfmon, syslog, sys_admin = 1 << 39, 1 << 38, 1 << 34, 1 << 21
        # The hosts have kernel.perf_event_paranoid at 3: there probing takes CAP_SYS_ADMIN.
        again = scenario == "counts"  # kprobes are attached to a kvm_intel that is reloaded
        effective = bpf | perfmon | syslog if again else bpf
        permitted = effective | sys_admin if again else bpf
        assert {int(one, 16) for one in process["threads"].split()} == {effective}
        assert (int(process["CapEff"], 16), int(process["CapPrm"], 16)) == (effective, permitted)
        assert int(process["CapBnd"], 16) == permitted  # none can be had again
        assert (process["CapInh"], process["CapAmb"], process["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")
        assert process["children"] == ""
