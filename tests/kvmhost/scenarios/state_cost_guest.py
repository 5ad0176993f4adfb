# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs in an AMD host that counts instructions: what a read of the states of many vCPUs takes, step by step.

Leaves /out/state_cost.json: by the number of vCPUs, the seconds of each step, of which one is a thousand million
instructions; and /out/NUMBER.raw, the records that the kernel gave.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from guest import OUT, STOCK, load, record, until, vendor

from tracer.cli.session import state_reader
from tracer.report.file import encode
from tracer.report.making import HostInfo
from tracer.report.state_making import make_state
from tracer.trace.state_reader import StateReader, readings

VCPUS_A_VM = 4
REPEATS = 5
#: One of each kind: always passed through, on a condition, intercepted.
FILTER = ("--msr", "0xc0000100", "--msr", "0x48", "--msr", "0x17b")


def seconds(work: Callable[[], object]) -> float:
    """The least of several times."""
    found = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return min(found)


def steps(reader: StateReader) -> dict[str, float]:
    """What each step of a read takes."""
    content, state = [*reader._raw()], reader.read()
    host = HostInfo.here(state.vendor.module)
    return {
        "the kernel's part": seconds(lambda: [*reader._raw()]),
        "reading its records": seconds(lambda: readings(content, reader._record)),
        "a read, all in all": seconds(reader.read),
        "JSON of it": seconds(lambda: encode(make_state(state, host, taken=datetime.now(timezone.utc), version=""))),
    }


def measured(number: int) -> dict[str, Any]:
    """The steps for so many vCPUs, all of which have applied a filter that denies."""
    ready = Path(f"/tmp/ready-{number}")
    options = ["--vms", str(number // VCPUS_A_VM), "--vcpus", str(VCPUS_A_VM), "--updates", "1", "--hold", "10000"]
    workload = subprocess.Popen(["workload", *options, *FILTER, "--ready", str(ready)])
    with state_reader() as reader:
        # Of the guest's states: each vCPU has run, and has no update before it.
        until(lambda: ready.exists() and all(v.ran and v.settled for vm in reader.read().vms for v in vm.vcpus), 600)
        found = steps(reader)
        content = b"".join(reader._raw())
        assert len(readings([content], reader._record)) == number
        (OUT / f"{number}.raw").write_bytes(content)
        members = reader._loaded.members["records"]
    workload.kill()
    workload.wait()
    return {"steps": found, "members": {name: [m.offset, m.size, m.length] for name, m in members.items()}}


if __name__ == "__main__":
    load(STOCK[vendor().name])
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
    record("state_cost", {number: measured(int(number)) for number in sys.argv[1:]})
