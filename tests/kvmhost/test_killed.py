# SPDX-License-Identifier: GPL-2.0-or-later
"""msrtrace killed and starved, on an emulated host: what scenarios/killed.py collected."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from answers import expected
from conftest import Collected
from faulted import equal, faulted
from faults import Figures
from faulty import UPDATES, VCPUS
from hosts import HOSTS
from killed import ENOUGH_MB, FREE, LIMITS, LITTLE_MB, MOMENTS, STOPPED_SECONDS
from metrics_text import Metrics

on_each_host = faulted("python3", "/in/killed.py", timeout=1500)


def known(text: str, host: str) -> int:
    """The calls of `known_workload`; fails unless a scrape has exactly these, and nothing was lost."""
    metrics = Metrics.of(text)
    calls, redundant = expected(host, HOSTS[host].vendor.stock, VCPUS, UPDATES * VCPUS)
    assert metrics.calls() == Counter(calls)
    assert metrics.redundant() == Counter(redundant)
    assert metrics.updates() == UPDATES * VCPUS
    assert metrics.lost() == []
    return sum(calls.values())


def starts_again(found: dict[str, Any], host: str, figures: Figures) -> None:
    """Nothing was left in the kernel by those that were killed, and the next one counts."""
    assert found["left"] == []
    figures["left in the kernel"] = "nothing"
    figures["calls counted by the next start"] = f"{known(found['again'], host)}, as known"
    assert found["status"] == 0


def _stage(step: dict[str, Any]) -> int:
    """How far a start was: what it had in the kernel, and whether it had said that it serves."""
    return 4 if step["serving"] else 3 if step["probes"] else 2 if step["programs"] else 1 if step["maps"] else 0


@pytest.mark.fault("killed", "SIGKILL in a start", f"at {len(MOMENTS)} moments of it, while VMs got updates", dear=True)
@on_each_host
def test_a_start_is_killed(beside: Collected, host: str, figures: Figures) -> None:
    found = beside.scenario("killed_at_each_step_of_a_start")
    stages = ["nothing in the kernel yet", "maps made", "programs loaded", "probes attached", "serving"]
    steps = Counter(stages[_stage(step)] for step in found["steps"])
    assert [stage for stage in stages if not steps[stage]] == []
    figures |= {stage: str(steps[stage]) for stage in stages}
    starts_again(found, host, figures)


@pytest.mark.fault("killed", "SIGKILL in a scrape", "6 times, while two clients scraped and VMs got updates", dear=True)
@on_each_host
def test_a_scrape_is_killed(beside: Collected, host: str, figures: Figures) -> None:
    found = beside.scenario("killed_in_a_scrape")
    assert found["scrapes"] >= found["kills"]
    figures["scrapes"] = str(found["scrapes"])
    starts_again(found, host, figures)


@pytest.mark.fault("killed", "SIGKILL in a reload", "6 times, up to 1.5 s after the module was loaded again", dear=True)
@on_each_host
def test_a_reload_is_killed(beside: Collected, host: str, figures: Figures) -> None:
    starts_again(beside.scenario("killed_in_a_reload"), host, figures)


@pytest.mark.fault(
    "killed",
    "SIGKILL at a report's last write",
    "12 times, as soon as its directory changed, or up to 3 ms later",
    dear=True,
)
@on_each_host
def test_a_report_is_killed(beside: Collected, host: str, figures: Figures) -> None:
    found = beside.scenario("killed_at_a_reports_last_write")
    assert found["first"]["status"] == 0
    labels = Counter(state["label"] for state in found["states"])
    assert labels.keys() <= {"old", "new"}
    assert any(not state["finished"] for state in found["states"])
    # Between the two system calls that give it a name and put it in place of the other, it stays where it was.
    assert all(other["whole"] and other["name"].startswith(".report.json.") for other in found["beside"])
    figures["whole files in its place"] = f"{found['kills']} of {found['kills']}"
    figures["old, new"] = f"{labels['old']}, {labels['new']}"
    figures["left beside it, whole"] = f"{len(found['beside'])}"


@pytest.mark.fault("killed", "SIGSTOP for a minute, SIGCONT", "two VMs of two vCPUs got updates meanwhile", dear=True)
@on_each_host
def test_it_is_stopped_for_a_minute(beside: Collected, host: str, figures: Figures) -> None:
    found = beside.scenario("stopped_for_a_minute")
    figures["stopped"] = f"{STOPPED_SECONDS} s"
    equal(beside, found, "stopped", figures)
    assert (found["workload"], found["status"]) == (0, 0)


@pytest.mark.fault("killed", "few descriptors", "RLIMIT_NOFILE at 8 to 64 from the start", dear=True)
@on_each_host
def test_descriptors_are_few(beside: Collected, host: str, figures: Figures) -> None:
    """Each either works or says in one line what it lacks."""
    found = beside.scenario("few_descriptors")
    assert found["left"] == {}
    works = []
    for limit in map(str, LIMITS):
        done = found["limits"][limit]
        if "serving" in done["stdout"]:
            assert (done["status"], done["stderr"]) == (0, "")
            works.append(int(limit))
            continue
        assert done["status"] == 1
        [line] = done["stderr"].splitlines()
        assert line.startswith("msrtrace: ")
        assert "Too many open files" in line or "ulimit -n" in line
    assert works == [limit for limit in LIMITS if limit >= min(works)]
    figures["works with"] = f"{min(works)}"
    figures["ended with one line"] = f"with {', '.join(str(limit) for limit in LIMITS if limit < min(works))}"


@pytest.mark.fault("killed", "no descriptor is left", f"{FREE} free, 60 connections held, VMs got updates", dear=True)
@on_each_host
def test_descriptors_run_out(beside: Collected, host: str, figures: Figures) -> None:
    found = beside.scenario("descriptors_run_out")
    assert (found["alive"], found["status"]) == (True, 0)
    equal(beside, found, "descriptors", figures)


@pytest.mark.fault("killed", "a memory cgroup", f"{ENOUGH_MB} MB, and {LITTLE_MB} MB", dear=True)
@on_each_host
def test_memory_is_little(beside: Collected, host: str, figures: Figures) -> None:
    found = beside.scenario("little_memory")
    enough, little = found[str(ENOUGH_MB)], found[str(LITTLE_MB)]
    assert enough["alive"]
    assert (enough["status"], enough["left"]) == (0, {})
    figures[f"with {ENOUGH_MB} MB"] = f"{known(enough['scrape'], host)} calls, as known"
    if enough["peak"]:
        assert enough["peak"] <= ENOUGH_MB << 20
        figures["used at most"] = f"{enough['peak'] / (1 << 20):.1f} MB"
    assert (little["alive"], little["status"], little["left"]) == (False, -9, {})
    assert "oom_kill 1" in little["events"]
    figures[f"with {LITTLE_MB} MB"] = "killed by the kernel, nothing left"


@pytest.mark.fault("killed", "a disk that is full, or read-only", "for a report and for the cache", dear=True)
@on_each_host
def test_a_disk_takes_nothing(beside: Collected, host: str, figures: Figures) -> None:
    found = beside.scenario("full_and_read_only")
    for name, why in (("full", "No space left on device"), ("read-only", "Read-only file system")):
        one = found[name]
        assert one["report"]["status"] != 0
        assert why in one["report"]["stderr"].splitlines()[-1]
        assert "Traceback" not in one["report"]["stderr"]
        assert json.loads(one["old"]) == {}
        assert [file for file in one["there"] if file not in ("old.json", "fill")] == []
    figures["the report before"] = "whole, 2 of 2"
    figures["said"] = "why, in a line"
