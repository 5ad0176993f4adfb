# SPDX-License-Identifier: GPL-2.0-or-later
"""A VMM that is not of this repository: Debian's QEMU on an emulated host, which sets a filter of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from answers import SVM_ALWAYS
from cache import HERE, sh
from qemu import qemu
from real_qemu import NAME

HOST = "trixie-amd"  # the userland of the QEMU that emulates it
CORE_THREAD_COUNT = "0x35"  # which QEMU answers itself (kvm_rdmsr_core_thread_count(), target/i386/kvm/kvm.c)


def with_qemu(folder: Path) -> Any:
    into, out = folder / "in", folder / "out"
    shutil.copytree(HERE / "scenarios", into)
    sh(["cp", "-al", qemu().directory, into / "qemu"])
    command = [sys.executable, str(HERE / "run"), "--host", HOST, "--stock", "--in", str(into), "--out", str(out)]
    subprocess.run([*command, "--timeout", "900", "--", "python3", "/in/real_qemu.py"], check=True)
    return json.loads((out / "real_qemu.json").read_text())


@pytest.mark.beside(boot=with_qemu, host=HOST)
def test_qemu_is_named_and_its_filter_shown(beside: Any) -> None:
    assert beside["json"]["status"] == beside["text"]["status"] == 0
    [vm] = json.loads(beside["json"]["stdout"])["vms"]
    assert (vm["pid"], vm["name"], vm["owned"]) == (beside["pid"], NAME, True)
    assert vm["filter"]["default"] == "allow"
    assert {"msrs": CORE_THREAD_COUNT, "access": "read", "denied": [CORE_THREAD_COUNT]} in vm["filter"]["ranges"]
    assert sorted(id_ for group in vm["vcpus"] for id_ in group["ids"]) == [0, 1]
    for group in vm["vcpus"]:
        assert group["ran"]
        rows = {row["msrs"]: row for row in group["msrs"]}
        assert (rows[CORE_THREAD_COUNT]["read"], rows[CORE_THREAD_COUNT]["write"]) == ("both", "kvm")
        passed = [range(int(run.split("-")[0], 16), int(run.split("-")[-1], 16) + 1) for run in group["passed"]["read"]]
        assert all(any(msr in run for run in passed) for msr in SVM_ALWAYS)
    assert NAME in beside["text"]["stdout"]
