# SPDX-License-Identifier: GPL-2.0-or-later
"""With everything at once, and read without a pause, every count still equals the kernel's own tracer's."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from answers import PRED_CMD, RECALCULATING
from conftest import CALLERS_HIDDEN, CPUS, NO_FENTRY, Collected, stress_runs
from kerneltracer import VENDORS
from metrics_text import Key, Metrics, created, nonzero
from ringbuffer import read
from stress import RUNS
from witness import Counts, recorded

#: The functions whose calls are counted.
CALLS = [function for vendor in VENDORS for function in vendor.calls]


def judged(collected: Collected, run: str) -> tuple[dict[str, Any], Counts] | None:
    """What a run found, and the witness's counts; None where the backend cannot be had, and msrtrace said so."""
    found: dict[str, Any] = collected.scenario("stress")[run]
    if "refused" in found:
        assert run == "fentry"
        assert re.search(NO_FENTRY[collected.host], found["refused"])
        return None
    return found, recorded(
        collected.folder / f"witness-stress-{run}", updates_are_filters=collected.host not in RECALCULATING
    )


def check_counts(collected: Collected, run: str) -> None:
    """Every count equals; but what runs at fentry may be preempted, and misses calls then: as many as it says."""
    result = judged(collected, run)
    if not result:
        return
    found, counts = result
    if collected.host in CALLERS_HIDDEN:
        counts = counts.without_callers()
    before, after = (Metrics.of(found[when]).of_host() for when in ("before", "after"))
    calls, redundant = after.calls() - before.calls(), after.redundant() - before.redundant()
    updates = after.updates() - before.updates()
    [(info, _)] = after.named("msrtrace_build_info")
    assert info["backend"] == RUNS[run].split()[1]
    assert after.value("msrtrace_open_calls") == 0
    if run == "fentry" and after.lost():
        assert re.search(r"\((full|lazy)\)", found["model"])
        missed = {labels["function"]: value for labels, value in after.named("msrtrace_probe_missed_total") if value}
        # Of a call in an update whose beginning was missed, the cause is that of its caller.
        causes = missed.keys() <= {*CALLS}
        assert not apart(calls, causes) - apart(counts.calls, causes)  # a lower bound, and it says so
        assert counts.calls.total() - calls.total() == sum(missed[function] for function in CALLS if function in missed)
        assert updates <= counts.updates
        return
    assert nonzero(calls) == nonzero(counts.calls)
    assert nonzero(redundant) == nonzero(counts.redundant)
    assert updates == counts.updates
    recalculations = counts.creation_recalcs if collected.host in RECALCULATING else None
    assert created(before, after) == (counts.vcpus, recalculations)
    assert not after.lost()


def apart(calls: Counter[Key], causes: bool) -> Counter[tuple[object, ...]]:
    """CALLS by MSR, access and action, and by cause only with CAUSES."""
    found: Counter[tuple[object, ...]] = Counter()
    for key, count in calls.items():
        found[key if causes else key[:3]] += count
    return found


def check_stress(collected: Collected, run: str, cpus: int) -> None:
    """All that should run did, again and again, on all CPUs, and could be preempted."""
    result = judged(collected, run)
    if not result:
        return
    found, counts = result
    assert (found["cpus"], found["status"]) == (cpus, 0)
    assert found["statuses"] == [0] * len(found["statuses"])
    assert min(found["scrapes"]) > 2
    assert re.search(r"\((full|lazy)\)", found["model"]) or collected.host.startswith(
        "filter-only"
    )  # 5.10 cannot be told to
    trace = read(collected.folder / f"witness-stress-{run}")
    assert {event.cpu for event in trace if event.name == "update_in"} == {*range(cpus)}
    if collected.host != "filter-only":
        assert {key[3] for key in counts.calls} >= {"filter_change", "vcpu_create", "msr_write"}
        assert counts.refused


def test_every_count_equals_the_kernels_own(stressed: Collected) -> None:
    for run in stress_runs(stressed.host):
        check_counts(stressed, run)


def test_there_was_stress(stressed: Collected) -> None:
    for run in stress_runs(stressed.host):
        check_stress(stressed, run, 1)


@pytest.mark.parametrize("run", RUNS)
def test_on_several_cpus_every_count_equals_the_kernels_own(several_cpus: Collected, run: str) -> None:
    check_counts(several_cpus, run)


@pytest.mark.parametrize("run", RUNS)
def test_on_several_cpus_there_was_stress(several_cpus: Collected, run: str) -> None:
    check_stress(several_cpus, run, CPUS)


def test_a_guest_with_ibpb_may_write_pred_cmd_and_not_read_it(with_ibpb: Collected) -> None:
    """What a call wants differs by direction there alone: in one call (6.12), or in one for writes only (6.17)."""
    wanted = {"trixie-amd": ("read_write", "disable_write")}
    wanted |= dict.fromkeys(("sid-amd", "backports-amd"), ("write", "disable"))
    result = judged(with_ibpb, "kprobe")
    assert result
    passed = {key[1:3] for key in result[1].calls if key[0] == PRED_CMD and key[2] != "enable"}
    assert passed == ({wanted[with_ibpb.host]} if with_ibpb.host in wanted else set())
