# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs in a host that counts instructions: what tracers add to an exit of RDMSR or WRMSR. exits_cost.py judges it.

Leaves /out/exits_cost.json: by tracer and kind of access, the instructions an exit (exit_ticks.py) and, of those that
count, how many exits.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from bench_guest import TOOLS, programs_at, tool
from exit_ticks import FEW, KINDS, MANY, ROUNDS, instructions, plainly
from guest import STOCK, Msrtrace, load, record, scrape, until, vendor
from metrics_text import Metrics

from tracer.kernel.symbols import Symbols
from tracer.model.exits import EXIT_FUNCTIONS
from tracer.model.options import BACKENDS

#: Functions that run in each kind of exit: of them, those that a kernel has.
SYMBOLS = Symbols.read()


def beside(tracer: AbstractContextManager[Any]) -> dict[str, Any]:
    """What an exit takes while that context is open."""
    with tracer:
        return {"instructions": instructions(plainly)}


def msrtrace(*options: str) -> dict[str, Any]:
    """`msrtrace run --exits OPTIONS`, up to where it serves."""
    tracer = Msrtrace("--exits", *options)
    found = instructions(plainly)
    metrics = Metrics.of(scrape())
    ended = tracer.end()
    if ended["status"] or metrics.lost():
        raise RuntimeError(f"{metrics.lost()} {ended}")
    # With --by-vm the VM's own series went with it.
    name = "msrtrace_host_msr_exits_total" if "--by-vm" in options else "msrtrace_msr_exits_total"
    return {"instructions": found, "exits": int(sum(value for _, value in metrics.named(name)))}


def bpftrace(program: str) -> dict[str, Any]:
    """bpftrace with PROGRAM, which counts in `@`."""
    exits, out = 0, Path("/tmp/bpftrace.json")

    def run(what: list[str]) -> str:
        nonlocal exits
        text = tool("bpftrace", "-f", "json", "-o", str(out), "-e", program, "-c", " ".join(what))
        rows = [json.loads(line) for line in out.read_text().splitlines() if line]
        maps = {name: counts for row in rows if row["type"] == "map" for name, counts in row["data"].items()}
        exits += sum(maps.get("@", {}).values())
        return text

    return {"instructions": instructions(run), "exits": exits}


def perf(event: str) -> dict[str, Any]:
    """`perf stat` on a tracepoint, on all CPUs."""
    exits, out = 0, Path("/tmp/perf.csv")

    def run(what: list[str]) -> str:
        nonlocal exits
        text = tool("perf", "stat", "-a", "-x", ",", "-o", str(out), "-e", event, "--", *what)
        exits += sum(int(count) for count in re.findall(rf"^(\d+),,{event},", out.read_text(), re.M))
        return text

    return {"instructions": instructions(run), "exits": exits}


def kvmexit() -> dict[str, Any]:
    """BCC's kvmexit, which counts all exits by reason, of VMX alone."""
    log = Path("/tmp/kvmexit.log")
    with log.open("w") as output:
        tool = subprocess.Popen(["python3", "-u", f"{TOOLS}/bin/kvmexit-bpfcc"], stdout=output, stderr=output)
    until(lambda: "Hit Ctrl-C" in log.read_text() or tool.poll() is not None)
    found = instructions(plainly)
    tool.send_signal(signal.SIGINT)
    if tool.wait(60):
        raise RuntimeError(log.read_text())
    exits = sum(int(count) for count in re.findall(r"\bMSR_(?:READ|WRITE) +(\d+)", log.read_text()))
    return {"instructions": found, "exits": exits}


def empty(kind: str) -> dict[str, Any]:
    """A program that does nothing, at the functions of EXIT_FUNCTIONS that this kernel has."""
    functions = [name for name in sorted(EXIT_FUNCTIONS.all) if SYMBOLS.find(name)]
    return beside(programs_at("kvm", functions, kind))


#: In order of the table. What counts all exits counts those of other instructions, too.
OF_MSRS = {"vmx": "args->exit_reason == 31 || args->exit_reason == 32", "svm": "args->exit_reason == 0x7c"}
ON_KVM_MSR = "tracepoint:kvm:kvm_msr { @[args->ecx, args->write] = count(); }"
ON_KVM_EXIT = f"tracepoint:kvm:kvm_exit /{OF_MSRS[vendor().name]}/ {{ @[args->exit_reason] = count(); }}"
TRACERS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": lambda: beside(nullcontext()),
    **{f"msrtrace --exits, {one}": partial(msrtrace, "--backend", one) for one in BACKENDS},
    **{f"msrtrace --exits --by-vm, {one}": partial(msrtrace, "--by-vm", "--backend", one) for one in BACKENDS},
    "bpftrace on kvm_msr": partial(bpftrace, ON_KVM_MSR),
    "bpftrace on kvm_exit": partial(bpftrace, ON_KVM_EXIT),
    "perf stat on kvm_msr": partial(perf, "kvm:kvm_msr"),
    "perf stat on kvm_exit": partial(perf, "kvm:kvm_exit"),
    **({"kvmexit of BCC's tools": kvmexit} if vendor().name == "vmx" else {}),
    "empty kprobes": partial(empty, "kprobe"),
    "empty fentry": partial(empty, "fentry"),
}


def main() -> None:
    """Measure, saying on standard output how far it is."""
    load(STOCK[vendor().name])
    found = {}
    for name, measure in TRACERS.items():
        found[name] = measure()
        print(f"{name}: {found[name]}", flush=True)
    record("exits_cost", {"made": len(KINDS) * ROUNDS * (FEW + MANY), "tracers": found})


if __name__ == "__main__":
    main()
