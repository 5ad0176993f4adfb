# SPDX-License-Identifier: GPL-2.0-or-later
"""A VMM that is not of this repository: Debian's QEMU on emulated hosts, which sets a filter, and boots firmware."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from answers import SVM_ALWAYS
from cache import HERE, sh
from qemu import qemu
from real_qemu import NAME
from test_accesses import Exits

from tracer.model import exits
from tracer.model.options import BACKENDS

AMD_HOST, INTEL_HOST = "trixie-amd", "trixie"  # the userland of the QEMU that emulates the first
CORE_THREAD_COUNT = 0x35  # which QEMU answers itself (kvm_rdmsr_core_thread_count(), target/i386/kvm/kvm.c)


def _boot(host: str, folder: Path) -> dict[str, Any]:
    into, out = folder / "in", folder / "out"
    shutil.copytree(HERE / "scenarios", into)
    sh(["cp", "-al", qemu().directory, into / "qemu"])
    command = [sys.executable, str(HERE / "run"), "--host", host, "--stock", "--in", str(into), "--out", str(out)]
    subprocess.run([*command, "--timeout", "1800", "--", "python3", "/in/real_qemu.py"], check=True)
    found: dict[str, Any] = json.loads((out / "real_qemu.json").read_text())
    return found | {"exits": Exits.seen(out / "exits/qemu")}


def with_qemu(folder: Path) -> Any:
    return _boot(AMD_HOST, folder)


def with_qemu_on_intel(folder: Path) -> Any:
    return _boot(INTEL_HOST, folder)


def check_exits(found: dict[str, Any]) -> None:
    """Each engine counted what KVM's tracepoints saw: all exits, and by MSR those that KVM did not leave to QEMU."""
    seen: Exits = found["exits"]
    emulated_by_kvm = Counter[tuple[int, str]]()
    for (msr, access, _), count in seen.emulated.items():
        emulated_by_kvm[msr, access] += count
    assert sum(seen.all.values()) > 20  # the firmware sets up MTRRs and the APIC, on each vCPU
    for backend in BACKENDS:
        engine = found["engines"][backend]
        assert (engine["open"], engine["refusals"], engine["missed"], engine["unattached"]) == (0, 0, {}, [])
        by_access, emulated = Counter[str](), Counter[tuple[int, str]]()
        for one in engine["exits"]:
            by_access[one["access"]] += one["exits"]
            if one["result"] != exits.FILTERED:
                emulated[one["msr"], one["access"]] += one["exits"]
        assert by_access == seen.all
        assert emulated == emulated_by_kvm


@pytest.mark.beside(boot=with_qemu, host=AMD_HOST)
def test_exits_of_qemu_s_firmware_on_amd(beside: Any) -> None:
    check_exits(beside)


@pytest.mark.beside(boot=with_qemu_on_intel, host=INTEL_HOST)
def test_exits_of_qemu_s_firmware_on_intel(beside: Any) -> None:
    check_exits(beside)


@pytest.mark.beside(boot=with_qemu, host=AMD_HOST)
def test_qemu_is_named_and_its_filter_shown(beside: Any) -> None:
    assert beside["json"]["status"] == beside["text"]["status"] == 0
    [vm] = json.loads(beside["json"]["stdout"])["vms"]
    assert (vm["pid"], vm["name"], vm["owned"]) == (beside["pid"], NAME, True)
    assert vm["filter"]["default"] == "allow"
    core_thread_count = hex(CORE_THREAD_COUNT)
    assert {"msrs": core_thread_count, "access": "read", "denied": [core_thread_count]} in vm["filter"]["ranges"]
    assert sorted(id_ for group in vm["vcpus"] for id_ in group["ids"]) == [0, 1]
    for group in vm["vcpus"]:
        assert group["ran"]
        rows = {row["msrs"]: row for row in group["msrs"]}
        assert (rows[core_thread_count]["read"], rows[core_thread_count]["write"]) == ("both", "kvm")
        passed = [range(int(run.split("-")[0], 16), int(run.split("-")[-1], 16) + 1) for run in group["passed"]["read"]]
        assert all(any(msr in run for run in passed) for msr in SVM_ALWAYS)
    assert NAME in beside["text"]["stdout"]
