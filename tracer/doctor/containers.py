# SPDX-License-Identifier: GPL-2.0-or-later
"""Where this process runs: in a container, or in WSL2, whose kernels are not those of the distribution."""

from __future__ import annotations

import re

from tracer.kernel.machine import Machine

#: What Docker, Podman and systemd (or LXC, by it) put into a container. containerd and CRI-O put nothing there.
_MARKS = ("/.dockerenv", "/run/.containerenv", "/run/host/container-manager", "/run/systemd/container")
_CGROUP = re.compile(r"docker|containerd|kubepods|libpod|crio|/lxc|machine\.slice/.*nspawn", re.IGNORECASE)


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
