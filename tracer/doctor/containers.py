# SPDX-License-Identifier: GPL-2.0-or-later
"""Where this process runs: in a container, or in WSL2, whose kernels are not those of the distribution.

What a container must be given to trace, and what it cannot see, is in docs/containers.md.
"""

from __future__ import annotations

import re

from tracer.doctor.check import Found, State
from tracer.kernel.machine import Machine

#: What Docker, Podman and systemd (or LXC, by it) put into a container. containerd and CRI-O put nothing there.
_MARKS = ("/.dockerenv", "/run/.containerenv", "/run/host/container-manager", "/run/systemd/container")
_CGROUP = re.compile(r"docker|containerd|kubepods|libpod|crio|/lxc|machine\.slice/.*nspawn", re.IGNORECASE)

#: What /proc/self/ns/pid is a link to on the host: PROC_PID_INIT_INO, include/linux/proc_ns.h.
_HOST_PIDS = "pid:[4026531836]"
_HIDDEN = "a pid namespace of its own (a container's) hides the processes of VMs"
_SHOW = "docker run --pid=host (Kubernetes: hostPID: true)"
#: What shows to a container the parts of /proc and /sys that its runtime hides.
UNMASK = "docker run --security-opt systempaths=unconfined (podman: --security-opt unmask={path})"


def in_container(machine: Machine) -> bool:
    """Whether this is certainly a container, so that the kernel is that of its host."""
    if any(machine.at(mark).exists() for mark in _MARKS) or {"container", "KUBERNETES_SERVICE_HOST"} & {
        *machine.environ
    }:
        return True
    cgroups = (machine.text(f"/proc/{process}/cgroup", "") for process in ("self", "1"))
    if any(_CGROUP.search(cgroup) for cgroup in cgroups):
        return True
    # A cgroup namespace hides the path; hosts have the modules of their kernel, and seldom an overlay for a root.
    root = re.search(r"^overlay / overlay ", machine.text("/proc/self/mounts", ""), re.MULTILINE)
    return root is not None and not machine.at(f"/lib/modules/{machine.release}").exists()


def in_wsl(machine: Machine) -> bool:
    """Whether this is WSL2, by its kernel's name, or by its files where the kernel is built by its user."""
    return "microsoft" in machine.release.lower() or machine.at("/proc/sys/fs/binfmt_misc/WSLInterop").exists()


def on_host(machine: Machine, command: str) -> str:
    """The command that fixes something, and that it must be typed outside of the container if this is one."""
    return f"on the host: {command}" if in_container(machine) else command


def check_processes(machine: Machine) -> Found:
    """Whether the processes of VMMs are seen."""
    if not _hides_processes(machine):
        return State.OK, "those of VMs are seen", None
    detail = f"{_HIDDEN}: all is counted, but not by VM, and what vCPUs intercept is not shown"
    return State.WARNING, detail, _SHOW


def explain_hidden_processes(machine: Machine) -> str | None:
    """Why the processes of VMMs are not seen, and what to do; None if nothing says that they are not."""
    return f"{_HIDDEN}: {_SHOW}" if _hides_processes(machine) else None


def _hides_processes(machine: Machine) -> bool:
    """Whether this is certainly not the initial pid namespace, whose ids BPF programs see."""
    try:
        return str(machine.at("/proc/self/ns/pid").readlink()) != _HOST_PIDS
    except OSError:
        return False
