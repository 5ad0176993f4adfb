"""Everything at once, under the eyes of the kernel's own tracer: `stress.py BACKEND...`, on a host with several CPUs.

VMs in threads and VMs in processes, vCPUs that are born and end, filter changes, x2APIC modes, CPUID updates and MSR
writes, while two clients scrape without a pause.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

from guest import OUT, Msrtrace, load, record, scrape
from kerneltracer import KernelTracer

from tracer.btf import Btf

WORKLOADS = (
    "--threads --vms 3 --vcpus 4 --updates 23 --interval 5 --initial-run --cpuid 2",
    "--processes --vms 4 --vcpus 2 --updates 17 --x2apic 2 --initial-run",
    "--create-vms 13 --vcpus 3 --updates 0",
    "--updates 11 --spec-ctrl 7 --msr 0x48 --msr 0x10 --msr 0x174",
    "--threads --vcpus 6 --updates 19 --deny-all",
)


def stressed(backend: str) -> dict[str, Any]:
    """What was scraped before and after, and how often in between."""
    load("patched")
    msrtrace = Msrtrace("--backend", backend)
    before, scrapes, done = scrape(), [0, 0], threading.Event()

    def client(number: int) -> None:
        while not done.is_set():
            scrape()
            scrapes[number] += 1

    with KernelTracer(Btf.of_module("kvm_intel").bitmap_offset(), OUT / f"witness-{backend}"):
        clients = [threading.Thread(target=client, args=(number,)) for number in range(2)]
        for thread in clients:
            thread.start()
        running = [subprocess.Popen(["workload", *options.split()]) for options in WORKLOADS]
        statuses = [process.wait() for process in running]
        done.set()
        for thread in clients:
            thread.join()
        after = scrape()
    return {"before": before, "after": after, "scrapes": scrapes, "statuses": statuses} | msrtrace.end()


def main() -> None:
    """Leave what was found in /out/BACKEND.json."""
    for backend in sys.argv[1:]:
        record(backend, stressed(backend) | {"cpus": os.cpu_count()})


main()
