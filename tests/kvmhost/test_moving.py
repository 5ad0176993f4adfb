# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel moves under msrtrace, on an emulated host: what scenarios/moving.py collected."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter

import pytest
from answers import expected
from conftest import Collected
from faulted import equal, faulted, flat, in_mb
from faults import Figures
from faulty import UPDATES, VCPUS
from hosts import HOSTS
from metrics_text import Key, Metrics
from moving import IN_A_ROW, SWITCHES

RELOADS = 1000
on_each_host = faulted("env", f"RELOADS={RELOADS}", "python3", "/in/moving.py", timeout=3000, takes_along=True)
OFF = "msrtrace_probes_off_seconds_total"


def answers(host: str, times: int, variant: str = "") -> tuple[Counter[Key], Counter[Key]]:
    """Calls and redundant calls of so many times `known_workload`."""
    vcpus = VCPUS * times
    calls, redundant = expected(host, variant or HOSTS[host].vendor.stock, vcpus, UPDATES * vcpus)
    return Counter(calls), Counter(redundant)


@pytest.mark.fault("kernel", "a CPU goes offline and comes online", "without a pause, while VMs got updates", dear=True)
@on_each_host
def test_cpus_come_and_go(beside: Collected, host: str, figures: Figures) -> None:
    found = beside.scenario("cpus_come_and_go")
    assert found["switches"] >= SWITCHES
    figures["times"] = str(found["switches"])
    equal(beside, found, "hotplug", figures)
    assert ({*found["workloads"]}, found["status"]) == ({0}, 0)


@pytest.mark.fault("kernel", "threads of vCPUs migrate", "to the other CPU, without a pause", dear=True)
@on_each_host
def test_vcpus_migrate(beside: Collected, host: str, figures: Figures) -> None:
    found = beside.scenario("vcpus_migrate")
    assert found["moves"] > 100
    figures["times"] = f"{found['moves']:,}"
    equal(beside, found, "migrating", figures)
    assert ({*found["workloads"]}, found["status"]) == ({0}, 0)


@pytest.mark.fault(
    "kernel",
    "clocks jump, and a suspend",
    "--by-vm; the wall clock by a day and back; then all of a suspend but the sleep, through which VMs live",
    dear=True,
)
@on_each_host
def test_clocks_jump(beside: Collected, host: str, figures: Figures) -> None:
    found = beside.scenario("clocks_jump")
    assert found["jumps"] > 10
    figures["jumps of the wall clock"] = str(found["jumps"])
    assert found["asleep"] > 1
    figures["of the time since boot"] = f"{found['asleep']:.1f} s"
    equal(beside, found, "clocks", figures)
    awake, again = (Metrics.of(found[when]).named("msrtrace_filter_updates_total") for when in ("awake", "awake again"))
    assert [labels for labels, _ in awake] == [labels for labels, _ in again]  # VMs are who they were
    assert 0 < sum(value for _, value in awake) < sum(value for _, value in again)
    assert (found["workload"], found["workload again"], found["status"]) == (0, 0, 0)


@pytest.mark.fault(
    "kernel", "probes are switched off and on", "kprobes/enabled and ftrace_enabled, under each backend", dear=True
)
@on_each_host
def test_probes_are_switched_off(beside: Collected, host: str, figures: Figures) -> None:
    """Probes at fentry have nothing to do with the switch of kprobes; in all other cases nothing is counted."""
    found = beside.scenario("probes_switched_off")
    cases = {"kprobe, kprobes": True, "kprobe, ftrace": True, "fentry, kprobes": False, "fentry, ftrace": True}
    assert found.keys() == cases.keys()
    for case, blind in cases.items():
        one = found[case]
        on, off, again = (Metrics.of(one[moment]) for moment in ("on", "off", "on again"))
        seen = [1, 1, 2] if blind else [1, 2, 3]
        assert [(m.calls(), m.redundant()) for m in (on, off, again)] == [answers(host, times) for times in seen]
        report = json.loads(one["report"]["json"])
        seconds = [m.value(OFF) or 0 for m in (on, off, again)]
        assert (one["report"]["status"], one["status"]) == (128 + signal.SIGINT, 0)
        if not blind:
            assert (seconds, report["loss"]["blind_seconds"], report["lower_bound"]) == ([0, 0, 0], 0, False)
            continue
        assert 0 == seconds[0] < seconds[1] < seconds[2]
        assert one["log"].count("the kernel's probes have been switched off, so nothing is counted: ") == 1
        assert one["log"].count("the kernel's probes are on again; what happened in these") == 1
        assert report["loss"]["blind_seconds"] > 0
        assert report["lower_bound"]
        assert any("switched off" in note for note in report["notes"])
        figures[case] = f"nothing counted in {seconds[2]:.1f} s, and said so"
    figures["fentry, kprobes"] = "all counted"


@pytest.mark.fault(
    "kernel", "others trace the same functions", "ftrace's function graph, perf, bpftrace, a second msrtrace", dear=True
)
@on_each_host
def test_others_trace(beside: Collected, host: str, figures: Figures) -> None:
    found = beside.scenario("other_tracers")
    for backend in ("kprobe", "fentry"):
        one, of_backend = found[backend], Figures()
        counts = equal(beside, one, f"others-{backend}", of_backend)
        figures[f"calls by {backend}"] = of_backend["calls"]
        assert (one["workload"], one["workload again"], one["status"]) == (0, 0, 0)
        for name in ("perf", "bpftrace"):
            assert one[name]["alive"], one[name]["log"]
        assert re.search(r"@returns\[.*\]: [1-9]", one["bpftrace"]["log"])
        second = Metrics.of(one["second"])
        assert (2 * second.calls().total(), second.lost()) == (counts.calls.total(), [])


@pytest.mark.fault("kernel", "a livepatch", "of the function that is probed most: enabled, and taken back", dear=True)
@on_each_host
def test_the_kernel_is_patched_live(beside: Collected, host: str, figures: Figures) -> None:
    found = beside.scenario("livepatched")
    for backend in ("kprobe", "fentry"):
        one, of_backend = found[backend], Figures()
        assert (one["insmod"]["status"], one["enabled"], one["rmmod"]["status"]) == (0, "1\n", 0)
        assert (one["workload"], one["workload again"], one["status"]) == (0, 0, 0)
        equal(beside, one, f"livepatched-{backend}", of_backend)
        figures[f"calls by {backend}"] = of_backend["calls"]


@pytest.mark.fault(
    "kernel",
    "the module is reloaded",
    f"{RELOADS:,} times, patched and stock in turn, {IN_A_ROW} in a row without a pause",
    dear=True,
)
@on_each_host
def test_the_module_is_reloaded(beside: Collected, host: str, figures: Figures) -> None:
    found = beside.scenario("reloads")
    metrics = Metrics.of(found["after"])
    parts = [answers(host, times, variant) for variant, times in found["counted"].items()]
    assert metrics.calls() == sum((calls for calls, _ in parts), Counter())
    assert metrics.redundant() == sum((redundant for _, redundant in parts), Counter())
    waited = sum(found["counted"].values())
    assert (metrics.updates(), waited) == (waited * UPDATES * VCPUS, found["times"] // IN_A_ROW)
    assert waited <= (metrics.value("msrtrace_module_unloads_total") or 0) <= found["times"]
    assert metrics.lost() == []
    memory = flat(found["footprints"])
    before, left = found["kernel"]
    assert (left, found["status"]) == (before, 0)
    assert len(found["refused"]) <= found["times"] / 100
    figures["times"] = (
        f"{found['times']:,}, of which msrtrace saw {metrics.value('msrtrace_module_unloads_total'):,.0f}"
    )
    figures["rmmod came while a probe was put on the module"] = (
        f"{len(found['refused'])} times, and at most {max(found['refused'], default=0)} times again"
    )
    figures["calls"] = f"{metrics.calls().total():,}, as known"
    figures["descriptors before and after"] = ", ".join(str(found["footprints"][n]["descriptors"]) for n in (0, -1))
    shown = (memory[0], memory[1], memory[len(memory) // 2], memory[-1])
    figures[f"memory before, after {IN_A_ROW}, half of them, all"] = in_mb(shown)


@pytest.mark.fault("kernel", "lockdown is switched on", "integrity, then confidentiality, while it runs", dear=True)
@on_each_host
def test_the_kernel_is_locked_down(beside: Collected, host: str, figures: Figures) -> None:
    """What is attached goes on; what starts then is told why it cannot."""
    found = beside.scenario("lockdown")
    for number, level in enumerate(("integrity", "confidentiality"), 1):
        one = found[level]
        assert f"[{level}]" in one["level"]
        metrics = Metrics.of(one["after"])
        assert (metrics.calls(), metrics.redundant()) == answers(host, number)
        assert metrics.lost() == []
        figures[level] = f"{metrics.calls().total()} calls, as known"
    assert found["ended"]["status"] == 0
    start = found["start"]
    assert start["status"] == 1
    [line] = start["stderr"].splitlines()
    assert "lockdown" in line
    figures["a start after that"] = "refused in a line"
