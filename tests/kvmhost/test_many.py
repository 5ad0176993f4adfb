# SPDX-License-Identifier: GPL-2.0-or-later
"""Many VMs, vCPUs and VMMs, more than there is room for, and VMMs that are not what they seem: scenarios/many.py.

Where everything has room, every count equals that of the kernel's own tracer; where it has not, what is missing is
exactly what msrtrace says that it lost.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest
from answers import expected
from conftest import CPUS, Collected
from faulted import faulted, flat, in_mb
from faults import Figures
from hosts import HOSTS
from many import (
    AT_A_TIME,
    CROWD,
    CROWD_UPDATES,
    FULL_VCPUS,
    FULL_VMS,
    SAME_PID,
    THREADED_UPDATES,
    THREADS,
    UPDATES,
    VCPUS_EACH,
    VMMS,
    VMS,
)
from metrics_text import Metrics, nonzero
from witness import Tallies, recorded, tallied

#: MB of the guest's memory: a vCPU takes 60 KB of it and more.
MEMORY = 6144
TIMEOUT_SECONDS = 1800
#: Of every array that can be full.
DROPPED, UNPAIRED = "msrtrace_dropped_updates_total", "msrtrace_unpaired_returns_total"
#: MB by which memory may grow with a thousand VMs in all, and kB for each vCPU that is there.
SAME_MEMORY, MEMORY_OF_VCPU = 8, 12


on_each_host = faulted(
    "python3", "/in/many.py", timeout=TIMEOUT_SECONDS, options=("--cpus", str(CPUS), "--memory", str(MEMORY))
)


def fault(fault: str, done: str) -> pytest.MarkDecorator:
    return pytest.mark.fault("many", fault, done, dear=True)


def of_calls(host: str, vcpus: int, applied: int) -> tuple[Counter[Any], Counter[Any]]:
    """The known answers: calls, and redundant calls."""
    calls, redundant = expected(host, HOSTS[host].vendor.stock, vcpus, applied)
    return Counter(calls), Counter(redundant)


def counts_are(found: dict[str, Any], host: str, tallies: Tallies) -> int:
    """Fail unless every count between two scrapes is the witness's and the known one; how many calls there were."""
    before, after = (Metrics.of(found[when]).of_host() for when in ("before", "after"))
    calls, redundant = nonzero(after.calls() - before.calls()), nonzero(after.redundant() - before.redundant())
    asked: Counter[tuple[int, str, str]] = Counter()
    of_cause: Counter[tuple[str, int]] = Counter()
    for (msr, access, action, cause), count in calls.items():
        asked[msr, access, action] += count
        of_cause[cause, msr] += count
    witnessed: Counter[tuple[str, int]] = Counter()
    for (_, cause, msr), count in tallies.calls.items():
        witnessed[cause, msr] += count
    assert asked == tallies.asked
    assert of_cause == witnessed
    known_calls, known_redundant = of_calls(host, tallies.vcpus.total(), tallies.updates.total())
    assert (calls, redundant) == (known_calls, known_redundant)
    assert after.updates() - before.updates() == tallies.updates.total()
    created = [metrics.creations()[0] or 0 for metrics in (before, after)]
    assert created[1] - created[0] == tallies.vcpus.total()
    assert after.lost() == []
    assert after.value("msrtrace_open_calls") == 0
    return sum(calls.values())


def dropped(metrics: Metrics, name: str) -> int:
    return int(metrics.value(DROPPED, map=name) or 0)


def ended_well(found: dict[str, Any]) -> None:
    assert found["status"] == 0, found["log"]
    assert "Traceback" not in found["log"]


def longest(found: dict[str, Any]) -> str:
    return f"{max(found['scrapes']) * 1000:.0f} ms of {len(found['scrapes'])}"


@on_each_host
@fault("1,000 VMs", f"one after another, by VMMs that make {AT_A_TIME} each; scraped all the time")
def test_a_thousand_vms_are_counted_and_leave_nothing(beside: Collected, host: str, figures: Figures) -> None:
    found = beside.scenario("a_thousand_vms")
    ended_well(found)
    assert set(found["statuses"]) == {0}
    calls = counts_are(found, host, tallied(beside.folder / "witness-thousand"))
    known, _ = of_calls(host, VMS, VMS // AT_A_TIME * UPDATES)
    assert calls == known.total()
    assert found["left"] == found["idle"]
    before, after = (Metrics.of(found[when]) for when in ("before", "after"))
    assert after.samples.keys() == before.samples.keys()
    figures["calls"] = f"{calls:,}, equal"
    figures["memory after each hundred"] = in_mb(flat(found["footprints"], SAME_MEMORY))
    figures["longest scrape"] = longest(found)


@on_each_host
@fault("1,000 VMMs", f"--by-vm; {AT_A_TIME} at a time, each with a vCPU and {UPDATES} updates")
def test_a_thousand_vmms_are_counted_and_leave_their_counts(beside: Collected, host: str, figures: Figures) -> None:
    found = beside.scenario("a_thousand_vmms")
    ended_well(found)
    tallies = tallied(beside.folder / "witness-thousand-vmms")
    assert (len(tallies.updates), {*tallies.updates.values()}) == (VMS, {UPDATES})
    calls = counts_are(found, host, tallies)
    before, after = (Metrics.of(found[when]) for when in ("before", "after"))
    assert after.samples.keys() == before.samples.keys()
    assert after.named("msrtrace_vm_info") == []
    assert found["left"] == found["idle"]
    figures["calls"] = f"{calls:,}, equal"
    figures["series before and after"] = f"{len(before.samples)}, {len(after.samples)}"
    figures["memory after each hundred"] = in_mb(flat(found["footprints"], SAME_MEMORY))
    figures["longest scrape"] = longest(found)


@on_each_host
@fault("4,000 vCPUs alive", f"--by-vm; {VMMS} VMMs of {VCPUS_EACH} vCPUs, with {UPDATES} updates of each")
def test_four_thousand_vcpus_are_counted_each_by_its_vm(beside: Collected, host: str, figures: Figures) -> None:
    found = beside.scenario("four_thousand_vcpus")
    ended_well(found)
    tallies = tallied(beside.folder / "witness-vcpus")
    assert tallies.vcpus.total() == VMMS * VCPUS_EACH
    calls = counts_are(found, host, tallies)
    alive = Metrics.of(found["alive"])
    of_vms = {int(labels["pid"]): value for labels, value in alive.named("msrtrace_filter_updates_total")}
    assert of_vms == tallies.updates
    each: dict[int, Counter[tuple[str, int]]] = {pid: Counter() for pid in of_vms}
    for labels, value in alive.named("msrtrace_intercept_calls_total"):
        each[int(labels["pid"])][labels["cause"], int(labels["msr"], 16)] += int(value)
    assert each == {pid: tallies.of_thread(pid) for pid in tallies.updates}
    vcpus = [value for _, value in alive.named("msrtrace_vcpus")]
    assert (len(vcpus), sum(vcpus)) == (VMMS, VMMS * VCPUS_EACH)
    assert found["state"]["status"] == 0, found["state"]["stderr"]
    assert f"{VMMS} VMs, {VMMS * VCPUS_EACH} vCPUs" in found["state"]["stdout"]
    memory = [one["memory"] for one in found["footprints"]]
    assert memory[1] - memory[0] < VMMS * VCPUS_EACH * MEMORY_OF_VCPU
    figures["calls"] = f"{calls:,}, equal, and of each VM"
    figures["series"] = f"{len(alive.samples):,}, {found['bytes'] / 1e6:.1f} MB"
    figures["longest scrape"] = longest(found)
    figures["msrtrace state"] = f"{found['state seconds']:.1f} s"
    figures["memory before, then, and after"] = ", ".join(f"{one / 1000:.0f} MB" for one in memory)


@on_each_host
@pytest.mark.parametrize("backend", ["kprobe", "fentry"])
@fault(
    f"{THREADS} vCPUs of one VM update at once ({{backend}})",
    f"{THREADED_UPDATES} updates of {THREADS} threads on {CPUS} CPUs, in a kernel that may preempt them everywhere",
)
def test_vcpus_that_update_at_once_are_all_counted(
    beside: Collected, host: str, backend: str, figures: Figures
) -> None:
    scenario = beside.scenario("updating_at_once")
    found = scenario[backend]
    ended_well(found)
    assert scenario["cpus"] == CPUS
    assert re.search(r"\((full|lazy)\)", found["model"])
    counts = recorded(beside.folder / f"witness-at-once-{backend}", updates_are_filters=True)
    before, after = (Metrics.of(found[when]) for when in ("before", "after"))
    calls, redundant = nonzero(after.calls() - before.calls()), nonzero(after.redundant() - before.redundant())
    missed = {labels["function"]: int(n) for labels, n in after.named("msrtrace_probe_missed_total") if n}
    figures["calls"] = f"{counts.calls.total():,}"
    if backend == "fentry":  # which is preempted in the middle of it: a lower bound, and exactly that
        lost = counts.calls.total() - sum(calls.values())
        assert lost == sum(n for function, n in missed.items() if "interception" in function)
        figures["missed, and counted as missed"] = f"{lost:,}"
        return
    assert (calls, redundant) == (nonzero(counts.calls), nonzero(counts.redundant))
    assert after.updates() == counts.updates == THREADS * THREADED_UPDATES
    # The kernel has few places for returns that are waited for: then an update's time is missing.
    timed = int(after.value("msrtrace_filter_update_duration_seconds_count") or 0)
    assert counts.updates - timed == sum(missed.values())
    assert missed.keys() <= {"svm_msr_filter_changed"}
    figures["counted"] = "equal"
    figures["updates without their time"] = f"{counts.updates - timed:,} of {counts.updates:,}, counted as missed"


@on_each_host
@fault(
    "the maps of calls and of updates are full",
    f"--by-vm; {CROWD} VMMs, whose pids want the same 16 places, with {CROWD_UPDATES} updates each",
)
def test_what_finds_no_place_is_exactly_what_is_missing(beside: Collected, host: str, figures: Figures) -> None:
    found = beside.scenario("places_are_taken")
    ended_well(found)
    tallies = tallied(beside.folder / "witness-crowd")
    assert {*tallies.updates} == {*found["crowd"]}
    crowded = Metrics.of(found["crowded"])
    lost_calls = tallies.calls.total() - crowded.of_host().calls().total()
    lost_updates = tallies.updates.total() - crowded.of_host().updates()
    assert (lost_calls, lost_updates) == (dropped(crowded, "calls"), dropped(crowded, "updates"))
    assert lost_calls > 0 < lost_updates
    # No VM has what is another's.
    names = {int(labels["pid"]): labels["vm"] for labels, _ in crowded.named("msrtrace_vm_info")}
    assert names == {pid: f"vm{number}" for number, pid in enumerate(found["crowd"]) if pid in names}
    of_vms: dict[int, Counter[tuple[str, int]]] = {pid: Counter() for pid in found["crowd"]}
    for labels, value in crowded.named("msrtrace_intercept_calls_total"):
        of_vms[int(labels["pid"])][labels["cause"], int(labels["msr"], 16)] += int(value)
    for pid, counted in of_vms.items():
        assert counted <= tallies.of_thread(pid)
    for labels, value in crowded.named("msrtrace_filter_updates_total"):
        assert value <= CROWD_UPDATES, labels
    again = found["again"]
    assert set(again["statuses"]) == {0}
    before, after = (Metrics.of(again[when]).of_host() for when in ("before", "after"))
    later = tallied(beside.folder / "witness-after-crowd")
    assert (after.calls() - before.calls()).total() == later.calls.total()
    assert after.updates() - before.updates() == later.updates.total() == CROWD * CROWD_UPDATES
    assert {name: dropped(after, name) for name in ("calls", "updates", "vcpus")} == {
        "calls": lost_calls,
        "updates": lost_updates,
        "vcpus": 0,
    }
    figures["calls lost"] = f"{lost_calls:,} of {tallies.calls.total():,}, exactly as many as are said to be"
    figures["updates lost"] = f"{lost_updates:,} of {tallies.updates.total():,}, the same"
    figures["when they had ended"] = f"{later.calls.total():,} calls of {CROWD} others, equal"


@on_each_host
@fault("the map of vCPUs is full", f"{FULL_VMS * FULL_VCPUS:,} vCPUs alive, with 2 updates each, for 16,384 places")
def test_vcpus_without_a_place_are_exactly_what_is_missing(beside: Collected, host: str, figures: Figures) -> None:
    found = beside.scenario("all_slots_are_taken")
    ended_well(found)
    tallies = tallied(beside.folder / "witness-slots")
    vcpus = FULL_VMS * FULL_VCPUS
    assert (tallies.vcpus.total(), tallies.updates.total()) == (vcpus, 2 * vcpus)
    assert found["ended with"] == 0
    before, after = (Metrics.of(found[when]) for when in ("before", "after"))
    capacity = int(after.value("msrtrace_map_capacity", map="vcpus") or 0)
    lost_calls = tallies.calls.total() - (after.calls() - before.calls()).total()
    lost_updates = tallies.updates.total() - (after.updates() - before.updates())
    lost_vcpus = vcpus - ((after.creations()[0] or 0) - (before.creations()[0] or 0))
    assert lost_calls + lost_updates + lost_vcpus == dropped(after, "vcpus")
    assert lost_updates == after.value(UNPAIRED)
    assert vcpus - capacity <= lost_vcpus < vcpus - 0.9 * capacity
    again = found["again"]
    later = tallied(beside.folder / "witness-slots-again")
    before, after = (Metrics.of(again[when]) for when in ("before", "after"))
    calls, redundant = (
        nonzero(now - then) for now, then in ((after.calls(), before.calls()), (after.redundant(), before.redundant()))
    )
    assert (calls, redundant) == of_calls(host, later.vcpus.total(), later.updates.total())
    assert dropped(after, "vcpus") == dropped(before, "vcpus")
    figures["places taken"] = f"{vcpus - lost_vcpus:,} of {capacity:,}"
    figures["lost"] = (
        f"{lost_vcpus:,} creations, {lost_updates:,} updates, {lost_calls:,} calls, exactly as many as are said to be"
    )
    figures["when they had ended"] = f"{later.calls.total():,} calls of 100 others, equal"


@on_each_host
@pytest.mark.parametrize("seen", ["seen", "unseen"])
@fault("VMMs of one pid ({seen})", "--by-vm; three one after another between two scrapes, the first {seen} by one")
def test_counts_never_go_to_another_vmm_of_the_same_pid(
    beside: Collected, host: str, seen: str, figures: Figures
) -> None:
    found = beside.scenario("one_pid_after_another")[seen]
    ended_well(found)
    first, *_, last = SAME_PID
    for name in [first, last] if seen == "seen" else [last]:
        metrics, labels = Metrics.of(found[f"{name} runs"]), {"vm": name, "pid": str(found["pid"])}
        calls, _ = of_calls(host, 1, SAME_PID[name])
        assert metrics.calls() == calls
        assert metrics.named("msrtrace_filter_updates_total") == [(labels, SAME_PID[name])]
        assert [{key: info[key] for key in labels} for info, _ in metrics.named("msrtrace_vm_info")] == [labels]
    none = Metrics.of(found["none runs"])
    calls, redundant = of_calls(host, len(SAME_PID), sum(SAME_PID.values()))
    assert (none.of_host().calls(), none.of_host().redundant()) == (calls, redundant)
    assert none.of_host().updates() == sum(SAME_PID.values())
    assert none.named("msrtrace_filter_updates_total") == []
    assert none.lost() == []
    figures["updates of the last"] = f"{SAME_PID[last]}, of {sum(SAME_PID.values())} of the pid"
    figures["of the host"] = "equal"


@on_each_host
@fault("VMMs of one pid, in a report", "report --by-vm; three one after another")
def test_a_report_tells_vmms_of_one_pid_apart(beside: Collected, host: str, figures: Figures) -> None:
    ended = beside.scenario("one_pid_after_another")["report"]
    assert ended["status"] == 0, ended["stderr"]
    report = json.loads((beside.folder / "same-pid.json").read_text())
    [pid] = {vm["pid"] for vm in report["vms"]}
    assert pid < 32768
    assert sorted(vm["filter_updates"] for vm in report["vms"]) == sorted(SAME_PID.values())
    for vm in report["vms"]:
        calls, redundant = of_calls(host, 1, vm["filter_updates"])
        assert (vm["calls"], vm["redundant"]) == (calls.total(), redundant.total())
    assert not report["lower_bound"]
    figures["rows"] = f"{len(report['vms'])} of pid {pid}, each with its own counts"


@on_each_host
@fault("a VMM that forks", "--by-vm; the child tries to use its parent's VM, and makes one of its own")
def test_a_vmm_that_forks_has_its_own_counts_and_so_has_its_child(
    beside: Collected, host: str, figures: Figures
) -> None:
    scenario = beside.scenario("forks_and_passes")
    ended_well(scenario)
    found = scenario["forks"]
    lines = dict(line.partition("|")[::2] for line in found["lines"])
    parent, [child] = str(found["parent"]), lines.keys() - {str(found["parent"])}
    refused, _, own = lines[child].partition("|")
    assert (refused, own) == ("Input/output error", "")  # KVM: EIO where the process did not make the VM
    both = Metrics.of(found["both"])
    by_pid = {labels["pid"]: value for labels, value in both.named("msrtrace_filter_updates_total")}
    assert by_pid == {parent: 7, child: 10}
    assert {labels["vm"] for labels, _ in both.named("msrtrace_vm_info")} == {"python3"}
    vcpus = {labels["pid"]: value for labels, value in both.named("msrtrace_vcpus")}
    assert vcpus == {parent: 1, child: 2}
    assert Metrics.of(found["gone"]).named("msrtrace_filter_updates_total") == []
    counts_are(scenario, host, tallied(beside.folder / "witness-passing"))
    figures["of the parent, of the child"] = "7 updates, 10 updates, equal"
    figures["the child's of its parent's VM"] = "refused by KVM, not counted"


@on_each_host
@fault("a VMM that passes its descriptors", "--by-vm; another process tries to use them, and outlives the VMM")
def test_who_has_the_descriptors_of_a_vm_does_not_get_its_counts(
    beside: Collected, host: str, figures: Figures
) -> None:
    found = beside.scenario("forks_and_passes")["passes"]
    assert found["said"] == "Input/output error|Input/output error"
    both, gone, end = (Metrics.of(found[when]) for when in ("both", "vmm gone", "both gone"))
    vmm, holder = str(found["vmm"]), str(found["holder"])
    assert {labels["pid"]: value for labels, value in both.named("msrtrace_filter_updates_total")} == {vmm: 3}
    assert {labels["pid"]: value for labels, value in both.named("msrtrace_vcpus")} == {vmm: 1}
    # The VM is still there, held by a process that may not run it.
    assert gone.named("msrtrace_filter_updates_total") == []
    assert {labels["pid"]: value for labels, value in gone.named("msrtrace_vcpus")} == {holder: 1}
    [vm] = json.loads(found["state"]["stdout"])["vms"]
    assert (str(vm["pid"]), vm["owned"]) == (holder, False)
    assert end.named("msrtrace_vcpus") == []
    assert gone.of_host().updates() == end.of_host().updates()
    figures["the VMM"] = "3 updates, equal"
    figures["the holder"] = "0 updates; the VM is shown as its, and as made by another"


@on_each_host
@fault("a VMM in a pid namespace", "--by-vm; unshare --pid; then msrtrace itself in one")
def test_a_vmm_in_a_pid_namespace_has_the_pid_of_the_host(beside: Collected, host: str, figures: Figures) -> None:
    scenario = beside.scenario("forks_and_passes")
    found = scenario["namespace"]
    metrics, labels = Metrics.of(found["text"]), {"vm": "inside", "pid": str(found["pid"])}
    assert metrics.named("msrtrace_filter_updates_total") == [(labels, 3)]
    doctor = json.loads(scenario["doctor inside"]["stdout"])
    [check] = [check for check in doctor["checks"] if check["name"] == "processes"]
    assert check["state"] == "warning"
    inside = scenario["run inside"]
    assert "Traceback" not in inside["stderr"]
    figures["pid and name"] = "those of the host"
    figures["msrtrace inside one"] = inside["stderr"].splitlines()[0]
