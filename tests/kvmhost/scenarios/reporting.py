# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports of everything that a workload can do, on each variant of the KVM module: one engine makes them all."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

from guest import OUT, load, output_of, vendor

from tracer.model.options import Options
from tracer.report.file import encode
from tracer.report.making import HostInfo, make
from tracer.trace.engine import Engine
from tracer.trace.recording import record
from tracer.trace.tracer import Tracer

UPDATES, VCPUS, REPEATS = 101, 2 * 3, 3
BRIEF = 7  # VMs that end at once
INTERRUPTED_SECONDS = 20  # of guest time: attaching the probes takes 12
#: By the name of the report: what the workload is told.
CASES = {
    "main": f"--vms 2 --vcpus 3 --updates {UPDATES} --initial-run",
    **{f"repeat-{n}": "--vcpus 2 --updates 11 --initial-run" for n in range(REPEATS)},
    "idle": "--vcpus 2 --updates 0",
    "deny-all": "--vcpus 2 --updates 7 --deny-all --initial-run",
    "several": "--processes --vms 3 --updates 20 --interval 50 --msr 0x10 --msr 0x48 --msr 0x174 --initial-run",
    "brief": f"--processes --vms {BRIEF} --updates 1 --initial-run",
    "spec-ctrl": "--updates 3 --msr 0x48 --spec-ctrl 2 --initial-run",
}


def make_reports(variants: Sequence[str]) -> dict[str, list[str]]:
    """/out/reports/VARIANT-CASE.json for each of VARIANTS and CASES."""
    options = Options(by_vm=True, backend="kprobe")  # under which the module can be reloaded
    load(variants[0])
    tracer = Tracer(lambda layout, symbols: Engine(layout, symbols, options), keep_gone=True)
    tracer.attach()
    (OUT / "reports").mkdir()
    for number, variant in enumerate(variants):
        if number:
            load(variant)
            tracer.follow()
        for name, options_ in CASES.items():
            command = ["workload", *options_.split()]
            recording = record(tracer, command=command, by_vm=True)
            made = make(
                recording.counted,
                HostInfo.here(vendor().module),
                started=recording.started,
                duration=recording.seconds,
                version="test",
                label=variant,
                command=command,
                exit_status=recording.status,
                notes=recording.notes,
            )
            (OUT / "reports" / f"{variant}-{name}.json").write_bytes(encode(made))
    tracer.close()
    return {"variants": list(variants), "cases": list(CASES)}


#: What `accesses` is told: on two vCPUs, writes that only the filter has intercepted, reads that pass, and reads that
#: KVM intercepts; three times. Then the VM stays for a while, but it is gone when the report is made.
EXITING = (
    "--vcpus 2 --deny-write 0xc0000100 --write 0xc0000100=13 --read 0xc0000100=5 --read 0xc0000080=7 --name guarded"
)
ROUNDS = "--rounds 3 --done /tmp/guarded --hold 15"


def report_command() -> Any:
    """`msrtrace report` as a user types it: around a command that fails in the end, and interrupted. And `top`.

    And both with exits.
    """
    outputs = ("-o", "/out/reports/cli.json", "-o", "/out/reports/cli.html")
    around = output_of(
        "msrtrace", "report", "--label", "cli", *outputs, "--", "sh", "-c", "workload --updates 5; exit 7"
    )
    forever = ("msrtrace", "report", "-d", "600", "--format", "json")
    vm = subprocess.Popen(["workload", "--forever", "--interval", "20"], stdout=subprocess.DEVNULL)
    top = output_of("msrtrace", "top", "-n", "1", "-d", "2")
    interrupted = output_of("timeout", "--foreground", "-s", "INT", str(INTERRUPTED_SECONDS), *forever)
    vm.terminate()
    vm.wait()
    with_exits = ("--exits", "--by-vm", "-o", "/out/reports/exits.json")
    exits = output_of("msrtrace", "report", *with_exits, "--", "accesses", *EXITING.split(), *ROUNDS.split())
    vm = subprocess.Popen(["accesses", *EXITING.split(), "--forever", "--interval", "20"], stdout=subprocess.DEVNULL)
    top_exits = output_of("msrtrace", "top", "--exits", "-n", "1", "-d", "2")
    vm.terminate()
    vm.wait()
    return {"around": around, "top": top, "interrupted": interrupted, "exits": exits, "top_exits": top_exits}
