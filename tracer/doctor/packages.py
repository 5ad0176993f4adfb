# SPDX-License-Identifier: GPL-2.0-or-later
"""The distributions' packages for what may be missing."""

from __future__ import annotations

import re

from tracer.kernel.machine import Machine, search

# By ID or ID_LIKE of os-release(5): the headers of the running kernel, BCC for the system's Python, and BCC's library,
# which comes along with that.
_PACKAGES = {
    "debian": ("sudo apt-get install {headers}", "sudo apt-get install python3-bpfcc", "sudo apt-get install libbpfcc"),
    "fedora": ("sudo dnf install {devel}", "sudo dnf install python3-bcc", "sudo dnf install bcc"),
    "arch": ("sudo pacman -S linux{flavour}-headers", "sudo pacman -S python-bcc", "sudo pacman -S bcc"),
    "suse": (
        "sudo zypper install kernel{flavour}-devel",
        "sudo zypper install python3-bcc",
        "sudo zypper install libbcc0",
    ),
    "alpine": ("sudo apk add linux{flavour}-dev", "sudo apk add py3-bcc", "sudo apk add bcc"),
}


def distribution(machine: Machine) -> str:
    """The key of _PACKAGES that matches /etc/os-release, or ""."""
    release = machine.text("/etc/os-release", "").replace("opensuse", "suse")
    ids = f"{search(r'^ID=(.*)', release)} {search(r'^ID_LIKE=(.*)', release)}"
    return next((name for name in re.findall(r"\w+", ids) if name in _PACKAGES), "")


def install_command(machine: Machine, which: int) -> str:
    """The command that installs the headers (0), BCC (1) or its library alone (2), or ""."""
    # Proxmox VE: 6.8.12-4-pve, on Debian. RHEL: 5.14.0-427.el9.x86_64+rt. Arch: 6.6.63-1-lts.
    (base, _, variant), last = machine.release.partition("+"), machine.release.rpartition("-")[2]
    variant = f"-{variant}" if variant else "-uek" if "uek" in base else ""
    return _PACKAGES.get(distribution(machine), ("", "", ""))[which].format(
        headers=f"{'proxmox' if last == 'pve' else 'linux'}-headers-{machine.release}",
        devel=f"kernel{variant}-devel-{base}",
        flavour=f"-{last}" if last.isalpha() else "",
    )
