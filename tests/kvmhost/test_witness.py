# SPDX-License-Identifier: GPL-2.0-or-later
"""Every count equals that of the kernel's own tracer, which watched the same calls and the same bits."""

from __future__ import annotations

import re

import pytest
from answers import LAYOUTS, PER_VCPU, RECALCULATING, RECALCULATIONS, SVM
from conftest import CALLERS_HIDDEN, NO_FENTRY, PREEMPTIBLE, Collected
from metrics_text import Metrics, created, nonzero
from witness import Counts, recorded

#: By backend: the scenario, and how what the witness left is called.
BACKENDS = {"kprobe": ("counts", "witness-"), "fentry": ("fentry", "witness-fentry-")}


def recalculated(before: Metrics, after: Metrics) -> int | None:
    """How many recalculations there were between two scrapes; None where they are not shown."""
    earlier, later = before.recalculations(), after.recalculations()
    return None if earlier is None or later is None else later - earlier


def both(collected: Collected, variant: str, backend: str = "kprobe") -> tuple[Counts, Metrics, Metrics]:
    """The witness's counts, and msrtrace's scrapes before and after."""
    scenario, prefix = BACKENDS[backend]
    scrapes = collected.scenario(scenario)["scrapes"]
    counts = recorded(collected.folder / f"{prefix}{variant}", updates_are_filters=collected.host not in RECALCULATING)
    return counts, Metrics.of(scrapes[f"{variant} measured"]), Metrics.of(scrapes[f"{variant} witnessed"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_count_equals_the_kernels_own(collected: Collected, backend: str) -> None:
    if backend == "fentry" and collected.host in NO_FENTRY:
        assert re.search(NO_FENTRY[collected.host], collected.scenario("fentry")["refused"])
        return
    for variant in collected.variants:
        counts, before, after = both(collected, variant, backend)
        [(info, _)] = after.named("msrtrace_build_info")
        assert info["backend"] == backend
        if collected.host in CALLERS_HIDDEN:
            counts = counts.without_callers()
        if backend == "fentry" and collected.host in PREEMPTIBLE and after.lost():
            assert not nonzero(after.calls() - before.calls() - counts.calls)  # a lower bound, and it says so
            assert after.updates() - before.updates() <= counts.updates
            assert (recalculated(before, after) or 0) <= counts.recalcs
            continue
        assert nonzero(after.calls() - before.calls()) == nonzero(counts.calls)
        assert nonzero(after.redundant() - before.redundant()) == nonzero(counts.redundant)
        assert after.updates() - before.updates() == counts.updates
        recalculating = collected.host in RECALCULATING
        assert recalculated(before, after) == (counts.recalcs if recalculating else None)
        assert created(before, after) == (counts.vcpus, counts.creation_recalcs if recalculating else None)
        assert not after.lost()


def test_recalculations_are_absent_where_the_update_function_runs_for_a_new_filter_alone(collected: Collected) -> None:
    for variant in collected.variants:
        counts, before, after = both(collected, variant)
        shown = [name for name, _ in after.samples if name.startswith("msrtrace_recalculation")]
        # One of each of the 25 buckets, the histogram's count and its sum, and the counter by two causes.
        assert len(shown) == (25 + 4 if collected.host in RECALCULATING else 0)
        assert (recalculated(before, after) is None) == (not shown)
        assert bool(counts.recalcs) == bool(shown)


def test_the_witness_saw_all_that_the_workload_did(collected: Collected) -> None:
    actions: set[str] = set()
    for variant in collected.variants:
        counts, _, _ = both(collected, variant)
        did = collected.scenario("counts")["witnessed"][variant]
        assert counts.updates == sum(d["applied"] for d in did)
        assert counts.vcpus == sum(d["created_vcpus"] for d in did)
        assert counts.creation_recalcs <= RECALCULATIONS.get(collected.host, 0) * counts.vcpus  # some never run
        if collected.host == "filter-only":
            assert not counts.calls
            continue
        causes = {key[3] for key in counts.calls}
        layout = LAYOUTS[collected.host]
        # Since 6.18 nothing that it does is for another reason: what comes with the first KVM_RUN is of the creation.
        assert causes >= {"filter_change", "msr_write", "vcpu_create", *(["recalc"] if layout == "set" else [])}
        # Refused, redundant and effective calls, of both actions: the equality above compared something.
        assert counts.refused
        assert sum(counts.redundant.values()) < sum(counts.calls.values())
        actions |= {key[2] for key in counts.calls}
        # A bitmap for nested guests is made as that of the vCPU.
        nested = sum(d["svme"] for d in did) * len(SVM[collected.host].passed) if collected.host in SVM else 0
        assert sum(v for k, v in counts.calls.items() if k[3] == "nested") == nested
        if layout != "recalc":
            calls, redundant = PER_VCPU[collected.host]
            assert sum(v for k, v in counts.calls.items() if k[3] == "vcpu_create") == calls * counts.vcpus
            assert sum(v for k, v in counts.redundant.items() if k[3] == "vcpu_create") == redundant * counts.vcpus
    assert actions == (set() if collected.host == "filter-only" else {"enable", "disable"})
