# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything at once, under the eyes of the kernel's own tracer: `stress.py [--swapping]` does all of RUNS, and swaps.

VMs in threads and VMs in processes, vCPUs that are born and end, filter changes, x2APIC modes, CPUID updates and MSR
writes, while two clients scrape without a pause, in a kernel that may preempt them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from guest import OUT, STOCK, Msrtrace, bitmap_offset, load, record, scrape, until, vendor
from kerneltracer import KernelTracer
from swapping import swapped

#: Ten threads update at once. With few CPUs that is how many returns the kernel can wait for where it may preempt them
#: all in the function (max_t(unsigned int, 10, 2*num_possible_cpus()), kernel/kprobes.c): of more the time is missed.
WORKLOADS = (
    "--threads --vms 2 --vcpus 2 --updates 61 --interval 10 --initial-run --cpuid 2",
    "--processes --vms 2 --vcpus 2 --updates 37 --x2apic 2 --initial-run",
    "--create-vms 13 --vcpus 3 --updates 0",
    "--updates 11 --spec-ctrl 7 --msr 0x48 --msr 0x10 --msr 0x174",
    "--threads --vcpus 3 --updates 41 --deny-all",
)
#: By name, what msrtrace is told.
RUNS = {"kprobe": "--backend kprobe", "fentry": "--backend fentry", "by-vm": "--backend kprobe --by-vm"}
_MODEL = Path("/sys/kernel/debug/sched/preempt")


@contextmanager
def preemptible() -> Iterator[str]:
    """A kernel that may preempt itself, if it can be told to (CONFIG_PREEMPT_DYNAMIC); its models, one marked."""
    before = ""
    with suppress(OSError):
        before = _MODEL.read_text().partition("(")[2].partition(")")[0]
        if before in ("none", "voluntary"):
            _MODEL.write_text("full")
    try:
        yield _MODEL.read_text().strip() if before else ""
    finally:
        if before:
            _MODEL.write_text(before)


def stressed(name: str) -> dict[str, Any]:
    """What was scraped before and after, and how often in between; or why msrtrace refuses."""
    offset = bitmap_offset()  # before anybody counts
    try:
        msrtrace = Msrtrace(*RUNS[name].split())
    except RuntimeError as error:
        return {"refused": str(error)}
    before, scrapes, done = scrape(), [0, 0], threading.Event()

    def client(number: int) -> None:
        while not done.is_set():
            scrape()
            scrapes[number] += 1

    with preemptible() as model, KernelTracer(offset, OUT / f"witness-stress-{name}"):
        clients = [threading.Thread(target=client, args=(number,)) for number in range(2)]
        for thread in clients:
            thread.start()
        until(lambda: min(scrapes) > 0)
        running = [subprocess.Popen(["workload", *options.split()]) for options in WORKLOADS]
        statuses = [process.wait() for process in running]
        done.set()
        for thread in clients:
            thread.join()
        after = scrape()
    found = {"before": before, "after": after, "scrapes": scrapes, "statuses": statuses, "model": model}
    return found | {"cpus": os.cpu_count()} | msrtrace.end()


if __name__ == "__main__":
    load(STOCK[vendor().name])
    if "--swapping" not in sys.argv:  # alone
        record("stress", {name: stressed(name) for name in RUNS})
    record("swapping", swapped())
    sys.exit(0)
