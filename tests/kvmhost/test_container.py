# SPDX-License-Identifier: GPL-2.0-or-later
"""msrtrace's image on an emulated host, run by Debian's Podman: the tables of docs/containers.md."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import container
import pytest
from answers import PER_VCPU, expected
from cache import HERE, REPO
from containers import COUNTED, IDLE, READS, ROWS, UPDATES, VCPUS
from hosts import HOSTS
from metrics_text import Key, Metrics, nonzero

HOST, VARIANT = "trixie-amd", "unpatched"
APPLIED = UPDATES * VCPUS
CALLS, REDUNDANT = expected(HOST, VARIANT, VCPUS, APPLIED)
BPF, PERFMON, SYSLOG, SYS_ADMIN = (1 << number for number in (39, 38, 34, 21))
#: Calls for the CPUID of a vCPU (tests/kvmhost/workload.c), and all for the VM of `accesses`, with the vCPU's creation.
OF_CPUID = 2
OF_ACCESSES = PER_VCPU[HOST][0] + OF_CPUID
#: Bytes of the container's memory, with what it has in the kernel: half of the manifest's limit.
MEMORY = 128 << 20
DOCUMENT = (REPO / "docs/containers.md").read_text()

#: What doctor says where a container lacks something: the check, its state, and what its fix begins with.
PARANOID = ("perf-event-paranoid", "failed", "on the host: sudo sysctl -w kernel.perf_event_paranoid=2; or docker run")
SECCOMP = ("bpf", "failed", "allow bpf and perf_event_open: docker run --cap-add SYS_ADMIN")
CAPABILITIES = (
    "capabilities",
    "failed",
    "docker run --cap-add BPF --cap-add PERFMON --cap-add SYSLOG --cap-add SYS_ADMIN",
)
USER_NAMESPACE = ("capabilities", "failed", "as root of the host: sudo msrtrace run, or a container without one")
PIDS = ("processes", "warning", "docker run --pid=host (Kubernetes: hostPID: true)")
ADDRESSES = ("symbols", "warning", "grant CAP_SYSLOG (--cap-add SYSLOG)")
BTF = ("btf", "warning", "docker run -v /sys/kernel/btf:/sys/kernel/btf:ro")
KALLSYMS = ("symbols", "failed", "docker run --security-opt systempaths=unconfined")
MODULES = ("kvm-amd", "failed", "docker run --security-opt systempaths=unconfined")


@dataclass(frozen=True)
class Found:
    """What is found in a container of a row: what doctor complains of, and whether calls are counted."""

    complaints: tuple[tuple[str, str, str], ...] = ()
    counts: bool = True
    states: bool = True


FOUND = {
    "documented": Found(),
    "three capabilities": Found(),
    "three capabilities, paranoid kernel": Found((PARANOID,), counts=False),
    "three capabilities, Podman": Found((SECCOMP,), counts=False),
    "three capabilities, Podman of Debian 12": Found((SECCOMP,), counts=False),
    "without SYSLOG": Found((ADDRESSES,), states=False),
    "default capabilities": Found((CAPABILITIES,), counts=False),
    "another user": Found(),
    "own pid namespace": Found((PIDS,), states=False),
    "user namespace": Found((USER_NAMESPACE,), counts=False),
    "hidden BTF": Found((BTF,), states=False),
    "hidden kallsyms": Found((KALLSYMS,), counts=False),
    "hidden modules": Found((MODULES,), counts=False),
}


def in_containers(folder: Path) -> Any:
    into, out = folder / "in", folder / "out"
    shutil.copytree(HERE / "scenarios", into)
    container.fill(into, HOSTS[HOST])
    command = [sys.executable, str(HERE / "run"), "--host", HOST, "--stock", "--in", str(into), "--out", str(out)]
    subprocess.run([*command, "--timeout", "3600", "--", "python3", "/in/containers.py"], check=True)
    return json.loads((out / "containers.json").read_text())


beside_containers = pytest.mark.beside(boot=in_containers, host="container")


def test_every_row_has_an_answer() -> None:
    assert list(FOUND) == list(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_documented(name: str) -> None:
    assert f"| {name} |" in DOCUMENT


@beside_containers
@pytest.mark.parametrize("name", FOUND)
def test_doctor_says_what_is_wrong(beside: Any, name: str) -> None:
    checks = json.loads(beside["rows"][name]["doctor"])["checks"]
    complaints = [check for check in checks if check["state"] in ("failed", "warning")]
    assert [(check["name"], check["state"]) for check in complaints] == [one[:2] for one in FOUND[name].complaints]
    for check, (_, _, fix) in zip(complaints, FOUND[name].complaints, strict=True):
        assert check["fix"].startswith(fix)


@beside_containers
@pytest.mark.parametrize("name", [name for name, found in FOUND.items() if found.counts])
def test_counts_are_those_of_the_kernel_s_source(beside: Any, name: str) -> None:
    row = beside["rows"][name]
    report = json.loads(row["report.json"])
    calls, redundant = Counter[Key](), Counter[Key]()
    for one in report["calls"]:
        key = int(one["msr"], 16), one["access"], one["action"], one["cause"]
        calls[key] += one["calls"]
        redundant[key] += one["redundant"] or 0
    assert sum(calls.values()) == sum(CALLS.values()) + OF_ACCESSES
    assert _of_filters(calls) == _of_filters(CALLS)
    assert _of_filters(redundant) == _of_filters(REDUNDANT)
    assert report["totals"]["filter_updates"] == APPLIED == row["workload"]["applied"]
    if ROWS[name].exits:
        assert sum(one["exits"] for one in report["exits"] if one["msr"] == "0xc0000080") == READS


def _of_filters(calls: Mapping[Key, int]) -> dict[Key, int]:
    """Those of filter updates, which are the workload's alone."""
    return {key: number for key, number in calls.items() if key[3] == "filter_change" and number}


@beside_containers
@pytest.mark.parametrize("name", [name for name, found in FOUND.items() if not found.counts])
def test_where_nothing_can_be_counted_the_error_says_what_doctor_does(beside: Any, name: str) -> None:
    row = beside["rows"][name]
    assert "report.json" not in row
    [line] = row["errors"].splitlines()
    assert FOUND[name].complaints[0][2] in line


@beside_containers
@pytest.mark.parametrize("name", [name for name, found in FOUND.items() if found.counts and found.states])
def test_states_and_names_of_vms_outside(beside: Any, name: str) -> None:
    [vm] = json.loads(beside["rows"][name]["state"])["vms"]
    assert vm["name"] == IDLE
    assert COUNTED in {one["name"] for one in json.loads(beside["rows"][name]["report.json"])["vms"]}


@beside_containers
def test_without_the_host_s_processes_nothing_is_told_by_vm(beside: Any) -> None:
    """Not even wrongly: the ids that BPF programs see are other processes' in the container, or nobody's."""
    row = beside["rows"]["own pid namespace"]
    assert "--by-vm cannot be used" in row["by-vm"]
    assert "docker run --pid=host" in row["by-vm"]
    state = json.loads(row["state"])
    assert state["vms"] == []
    assert state["notes"][0].startswith("only the VMs of this pid namespace are seen")


@beside_containers
def test_without_types_there_are_no_exits_and_no_states(beside: Any) -> None:
    row = beside["rows"]["hidden BTF"]
    assert "exits cannot be counted: /sys/kernel/btf/vmlinux" in row["exits"]
    assert "what vCPUs intercept cannot be read: /sys/kernel/btf/vmlinux" in row["state-errors"]


@beside_containers
def test_without_addresses_callers_are_unknown_and_there_are_no_states(beside: Any) -> None:
    row = beside["rows"]["without SYSLOG"]
    assert "CAP_SYSLOG" in row["state-errors"]
    calls = json.loads(row["report.json"])["calls"]
    assert all(one["caller"].startswith("0x") for one in calls)
    assert sum(one["calls"] for one in calls if one["cause"] == "other") == OF_CPUID


@beside_containers
@pytest.mark.parametrize("moment", ["loaded", "reloaded"])
def test_the_service_counts_across_a_reload(beside: Any, moment: str) -> None:
    scrapes = beside["service"]["scrapes"]
    before, after = (Metrics.of(scrapes[f"{moment} {when}"]).of_host() for when in ("before", "after"))
    assert nonzero(after.calls() - before.calls()) == CALLS
    assert nonzero(after.redundant() - before.redundant()) == REDUNDANT
    assert after.updates() - before.updates() == APPLIED
    assert not after.lost()


@beside_containers
def test_the_service_is_healthy_keeps_few_rights_and_ends(beside: Any) -> None:
    service = beside["service"]
    assert service["health"]["status"] == 0
    status = dict(line.split(":\t", 1) for line in service["process"].splitlines() if ":\t" in line)
    assert int(status["CapEff"], 16) == BPF | PERFMON | SYSLOG
    assert int(status["CapBnd"], 16) == int(status["CapPrm"], 16) == BPF | PERFMON | SYSLOG | SYS_ADMIN
    assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
    assert service["memory"] < MEMORY
    assert (service["stopped"]["status"], service["exit"]) == (0, "0")
    idle, afterwards = service["states"]
    assert afterwards == idle
    assert service["at work"] != idle


@beside_containers
def test_in_a_network_of_its_own_it_is_reached_by_its_health_check_alone(beside: Any) -> None:
    own = beside["own network"]
    assert own["started"]["status"] == 0
    assert own["reached"]["status"] == 1
    assert "Connection refused" in own["reached"]["stderr"]
    said = own["logs"]["stdout"] + own["logs"]["stderr"]
    assert "is served as plain HTTP" in said
    assert "what vCPUs intercept is not shown: a pid namespace of its own" in said
    assert "docker run --pid=host (Kubernetes: hostPID: true)" in said
