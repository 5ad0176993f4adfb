# SPDX-License-Identifier: GPL-2.0-or-later
"""Hours of a host's life: `soak.py HOURS`. VMs come and go, one stays for most of an hour, and each hour is scraped.

In a guest that counts instructions idle time passes in a blink, so that an hour takes two minutes. After each
hour KVM's module is loaded again: no count of it must be lost. It only collects; tests/kvmhost/test_soak.py judges.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from guest import OUT, STOCK, Msrtrace, kernel_state, load, record, scrape, vendor
from guest import workload as run_workload
from kerneltracer import KernelCounter
from many import start_workload

HOUR_SECONDS, SCRAPE_SECONDS = 3600, 60
#: Of the VM that stays: one update a minute. Of those that come and go, every so many minutes: how many, and updates.
STAYS = 55
COME_MINUTES, COME, COME_UPDATES = 5, 3, 7


def an_hour(number: int, msrtrace: Msrtrace) -> dict[str, Any]:
    """What there was at its end."""
    begun = time.monotonic()
    with KernelCounter(OUT / f"witness-hour-{number}"):
        staying = start_workload("--vcpus", 2, "--updates", STAYS, "--interval", 1000 * SCRAPE_SECONDS, "--initial-run")
        for minute in range(HOUR_SECONDS // SCRAPE_SECONDS):
            if minute % COME_MINUTES == 0:
                run_workload("--processes", "--vms", COME, "--updates", COME_UPDATES, "--initial-run")
            time.sleep(max(0, begun + (minute + 1) * SCRAPE_SECONDS - time.monotonic()))
            scrape()
        status = staying.wait()
        text = scrape()
    state = {"status": status, "text": text, "kernel": kernel_state()}
    return state | msrtrace.footprint() | {"seconds": time.monotonic() - begun}


def main() -> None:
    """As many hours as are asked for."""
    load(STOCK[vendor().name])
    idle = kernel_state()
    msrtrace = Msrtrace("--backend", "kprobe", "--by-vm")
    hours = []
    for number in range(int(sys.argv[1])):
        hours.append(an_hour(number, msrtrace))
        load(STOCK[vendor().name])
        msrtrace.wait_for(f"{vendor().module} was loaded again", number + 1)
        print(f"hour {number + 1}: {hours[-1]['memory']} kB, {hours[-1]['seconds']:.0f} s", flush=True)
    found = {"hours": hours, "text": scrape()} | msrtrace.end()
    record("soak", found | {"idle": idle, "left": kernel_state()})


if __name__ == "__main__":
    main()
