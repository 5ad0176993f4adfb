# SPDX-License-Identifier: GPL-2.0-or-later
"""How msrtrace lives and ends on a host: VMs that come and go, signals, waiting, no rights."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import pytest
from answers import LAYOUTS, PER_UPDATE, PER_VCPU, expected
from conftest import NO_FENTRY, PREEMPTIBLE, WHOLE, Collected
from metrics_text import Metrics

from tracer.program.compiler import PROGRAMS

#: On the tracer itself, beside those of calls and updates.
SERIES_OF_THE_TRACER = 38


@pytest.mark.parametrize(("scenario", "status"), [("counts", 0), ("killed", -9)])
def test_ending_leaves_nothing_in_the_kernel(collected: Collected, scenario: str, status: int) -> None:
    found = collected.scenario(scenario)
    assert found["idle"]["programs"] == []
    assert found["running"]["programs"]
    if scenario == "counts":  # by kprobes; what fentry runs at is not in that list
        assert len(found["running"]["probes"]) > len(found["idle"]["probes"])
    assert found["left"] == found["idle"]
    assert found["status"] == status


def test_fentry_holds_the_module_and_leaves_nothing(collected: Collected) -> None:
    found = collected.scenario("fentry")
    if collected.host in NO_FENTRY:
        assert "Traceback" not in found["refused"]
        return
    assert found["unloading"]["status"] != 0
    assert "in use" in found["unloading"]["stderr"]
    assert {ended["status"] for ended in found["ended"].values()} == {0}
    [(info, _)] = Metrics.of(collected.scenario("killed")["scrape"]).named("msrtrace_build_info")
    assert info["backend"] == ("kprobe" if collected.host in PREEMPTIBLE else "fentry")
    warned = "this kernel may preempt what runs at fentry" in found["ended"][collected.variants[0]]["log"]
    assert warned == (collected.host in PREEMPTIBLE)
    assert found["left"]["programs"] == []


def test_vms_do_not_notice_that_msrtrace_is_killed(collected: Collected) -> None:
    assert collected.scenario("killed")["workload"] == 0


@pytest.mark.parametrize("way", ["MODULE:NAME", "address", "NAME", "few rights"])
def test_kprobes_are_attached_by_every_way_to_name_a_function(of_amd: Collected, way: str) -> None:
    found = of_amd.scenario("attaching")
    done = found["attached"][way]
    assert "raised" not in done, done
    # At its entry, or behind the endbr64 there: arch_adjust_kprobe_addr(), arch/x86/kernel/kprobes/core.c
    entry = re.compile(rf"([kr])  {found['function']}\+0x[04]  kvm_amd\b")
    assert [match[1] for line in done["returned"] if (match := entry.match(line))] == ["k", "r"], done["returned"]
    assert done["stderr"] == ""


#: How a kprobe is refused: the exception, and its one line. Nothing else is printed.
REFUSED = {
    "blacklisted": ("FunctionRefused", r"the kernel takes no kprobe on \S+: see /sys/kernel/debug/kprobes/blacklist"),
    "missing": ("FunctionRefused", r"the kernel takes no kprobe on kvm_amd:msrtrace_has_none: .*"),
    "nowhere": ("FunctionRefused", r"the kernel takes no kprobe on 0x1000: .*"),
    "not a program": ("OSError", r"ioctl\(PERF_EVENT_IOC_SET_BPF\): Invalid argument"),
    "no right": ("PermissionError", r"perf_event_open: Permission denied"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_kprobe_that_is_refused_is_one_clear_line(of_amd: Collected, case: str) -> None:
    done = of_amd.scenario("attaching")["refused"][case]
    kind, line = REFUSED[case]
    assert done.get("raised") == kind, done
    assert re.fullmatch(rf"\[Errno \d+\] {line}", done["text"]), done
    assert done["stderr"] == ""


def test_kprobes_leave_nothing_where_they_are_refused_or_their_process_is_killed(of_amd: Collected) -> None:
    found = of_amd.scenario("attaching")
    before = found["before"]
    assert (before["events"], before["group"]) == ("", False)
    assert found["after refusals"] == before
    between = found["between"]
    assert len(between["during"]["probes"]) == len(before["probes"]) + 1
    assert between["after"] == before
    assert found["amid"]["left"] == []
    assert found["amid"]["killed"].keys() >= {"entry", "return", "refused"}
    assert found["after kills"] == before
    # That there is something to guard against, and that it would be seen.
    plain = found["plainly"]
    assert plain["returned"] == -1
    assert "plain_bcc_" in plain["left"]["events"]
    assert plain["left"]["group"]
    assert (found["cleaned"]["events"], found["cleaned"]["group"]) == ("", False)


def test_it_waits_for_the_module(whole: Collected) -> None:
    found = whole.scenario("waits")
    assert found["status"] == 0
    assert Metrics.of(found["scrape"]).updates() == 3


def test_vms_are_told_apart_and_leave_nothing_stale(whole: Collected) -> None:
    found = whole.scenario("by_vm")
    pids = [str(pid) for pid in found["pids"]]
    names = ["web", "function-7", "workload"]

    def updates(scrape: str) -> dict[tuple[str, str], float]:
        rows = Metrics.of(found[scrape]).named("msrtrace_filter_updates_total")
        return {(labels["vm"], labels["pid"]): value for labels, value in rows}

    all_three = {(name, pid): 2.0 * (3 + 2 * n) for n, (name, pid) in enumerate(zip(names, pids, strict=True))}
    assert updates("all") == all_three
    assert updates("one gone") == {k: v for k, v in all_three.items() if k[1] != pids[0]}
    assert updates("none left") == {}
    uuids = [found["uuid"], "", ""]

    def infos(scrape: str) -> list[dict[str, str]]:
        return [labels for labels, _ in Metrics.of(found[scrape]).named("msrtrace_vm_info")]

    described = [
        {"vm": name, "pid": pid, "uuid": uuid, "vmm": "workload"}
        for name, pid, uuid in zip(names, pids, uuids, strict=True)
    ]
    assert infos("all") == sorted(described, key=lambda labels: int(labels["pid"]))
    assert infos("one gone") == [labels for labels in infos("all") if labels["vm"] != "web"]
    assert infos("none left") == []
    assert not Metrics.of(found["none left"]).named("msrtrace_intercept_calls_total")
    for family in ("msrtrace_intercept_calls_total", "msrtrace_intercept_redundant_calls_total"):
        rows = Metrics.of(found["all"]).named(family)
        assert {(labels["vm"], labels["pid"]) for labels, _ in rows} == set(all_three)
    assert not Metrics.of(found["none left"]).lost()


def test_a_hundred_vms_leave_nothing_but_their_counts(whole: Collected) -> None:
    found = whole.scenario("by_vm")
    before, hundred, gone = (Metrics.of(found[name]) for name in ("none left", "hundred", "hundred gone"))
    assert len(hundred.named("msrtrace_filter_updates_total")) == 100
    assert gone.samples.keys() == before.samples.keys()
    assert hundred.named("msrtrace_host_filter_updates_total")
    for (name, labels), value in hundred.samples.items():
        if name.startswith("msrtrace_host_"):
            assert gone.samples[name, labels] == value, f"{name} {labels}"
    assert not gone.lost()

    calls = gone.of_host().calls() - before.of_host().calls()
    # Each VM has one vCPU, which is created and gets two filter updates.
    [created, _], [updated, _] = PER_VCPU[whole.host], PER_UPDATE[whole.host][whole.variants[0]]
    assert calls.total() == 100 * (created + 2 * updated)
    # What docs/metrics.md says of the number of series: each kind of call twice, a count, a histogram of 25 buckets,
    # and what only VMs that live have: its info, its vCPUs, and how many of them cannot be read.
    kinds, _ = expected(whole.host, whole.variants[0], 1, 2)
    counted, of_its_life = 2 * len(kinds) + 1 + 27, 3
    assert len(hundred.samples) - len(gone.samples) == 100 * (counted + of_its_life)
    assert len(gone.samples) == counted + SERIES_OF_THE_TRACER


def test_one_vmm_can_be_traced_alone(whole: Collected) -> None:
    found = whole.scenario("one_pid")
    metrics = Metrics.of(found["scrape"])
    assert metrics.updates() == 5  # of the two VMs' ten
    per_msr = {key: v for key, v in metrics.calls().items() if key[3] == "filter_change"}
    assert set(per_msr.values()) == {5}


def test_who_is_not_root_is_told_in_one_line(whole: Collected) -> None:
    """Other wrong use: tests/test_doctor.py and test_cli.py, on machines made of files."""
    found = whole.scenario("not_root")
    run, doctor = found["run"], found["doctor"]
    assert (run["status"], run["stdout"]) == (1, "")
    [line] = run["stderr"].splitlines()
    assert re.match(r"msrtrace: error: not root.*sudo msrtrace run$", line), line
    assert doctor["status"] == 1
    assert "sudo msrtrace" in doctor["stdout"]


def test_promtool_is_silent_about_the_live_metrics(collected: Collected) -> None:
    promtool = shutil.which("promtool")
    assert promtool, "promtool is in Debian's package prometheus: `make test` installs it"
    texts = [*collected.scenario("counts")["scrapes"].values()]
    if collected.host in WHOLE:
        texts.append(collected.scenario("by_vm")["all"])
    for text in texts:
        done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_all_of_it_runs_with_bccs_library_alone(collected: Collected) -> None:
    """No kernel headers, no Python module of BCC: in every scenario but the one that compiles."""
    host = collected.scenario("host")
    assert (host["headers"], host["import bcc"]["status"]) == ([], 1)
    checks = {check["name"]: check for check in json.loads(host["doctor"]["stdout"])["checks"]}
    for name in ("headers", "bcc"):
        assert (checks[name]["state"], checks[name]["fix"]) == ("ok", None)
        assert checks[name]["detail"] == "not needed: the BPF program is already compiled, for fentry and kprobe"
    assert checks["library"]["detail"] == "libbcc_bpf.so.0"


def test_a_host_compiles_once_what_did_not_come_compiled(whole: Collected) -> None:
    found = whole.scenario("compiles")
    assert (found["shipped"], found["status"]) == (len(PROGRAMS), 0)
    assert 1 <= found["cached"] <= 2
    assert "\nmsrtrace_filter_updates_total 3.0\n" in found["scrape"]
    checks = {check["name"]: check["detail"] for check in json.loads(found["doctor"]["stdout"])["checks"]}
    assert all("not needed" not in checks[name] for name in ("headers", "bcc"))


def test_doctor_says_what_each_kernel_can_show(collected: Collected) -> None:
    doctor = collected.scenario("host")["doctor"]
    checks: Any = json.loads(doctor["stdout"])
    assert (doctor["status"], checks["ok"], checks["layout"]) == (0, True, LAYOUTS[collected.host])
    states = {check["name"]: check["state"] for check in checks["checks"]}
    degraded = {"symbols"} if collected.host == "filter-only" else set()
    assert {name for name, state in states.items() if state not in ("ok", "unknown")} == degraded
