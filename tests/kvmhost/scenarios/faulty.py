# SPDX-License-Identifier: GPL-2.0-or-later
"""What scenarios of faults have in common: something to count, and the kernel's own tracer beside msrtrace."""

from __future__ import annotations

import re
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from guest import OUT, STOCK, Msrtrace, bitmap_offset, kernel_state, load, record, scrape, until, vendor
from guest import workload as run_workload
from kerneltracer import GROUP, TRACING, KernelTracer

#: Two VMs of two vCPUs each, in threads that update at once.
WORKLOAD = ["--threads", "--vms", "2", "--vcpus", "2", "--updates", "61", "--initial-run"]
#: What is counted where the answer is known: updates, and vCPUs that apply each.
UPDATES, VCPUS = 7, 3


@contextmanager
def counted(name: str, found: dict[str, Any]) -> Iterator[None]:
    """What happens in the context is counted by the kernel's own tracer, too; the scrapes around it."""
    offset = bitmap_offset()
    found["before"] = scrape()
    with KernelTracer(offset, OUT / f"witness-{name}"):
        yield
    found["after"] = scrape()


def start_workload(*options: str) -> subprocess.Popen[str]:
    """The workload, in the background."""
    return subprocess.Popen(["workload", *(options or WORKLOAD)], stdout=subprocess.PIPE, text=True)


@contextmanager
def updating() -> Iterator[None]:
    """A VM with a filter update every 5 ms."""
    vm = subprocess.Popen(["workload", "--forever", "--interval", "5"], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        vm.terminate()
        vm.wait()


def kill(process: subprocess.Popen[Any]) -> None:
    """SIGKILL, and wait until the kernel has what the process held."""
    process.kill()
    process.wait()


def left_after(before: dict[str, Any]) -> dict[str, Any]:
    """What is in the kernel beside what was before. Descriptors of a killed process are closed a moment later."""
    with suppress(RuntimeError):
        until(lambda: kernel_state() == before, 5)
    now = kernel_state()
    return {} if now == before else now


def known_workload() -> None:
    """What `expected` of tests/kvmhost/answers.py has the counts of."""
    run_workload("--updates", UPDATES, "--initial-run", "--vcpus", VCPUS)


def counts_again() -> dict[str, Any]:
    """A start after the fault, and what it counts where the answer is known."""
    msrtrace = Msrtrace()
    known_workload()
    text = scrape()
    return {"again": text} | msrtrace.end()


def run(scenarios: Sequence[Callable[[], Any]], wanted: Sequence[str]) -> None:
    """Run those that were named, or all. What each returns is recorded by its name."""
    load(STOCK[vendor().name])
    bitmap_offset()
    for scenario in scenarios:
        name = scenario.__name__
        if wanted and name not in wanted:
            continue
        begun = time.monotonic()
        try:
            found = scenario()
        except Exception:
            found = {"broken": traceback.format_exc()}
            print(found["broken"], flush=True)
            subprocess.run(["pkill", "-9", "-f", "bin/msrtrace|^workload"], check=False)
            with suppress(OSError):  # what the kernel's own tracer was told to count
                for event in (TRACING / f"events/{GROUP}").glob("*/trigger"):
                    for line in re.findall(r"^(hist:\S+)", event.read_text(), re.M):
                        event.write_text(f"!{line}")
                (TRACING / "kprobe_events").write_text("")
            time.sleep(2)
            load(STOCK[vendor().name])
        record(name, found)
        state = "BROKEN" if "broken" in found else "collected"
        print(f"{name}: {state} in {time.monotonic() - begun:.1f} s", flush=True)
