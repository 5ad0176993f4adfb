# SPDX-License-Identifier: GPL-2.0-or-later
"""Which VMs run now, by what /proc shows to any user: for shells that complete their names."""

from __future__ import annotations

import os
from pathlib import Path

from tracer.model.snapshot import VmInfo
from tracer.trace.vm_info import vm_info
from tracer.trace.vmm import vmm_called

#: What the descriptor of a VM leads to (kvm_create_vm() in virt/kvm/kvm_main.c).
_VM = "anon_inode:kvm-vm"


def running_vms(proc: Path = Path("/proc")) -> dict[int, VmInfo]:
    """The VMs by the pid of their VMM; may lack some, and have a VMM whose VM is not there yet.

    A process has a VM if it has a descriptor of one, which root and its owner can read; of other users' processes,
    those whose program is a known VMM. Raises nothing.
    """
    try:
        pids = [int(name) for name in os.listdir(proc) if name.isdecimal()]
    except OSError:
        return {}
    found = ((pid, vm_info(pid, proc)) for pid in sorted(pids) if _has_vm(proc / str(pid)))
    return {pid: vm for pid, vm in found if vm}


def _has_vm(process: Path) -> bool:
    try:
        with open(process / "cmdline", "rb") as file:
            program = file.read(256).partition(b"\0")[0].decode(errors="replace")
        if not program:  # a kernel thread
            return False
        try:
            with os.scandir(process / "fd") as descriptors:
                return any(os.readlink(entry.path) == _VM for entry in descriptors)
        except PermissionError:
            return vmm_called(program) is not None
    except OSError:  # it has ended
        return False
