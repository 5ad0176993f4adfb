# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's QEMU in /in/qemu, with a VM of two vCPUs: what `msrtrace state` says of it."""

from __future__ import annotations

import os
import subprocess

from guest import STOCK, load, output_of, record, until, vendor

from tracer.cli.session import state_reader

HERE = "/in/qemu"
COMMAND = [f"{HERE}/qemu-system-x86_64", "-L", HERE, "-nodefaults", "-display", "none", "-accel", "kvm", "-smp", "2"]
NAME = "web"


def main() -> None:
    """Leaves /out/real_qemu.json."""
    load(STOCK[vendor().name])
    environment = os.environ | {"LD_LIBRARY_PATH": HERE}
    qemu = subprocess.Popen([*COMMAND, "-name", f"guest={NAME},debug-threads=on"], env=environment)
    with state_reader() as reader:
        # The BIOS starts the second vCPU.
        until(lambda: qemu.poll() is None and any(all(vcpu.ran for vcpu in vm.vcpus) for vm in reader.read().vms))
    found = {form: output_of("msrtrace", "state", "--vm", NAME, "--format", form) for form in ("json", "text")}
    record(
        "real_qemu", found | {"pid": qemu.pid, "version": output_of(COMMAND[0], "--version", env=environment)["stdout"]}
    )
    qemu.kill()
    qemu.wait()


if __name__ == "__main__":
    main()
