"""On several CPUs, with everything at once, every count still equals the kernel's own tracer's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HERE, RUN, WHOLE
from metrics_text import Metrics, nonzero
from witness import recorded

BACKENDS = ["kprobe", "fentry"]
CPUS = 2


def stress(folder: Path) -> Path:
    """Boot a host with several CPUs; what the scenario left is in FOLDER."""
    options = ["--host", WHOLE[0], "--cpus", str(CPUS), "--in", str(HERE / "scenarios"), "--out", str(folder)]
    command = [sys.executable, str(RUN), *options, "--timeout", "3600", "--", "python3", "/in/stress.py", *BACKENDS]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    (folder / "output").write_text(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:]
    return folder


@pytest.mark.beside(boot=stress)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_count_equals_the_kernels_own(beside: Path, backend: str) -> None:
    found = json.loads((beside / f"{backend}.json").read_text())
    counts = recorded(beside / f"witness-{backend}", updates_are_filters=True)
    before, after = Metrics.of(found["before"]), Metrics.of(found["after"])
    assert nonzero(after.calls() - before.calls()) == nonzero(counts.calls)
    assert nonzero(after.redundant() - before.redundant()) == nonzero(counts.redundant)
    assert after.updates() - before.updates() == counts.updates
    assert not after.lost()
    assert after.value("msrtrace_open_calls") == 0
    [(info, _)] = after.named("msrtrace_build_info")
    assert info["backend"] == backend


@pytest.mark.beside(boot=stress)
@pytest.mark.parametrize("backend", BACKENDS)
def test_there_was_stress(beside: Path, backend: str) -> None:
    found = json.loads((beside / f"{backend}.json").read_text())
    assert found["cpus"] == CPUS
    assert found["statuses"] == [0] * len(found["statuses"])
    assert found["status"] == 0
    assert min(found["scrapes"]) > 2
    trace = (beside / f"witness-{backend}" / "trace").read_text()
    busy = [line for line in trace.splitlines() if " in_vmx_" in line]
    assert {line.split("[", 1)[1][:3] for line in busy} == {f"{cpu:03}" for cpu in range(CPUS)}
    counts = recorded(beside / f"witness-{backend}", updates_are_filters=True)
    assert {key[3] for key in counts.calls} >= {"filter_change", "vcpu_create", "msr_write"}
    assert counts.refused
