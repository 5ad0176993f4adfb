# SPDX-License-Identifier: GPL-2.0-or-later
"""msrtrace as a service of systemd: what scenarios/service.py saw."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from answers import LAYOUTS, expected
from cache import REPO
from conftest import HERE, LIMIT_SECONDS, RUN
from dispositions import as_begun
from hosts import HOSTS
from metrics_text import Metrics
from service import UPDATES, WATCHDOG_SECONDS
from test_exits import expected as exits_of

#: Kernels and systemds of all that Debian has.
ON = ["bookworm-amd", "trixie-amd", "sid-amd", "filter-only-amd"]
#: Where states can be read in full.
WITH_BITMAPS = [host for host in ON if not host.startswith("filter-only")]
#: What it may do while it traces: CAP_SYSLOG, CAP_PERFMON, CAP_BPF; and CAP_SYS_ADMIN, which is used to probe alone.
USED, ADMIN = 1 << 34 | 1 << 38 | 1 << 39, 1 << 21
MOST_EXPOSED = 2.0


@dataclass(frozen=True)
class Service:
    """What a boot left: JSON per part of the scenario."""

    host: str
    folder: Path
    run: subprocess.CompletedProcess[str]

    def part(self, name: str) -> dict[str, Any]:
        """What a part found. The test fails if it broke, or if the boot did."""
        file = self.folder / f"service-{name}.json"
        if not file.exists():
            pytest.fail(f"{self.host} left no {name} (status {self.run.returncode}):\n{self.run.stdout}", pytrace=False)
        found: dict[str, Any] = json.loads(file.read_text())
        if "broken" in found:
            pytest.fail(f"{name} broke on {self.host}:\n{found['broken']}", pytrace=False)
        return found


def _booting(host: str) -> Callable[[Path], Service]:
    """What boots HOST with systemd for the scenario."""

    def boot(folder: Path) -> Service:
        sent = folder / "in"
        shutil.copytree(HERE / "scenarios", sent, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(REPO / "packaging/systemd", sent / "systemd")
        options = ["--host", host, "--init", "systemd", "--module", "none", "--timeout", "1800"]
        options += ["--in", str(sent), "--out", str(folder), "--keep-log", str(folder / "log")]
        run = subprocess.run(
            as_begun([sys.executable, str(RUN), *options, "--", "python3", "/in/service.py"]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            timeout=LIMIT_SECONDS,
        )
        return Service(host, folder, run)

    boot.__name__ = f"service_on_{host}"
    return boot


on_each_host = pytest.mark.parametrize(
    "host", [pytest.param(host, marks=pytest.mark.beside(boot=_booting(host), host=host)) for host in ON]
)


def _whole(text: str, host: str, updates: int = UPDATES, starts: int = 1) -> None:
    """Assert that the counts are those of STARTS workloads of one vCPU, and of UPDATES of each; none is missing."""
    metrics = Metrics.of(text)
    variant = HOSTS[host].vendor.stock
    calls, redundant = expected(host, variant, starts, starts * updates)
    assert metrics.calls() == Counter(calls)
    assert metrics.redundant() == Counter(redundant)
    assert metrics.updates() == starts * updates
    assert metrics.lost() == []


@on_each_host
def test_the_units_are_valid(beside: Service, host: str) -> None:
    found = beside.part("install")
    assert found["verify"] == {"status": 0, "stdout": "", "stderr": ""}
    assert found["sysusers"]["status"] == found["reload"]["status"] == 0
    assert beside.run.returncode == 0, beside.run.stdout


@on_each_host
def test_without_kvm_it_waits_and_has_started(beside: Service, host: str) -> None:
    found = beside.part("waiting")
    assert found["start"]["status"] == 0, found["start"]
    awaited = "waiting for kvm_amd to be loaded"
    assert found["unit"] == {"Type": "notify", "ActiveState": "active", "SubState": "running", "StatusText": awaited}
    assert found["ready"] == [503, f"msrtrace is {awaited}.\n"]
    assert found["healthy"][0] == 200
    assert "msrtrace_build_info" not in found["metrics"]
    layout = LAYOUTS[host]
    url = "http://127.0.0.1:9753/metrics"
    assert found["status"] == f"tracing kvm_amd (layout {layout}, backend kprobe), serving {url}"
    _whole(found["counted"], host)


@on_each_host
def test_its_user_may_do_nothing_but_trace(beside: Service, host: str) -> None:
    for part in ("waiting", "reloading"):
        process = beside.part(part)["process"]
        assert process["Uid"] == process["user"] != "0"
        assert process["NoNewPrivs"] == "1"
        assert process["Seccomp"] == "2"
        effective, permitted, bounds = (int(process[f"Cap{name}"], 16) for name in ("Eff", "Prm", "Bnd"))
        assert effective == USED
        assert permitted & ~ADMIN == USED
        assert bounds == USED | ADMIN
        assert int(process["CapAmb"], 16) == int(process["CapInh"], 16) == 0
        assert re.search(r"Max locked memory +unlimited +unlimited", process["limits"])


@on_each_host
def test_systemd_finds_it_little_exposed(beside: Service, host: str) -> None:
    found = beside.part("security")
    assert found["score"] <= MOST_EXPOSED, found["text"]


@on_each_host
def test_when_systemctl_returns_everything_is_counted(beside: Service, host: str) -> None:
    """What runs right after is counted from its first call. Its VMs are gone by the scrape, so the host has it all."""
    found = beside.part("reloading")
    assert found["restart"]["status"] == 0, found["restart"]
    metrics = Metrics.of(found["counted"]).of_host()
    calls, _ = expected(host, HOSTS[host].vendor.stock, 1, UPDATES)
    assert (metrics.calls(), metrics.updates()) == (Counter(calls), UPDATES)


@on_each_host
def test_exits_states_and_names_are_seen_from_the_sandbox(beside: Service, host: str) -> None:
    found = beside.part("reloading")
    exits: Counter[tuple[int, str, str, str, str]] = Counter()
    for labels, value in Metrics.of(found["exits"]).named("msrtrace_host_msr_exits_total"):
        kind = (int(labels["msr"], 16), labels["access"], labels["path"], labels["result"], labels["guest"])
        exits[kind] += int(value)
    assert exits == exits_of("intercepted", host, "svm")
    if host not in WITH_BITMAPS:  # whose kernel does not say where they are
        held = Metrics.of(found["held"])
        vm = {"pid": str(found["pid"]), "vm": "web"}
        assert held.value("msrtrace_vcpus", **vm) == held.value("msrtrace_unreadable_vcpus", **vm) == 1
        return
    states = [
        labels
        for labels, value in Metrics.of(found["held"]).named("msrtrace_msr_intercepted_vcpus")
        if labels["vm"] == "web" and int(labels["msr"], 16) == 0xC0000100 and value == 1
    ]
    assert {labels["pid"] for labels in states} == {str(found["pid"])}
    assert {(labels["access"], labels["by"]) for labels in states} == {("read", "filter"), ("write", "filter")}


@on_each_host
def test_a_reload_changes_the_certificate(beside: Service, host: str) -> None:
    """One that is invalid leaves the one before it, and the service alive."""
    found = beside.part("reloading")
    one, two = found["certificates"]
    assert found["served"] == [one, two, two]
    assert found["reload"]["status"] == found["invalid"]["status"] == 0
    assert found["unit"] == {"ActiveState": "active", "SubState": "running", "NRestarts": "0"}


@on_each_host
def test_a_reload_of_the_module_is_followed_in_the_sandbox(beside: Service, host: str) -> None:
    """Through a variant without BTF, and back."""
    found = beside.part("reloading")
    url = "serving https://127.0.0.1:9753/metrics"
    assert found["unloaded"] == f"waiting for kvm_amd to be loaded again, {url}"
    before, after = (Metrics.of(found[name]).of_host() for name in ("before", "after"))
    assert after.updates() - before.updates() == UPDATES
    calls, _ = expected(host, HOSTS[host].vendor.stock, 1, UPDATES)
    assert after.calls() - before.calls() == Counter(calls)
    assert after.value("msrtrace_module_unloads_total") == 2


@on_each_host
def test_a_process_that_stands_still_is_replaced(beside: Service, host: str) -> None:
    found = beside.part("watchdog")
    assert WATCHDOG_SECONDS / 2 <= found["seconds"] <= 3 * WATCHDOG_SECONDS
    assert any("Watchdog timeout" in line for line in found["log"])
    before, after = (Metrics.of(found[name]) for name in ("before", "after"))
    started = "process_start_time_seconds"
    assert (after.value(started) or 0) > (before.value(started) or 0) > 0
    assert before.updates() == 3
    assert after.updates() == 0


@on_each_host
def test_a_scrape_starts_it_and_no_scrape_is_lost_over_a_restart(beside: Service, host: str) -> None:
    found = beside.part("activation")
    assert found["stop"]["status"] == 0
    assert found["stopped"] == {"ActiveState": "inactive", "Result": "success"}
    assert found["scraped"][0] == 200
    assert "msrtrace_build_info" in found["scraped"][1]
    assert found["started"] == {"ActiveState": "active"}
    assert found["restart"]["status"] == 0
    assert found["errors"] == []
    assert set(found["answers"]) == {200}


@on_each_host
def test_stopped_it_leaves_nothing(beside: Service, host: str) -> None:
    before = beside.part("install")["kernel"]
    assert before["probes"] == []
    for part in ("activation", "ending"):
        left = beside.part(part)["kernel"]
        assert left["probes"] == []
        # Systemd's own, for sandboxes of units, come and go.
        own = [
            name
            for name in left["programs"]
            if name not in before["programs"] and not name.startswith(("sd_", "cgroup_"))
        ]
        assert own == []
    assert beside.part("ending")["failed"] == ""


@on_each_host
def test_the_journal_knows_warnings_from_messages(beside: Service, host: str) -> None:
    found = beside.part("ending")
    assert {priority for priority, _ in found["journal"]} == {"4", "6"}
    assert ["6", "msrtrace: backend kprobe"] in found["journal"]
    for priority, message in found["journal"]:
        assert (priority == "4") == message.startswith("msrtrace: warning: "), message
    assert sum("the TLS files cannot be used" in line for line in found["warnings"]) == 1
