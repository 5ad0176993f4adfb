# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's QEMU in /in/qemu boots its firmware in a VM of two vCPUs.

What `msrtrace state` says of it, and the exits of its accesses to MSRs: as msrtrace counts them, and KVM's tracepoints.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack
from typing import Any

from exits import ExitTracer, counted, engines
from guest import OUT, STOCK, load, output_of, record, until, vendor

from tracer.cli.session import state_reader

HERE = "/in/qemu"
COMMAND = [f"{HERE}/qemu-system-x86_64", "-L", HERE, "-nodefaults", "-display", "none", "-accel", "kvm", "-smp", "2"]
NAME = "web"


def boot() -> dict[str, Any]:
    """Let it boot, until the BIOS has started the second vCPU; and end it."""
    environment = os.environ | {"LD_LIBRARY_PATH": HERE}
    qemu = subprocess.Popen([*COMMAND, "-name", f"guest={NAME},debug-threads=on"], env=environment)
    with state_reader() as reader:
        until(lambda: qemu.poll() is None and any(all(vcpu.ran for vcpu in vm.vcpus) for vm in reader.read().vms))
    found = {form: output_of("msrtrace", "state", "--vm", NAME, "--format", form) for form in ("json", "text")}
    version = output_of(COMMAND[0], "--version", env=environment)["stdout"]
    qemu.kill()
    qemu.wait()
    return found | {"pid": qemu.pid, "version": version}


def main() -> None:
    """Leaves /out/real_qemu.json, and /out/exits/qemu as ringbuffer.py reads it."""
    load(STOCK[vendor().name])
    with ExitStack() as stack, ExitTracer() as tracer:
        running = engines(stack)
        found = boot()
        tracer.take(OUT / "exits/qemu")
        exits = {name: counted(one.snapshot(5.0), None) for name, one in running.items()}
    record("real_qemu", found | {"engines": exits})


if __name__ == "__main__":
    main()
