# SPDX-License-Identifier: GPL-2.0-or-later
"""The distributions' packages for what may be missing."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tracer.doctor.containers import in_container
from tracer.doctor.kernels import headers_package
from tracer.kernel.machine import Machine, search


@dataclass(frozen=True)
class _Family:
    """How a family of distributions installs packages: BCC for the system's Python, and BCC's library alone."""

    installer: str
    bcc: str
    library: str


# By ID or ID_LIKE of os-release(5).
_FAMILIES = {
    "debian": _Family("sudo apt-get install {}", "python3-bpfcc", "libbpfcc"),
    "fedora": _Family("sudo dnf install {}", "python3-bcc", "bcc"),
    "arch": _Family("sudo pacman -S {}", "python-bcc", "bcc"),
    "suse": _Family("sudo zypper install {}", "python3-bcc", "libbcc0"),
    "alpine": _Family("sudo apk add {}", "py3-bcc", "bcc"),
}
_RPM_OSTREE = "sudo rpm-ostree install {}, and reboot"
_TRANSACTIONAL = "sudo transactional-update pkg install {}, and reboot"
#: Kernels from repositories that are added to those of the distribution.
_ADDED = re.compile(r"-pve$|\.elrepo\.")
#: An RHCOS node takes no packages but these, which the cluster adds.
_EXTENSION = "add the extension kernel-devel to the node, by a MachineConfig (spec: extensions: [kernel-devel])"


def os_release(machine: Machine) -> dict[str, str]:
    """The fields of os-release(5), which is in /usr/lib if it is not in /etc."""
    text = machine.text("/etc/os-release", "") or machine.text("/usr/lib/os-release", "")
    return {name: value.strip("\"' ") for name, value in re.findall(r"^(\w+)=(.*)", text, re.MULTILINE)}


def distribution(machine: Machine) -> str:
    """The family of the distribution, by os-release, or ""."""
    return next((name for name in _ids(os_release(machine)) if name in _FAMILIES), "")


def install_headers(machine: Machine) -> str:
    """The command that installs the headers of the running kernel; "" unless that is certainly their package."""
    release = os_release(machine)
    package = headers_package(_ids(release), release.get("VERSION_ID", ""), machine.release)
    if _ADDED.search(machine.release) and in_container(machine):
        return ""  # the image of a container has no such repository
    if package and _is_rhcos(release):
        return _EXTENSION
    return _installer(machine, release).format(package) if package else ""


def install_bcc(machine: Machine) -> str:
    """The command that installs BCC for the system's Python, or ""."""
    release = os_release(machine)
    family = _FAMILIES.get(distribution(machine))
    return _installer(machine, release).format(family.bcc) if family and _takes_packages(release) else ""


def install_library(machine: Machine) -> str:
    """The command that installs BCC's library alone, or ""."""
    release = os_release(machine)
    family = _FAMILIES.get(distribution(machine))
    return _installer(machine, release).format(family.library) if family and _takes_packages(release) else ""


def _ids(release: dict[str, str]) -> list[str]:
    ids = f"{release.get('ID', '')} {release.get('ID_LIKE', '')}".split()
    return [*ids, *(["suse"] if any(name.startswith("opensuse") for name in ids) else [])]


def _takes_packages(release: dict[str, str]) -> bool:
    """Whether it takes any package: images of which the distribution's package manager changes nothing do not."""
    return not _is_rhcos(release) and release.get("ID") not in ("steamos", "endless")


def _is_rhcos(release: dict[str, str]) -> bool:
    """Red Hat's CoreOS; since 4.19 its ID is rhel."""
    return release.get("ID") == "rhcos" or (release.get("ID") == "rhel" and release.get("VARIANT_ID") == "coreos")


def _installer(machine: Machine, release: dict[str, str]) -> str:
    family = distribution(machine)
    if family == "fedora" and machine.at("/run/ostree-booted").exists():
        return _RPM_OSTREE
    if family == "fedora" and release.get("VARIANT_ID") in _IMAGES:
        return _RPM_OSTREE
    if family == "suse" and (_is_transactional(release) or _root_is_read_only(machine)):
        return _TRANSACTIONAL
    if release.get("ID") == "amzn" and release.get("VERSION_ID") == "2":
        return "sudo yum install {}"
    return _FAMILIES[family].installer if family else ""


#: Fedora's editions that are images (ostree), by VARIANT_ID.
_IMAGES = [
    "silverblue",
    "kinoite",
    "sway-atomic",
    "budgie-atomic",
    "cosmic-atomic",
    "sericea",
    "onyx",
    "iot",
    "coreos",
    "bazzite",
    "bluefin",
    "aurora",
]


def _is_transactional(release: dict[str, str]) -> bool:
    """Whether the distribution is one whose root file system is read-only (transactional-update(8))."""
    return bool(re.search(r"micro|aeon|kalpa", release.get("ID", "")))


def _root_is_read_only(machine: Machine) -> bool:
    """As of SLES and Leap with the role of a transactional server."""
    root = search(r"^\S+ / \S+ (\S+)", machine.text("/proc/self/mounts", ""))
    return "ro" in root.split(",") and machine.at("/usr/sbin/transactional-update").exists()
