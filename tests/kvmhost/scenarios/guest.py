# SPDX-License-Identifier: GPL-2.0-or-later
"""What the scenarios do in the guest: run msrtrace, scrape it, run the workload, look at the kernel's state.

Scenarios only collect; what they found goes to /out and is judged by pytest outside (tests/kvmhost/test_*.py).
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from kerneltracer import search_offset

from tracer.kernel.btf import Btf, BtfError
from tracer.kernel.machine import Machine
from tracer.model.vendor import Vendor

OUT = Path("/out")
ADDRESS = "127.0.0.1:9753"
MEASURED_UPDATES = 101
#: By vendor, the variant of its module that Debian ships: SVM's code never got the patch.
STOCK = {"vmx": "patched", "svm": "unpatched"}
#: Of guest time: an emulated host is slow, and so is one on a busy machine.
START_SECONDS = 300.0
#: Of msrtrace when no client is connected: one that traces, one that listens.
_THREADS = 2
_LOOKS = 20


def output_of(*command: str, timeout: float = 120, **options: Any) -> dict[str, Any]:
    """Run COMMAND; its status, stdout and stderr."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)
    return {"status": done.returncode, "stdout": done.stdout, "stderr": done.stderr}


def workload(*options: str | int) -> dict[str, int]:
    """Run the workload; what it says it did. Raises if it failed."""
    done = output_of("workload", *map(str, options))
    if done["status"]:
        raise RuntimeError(f"workload {options}: {done}")
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", done["stdout"].splitlines()[-1])}


def accesses(*options: str) -> list[dict[str, int | str]]:
    """Run `accesses` (tests/kvmhost/accesses/accesses.c); what it says of each operation. Raises if it failed."""
    done = output_of("accesses", *options)
    if done["status"]:
        raise RuntimeError(f"accesses {options}: {done}")
    lines = [dict(re.findall(r"(\w+)=(\w+)", line)) for line in done["stdout"].splitlines()[:-1]]
    return [{key: value if key == "access" else int(value, 0) for key, value in line.items()} for line in lines]


def ticks_workload() -> list[str]:
    """The command that measures filter updates: one vCPU, one MSR denied and allowed in turn."""
    return ["workload", "--updates", str(MEASURED_UPDATES), "--initial-run", "--ticks"]


def ticks_in(text: str) -> int:
    """The median of what `ticks_workload` printed: instructions of the KVM_RUN that applies a filter update."""
    found = re.search(rf"^ticks: n={MEASURED_UPDATES} .*median=(\d+)", text, re.M)
    if not found:
        raise RuntimeError(f"no ticks: {text[-500:]}")
    return int(found[1])


def filter_update_ticks() -> int:
    """Run the workload and measure; see `ticks_in`."""
    done = output_of(*ticks_workload())
    if done["status"]:
        raise RuntimeError(done)
    return ticks_in(done["stdout"])


@cache
def vendor() -> Vendor:
    """The vendor of this host's CPU."""
    return Machine().vendor


@cache
def bitmap_offset() -> int | None:
    """Where a vCPU has the address of its MSR bitmap; None where neither the kernel nor a call says so.

    The first time a vCPU may be made for that: not to be done while somebody counts.
    """
    try:
        return Btf.of_module(vendor().module).nested_offset(vendor().bitmap)
    except BtfError:
        return search_offset()


def load(module: str) -> int:
    """Put the variant MODULE of the KVM module in place of what is loaded; how often it was held and tried again."""
    done = output_of("kvm-module", module)
    if done["status"]:
        raise RuntimeError(f"kvm-module {module}: {done}")
    return len(re.findall("tried again$", done["stderr"], re.M))


def scrape(address: str = ADDRESS) -> str:
    """The text of /metrics."""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.request("GET", "/metrics", headers={"Accept": "text/plain; version=0.0.4"})
    response = connection.getresponse()
    text = response.read().decode()
    if response.status != 200:
        raise RuntimeError(f"/metrics: {response.status}: {text[:500]}")
    return text


def until(condition: Any, seconds: float = START_SECONDS) -> None:
    """Wait until CONDITION() is true. Raises after SECONDS."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("waited in vain")
        time.sleep(0.02)


def kernel_state() -> dict[str, Any]:
    """Probes and BPF programs in the kernel: what a tracer may leave behind."""
    probes = Path("/sys/kernel/debug/kprobes/list").read_text().splitlines()
    programs = json.loads(subprocess.run(["bpftool", "--json", "prog", "list"], capture_output=True, check=True).stdout)
    maps = json.loads(subprocess.run(["bpftool", "--json", "map", "list"], capture_output=True, check=True).stdout)
    return {
        "probes": sorted(line.split(maxsplit=1)[1] for line in probes),
        "programs": sorted(p.get("name", p["type"]) for p in programs),
        "maps": sorted(m.get("name", m["type"]) for m in maps),
    }


class Msrtrace:
    """`msrtrace run OPTIONS` in the background; `started_in` so many seconds of the guest's."""

    def __init__(self, *options: str, ready: str = "serving") -> None:
        begun = time.monotonic()
        self.log = Path(f"/tmp/msrtrace-{time.monotonic_ns()}.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["msrtrace", "run", *options], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        until(lambda: ready in self.log.read_text() or self.process.poll() is not None)
        if self.process.poll() is not None:
            raise RuntimeError(f"msrtrace ended with {self.process.returncode}: {self.log.read_text()}")
        self.started_in = time.monotonic() - begun

    def process_state(self) -> dict[str, str]:
        """What /proc says of its rights and of its memory in kB, of its threads, and of its children."""
        proc = Path(f"/proc/{self.process.pid}")
        text = (proc / "status").read_text() + (proc / "smaps_rollup").read_text()
        found = dict(re.findall(r"^(Cap\w+|NoNewPrivs|VmHWM|Rss|Pss):\s+(\w+)", text, re.M))
        rights = []
        for thread in (proc / "task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # one that answered a scrape has ended
                rights += re.findall(r"^CapEff:\s+(\w+)", (thread / "status").read_text(), re.M)
        found["threads"] = " ".join(rights)
        return found | {"children": (proc / f"task/{self.process.pid}/children").read_text()}

    def footprint(self) -> dict[str, int]:
        """Memory in kB, descriptors and threads, once no client is being answered.

        It opens files of /proc for moments, so that the number of descriptors is the least of several looks.
        """
        proc = Path(f"/proc/{self.process.pid}")
        with suppress(RuntimeError):
            until(lambda: len(os.listdir(proc / "task")) <= _THREADS, 10)
        return {
            "memory": int(self.process_state()["Rss"]),
            "descriptors": min(len(os.listdir(proc / "fd")) for _ in range(_LOOKS)),
            "threads": len(os.listdir(proc / "task")),
        }

    def said(self, line: str) -> int:
        """How often it has printed LINE."""
        return self.log.read_text().count(line)

    def wait_for(self, line: str, times: int = 1) -> None:
        """Wait until it printed LINE that often. Raises with what it printed instead."""
        try:
            until(lambda: self.said(line) >= times)
        except RuntimeError:
            raise RuntimeError(f"no {line!r}, but:\n{self.log.read_text()}") from None

    def end(self, number: int = signal.SIGINT) -> dict[str, Any]:
        """Send it a signal; its status and what it printed."""
        os.kill(self.process.pid, number)
        self.process.wait(60)
        return {"status": self.process.returncode, "log": self.log.read_text()}


def record(name: str, value: Any) -> None:
    """Leave VALUE at /out/NAME.json."""
    (OUT / f"{name}.json").write_text(json.dumps(value, indent=1))
