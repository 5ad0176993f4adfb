# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernels of distributions: what their releases (uname -r) look like, and which package has their headers.

The kernel that runs need not be the distribution's own: in a container it is the host's, and on any host it may be
built by hand, of another repository, or of WSL2. So a package is named only for a release that the distribution itself
gives to its kernels. A scheme that is not here, or not certain, has no name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: A kernel's version, and its first two numbers.
_VERSION = r"(?P<series>\d+\.\d+)(?:\.\d+)?"


def _any_release(kernel: re.Match[str], version_id: str) -> bool:
    return True


@dataclass(frozen=True)
class Kernels:
    """Kernels of one kind: the pattern of their releases, and the package of their headers.

    `package` may have groups of the pattern in braces, and `{release}`. `fits` says whether a release of the
    distribution, by its VERSION_ID, has such a kernel.
    """

    pattern: str
    package: str
    fits: Callable[[re.Match[str], str], bool] = _any_release

    def match(self, release: str) -> re.Match[str] | None:
        """The kernel's release, if it is one of these kernels."""
        return re.fullmatch(self.pattern, release)

    def headers(self, release: str, version_id: str) -> str:
        """The package with the headers of the kernel, or ""."""
        kernel = self.match(release)
        if kernel is None or not self.fits(kernel, version_id):
            return ""
        groups = {name: text or "" for name, text in kernel.groupdict().items()}
        if variant := groups.get("variant"):
            groups["variant"] = f"-{variant}"
        return self.package.format(release=release, joined=groups.get("series", "").replace(".", ""), **groups)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def _same_major(kernel: re.Match[str], version_id: str) -> bool:
    """Whether the release that the kernel names in `of` is this one, where there are versions to compare."""
    return not re.match(r"\d\d|[789]\.", version_id) or kernel["of"] == version_id.partition(".")[0]


def _of_amazon_2(kernel: re.Match[str], version_id: str) -> bool:
    return version_id == "2"


def _of_debian(kernel: re.Match[str], version_id: str) -> bool:
    """Debian 12 and older name no release in their kernels, but each has one series (`6.1.0-N`); sid has no VERSION_ID.

    Backports have had the release in their names since 11 (`0.deb11.N`), except where it is `bpo`.
    """
    if not re.match(r"\d\d", version_id):
        return True
    if of := kernel["of"] or kernel["backport"]:
        return of == version_id or (of == "bpo" and int(version_id) < 13)
    return bool(kernel["abi"]) and kernel["series"] == {"10": "4.19", "11": "5.10", "12": "6.1"}.get(version_id)


#: What an LTS of Ubuntu began with, and the last that it was given (the HWE kernels; oem in between).
_UBUNTU = {"20.04": ((5, 4), (5, 15)), "22.04": ((5, 15), (6, 8)), "24.04": ((6, 8), (7, 0))}


def _of_ubuntu(kernel: re.Match[str], version_id: str) -> bool:
    first, last = _UBUNTU.get(version_id, ((0,), (1 << 16,)))
    return first <= _numbers(kernel["series"]) <= last


def _of_pve(kernel: re.Match[str], version_id: str) -> bool:
    """Proxmox VE 7 is on Debian 11, and has up to 6.2; 8 is on 12, 9 on 13 and begins with 6.14."""
    if not re.match(r"\d\d", version_id) or kernel["of"]:
        return not kernel["of"] or kernel["of"] == version_id
    first, last = {"11": ((5, 11), (6, 1)), "12": ((6, 2), (6, 14)), "13": ((6, 14), (1 << 16,))}.get(
        version_id, ((), ())
    )
    return first <= _numbers(kernel["series"]) <= last


def _of_suse(kernel: re.Match[str], version_id: str) -> bool:
    """SUSE's products have their version in the kernel's release since 15 SP3: 150600 is 15.6."""
    if not re.fullmatch(r"1\d\.\d+", version_id) or not kernel["product"]:
        return True
    major, minor = _numbers(version_id)
    return int(kernel["product"]) == major * 10000 + minor * 100


_DEBIAN = Kernels(
    rf"{_VERSION}(?:-rc\d+)?"
    r"(?:(?P<abi>-\d+)|-0\.(?:deb)?(?P<backport>\d+|bpo)(?:\.\d+)+|\+(?:deb)?(?P<of>\d+|bpo)(?:[.+]\d+)*)?"
    r"-(?:rt-|cloud-)?(?:amd64|686|686-pae)",
    "linux-headers-{release}",
    _of_debian,
)
_FLAVOURS = (
    "generic|lowlatency|realtime|aws|aws-fips|azure|azure-fde|azure-fips|gcp|gcp-fips|fips|gke|gkeop|ibm|intel|"
    "intel-iotg|kvm|nvidia|nvidia-lowlatency|oem|oracle"
)
#: Builds of the mainline have six digits (6.11.0-061100-generic), and are in no archive.
_OF_UBUNTU = Kernels(rf"(?P<series>\d+\.\d+)\.0-\d{{1,4}}-(?:{_FLAVOURS})", "linux-headers-{release}", _of_ubuntu)
#: The packages were renamed with 6.2.16-6, early in Proxmox VE 8.
_PVE = (
    Kernels(r"(?P<series>5\.\d+|6\.[012])\.\d+-\d+-bpo(?P<of>11)-pve", "pve-headers-{release}", _of_pve),
    Kernels(r"(?P<series>5\.\d+|6\.[01])\.\d+-\d+(?P<of>)-pve", "pve-headers-{release}", _of_pve),
    Kernels(r"(?P<series>6\.2)\.16-[1-5](?P<of>)-pve", "pve-headers-{release}", _of_pve),
    Kernels(r"(?P<series>6\.2)\.16-(?:[6-9]|\d\d)(?P<of>)-pve", "proxmox-headers-{release}", _of_pve),
    Kernels(
        r"(?P<series>6\.(?:[3-9]|\d\d)|[7-9]\.\d+)\.\d+-\d+(?:-bpo(?P<of>\d+))?-pve",
        "proxmox-headers-{release}",
        _of_pve,
    ),
)

_NUMBER = r"\d+(?:\.\d+)*"
_FEDORA = Kernels(
    rf"(?P<base>{_VERSION}-(?:0\.rc\d+(?:\.[\dgita-f]+)*\.)?{_NUMBER}\.fc(?P<of>\d+)\.x86_64)"
    r"(?:\+(?P<variant>debug|rt))?",
    "kernel{variant}-devel-{base}",
    _same_major,
)
_RHEL = Kernels(
    rf"(?P<base>{_VERSION}-{_NUMBER}\.el(?P<of>\d+)(?:_\d+)?(?:\.x86_64)?)(?:\+(?P<variant>rt|debug|rt-debug))?",
    "kernel{variant}-devel-{base}",
    _same_major,
)
#: The real-time kernels of RHEL 8, and of 9 up to 9.2.
_RHEL_RT = Kernels(
    rf"(?P<base>{_VERSION}-{_NUMBER}\.rt\d+(?:\.\d+)+\.el(?P<of>\d+)(?:_\d+)?(?:\.x86_64)?)(?:\+(?P<variant>debug))?",
    "kernel-rt{variant}-devel-{base}",
    _same_major,
)
_UEK = Kernels(rf"{_VERSION}-{_NUMBER}\.el(?P<of>\d+)uek\.x86_64", "kernel-uek-devel-{release}", _same_major)
_OF_ELREPO = r"-1\.el(?P<of>\d+)\.elrepo\.x86_64"
_ELREPO_OPTION = " --enablerepo=elrepo-kernel"
#: Releases of kernel-ml and kernel-lt look alike. A series that is not kept for long is of the first, as are the first
#: releases of any other; of those that it is, ELRepo has one for each el as kernel-lt.
_ELREPO = (
    Kernels(
        r"(?P<series>6\.1)\.(?:[3-9]\d|\d{3})-1\.el(?P<of>9)\.elrepo\.x86_64",
        "kernel-lt-devel-{release}" + _ELREPO_OPTION,
        _same_major,
    ),
    Kernels(
        r"(?P<series>5\.4)\.\d+-1\.el(?P<of>8)\.elrepo\.x86_64",
        "kernel-lt-devel-{release}" + _ELREPO_OPTION,
        _same_major,
    ),
    Kernels(
        rf"(?!5\.(?:4|10|15)\.|6\.(?:1|6|12|18)\.){_VERSION}{_OF_ELREPO}",
        "kernel-ml-devel-{release}" + _ELREPO_OPTION,
        _same_major,
    ),
    Kernels(rf"(?P<series>6\.(?:6|12|18))\.\d{_OF_ELREPO}", "kernel-ml-devel-{release}" + _ELREPO_OPTION, _same_major),
)
#: Of Amazon Linux 2023, kernels newer than 6.1 have packages of other names.
_AMAZON = (
    Kernels(rf"(?P<series>6\.1)\.\d+-{_NUMBER}\.amzn(?P<of>2023)\.x86_64", "kernel-devel-{release}", _same_major),
    Kernels(rf"(?P<series>5\.1[05])\.\d+-{_NUMBER}\.amzn(?P<of>2)\.x86_64", "kernel-devel-{release}", _of_amazon_2),
)

_PACKAGE_RELEASE = r"\d+(?:\.\d+)?"
_ARCH = (
    Kernels(rf"{_VERSION}-arch\d+-{_PACKAGE_RELEASE}", "linux-headers"),
    Kernels(rf"{_VERSION}-{_PACKAGE_RELEASE}-lts", "linux-lts-headers"),
    Kernels(rf"{_VERSION}-zen\d+-{_PACKAGE_RELEASE}-zen", "linux-zen-headers"),
    Kernels(rf"{_VERSION}-hardened\d+-{_PACKAGE_RELEASE}-hardened", "linux-hardened-headers"),
)
_CACHYOS = Kernels(
    rf"{_VERSION}(?:-rc\d+)?-{_PACKAGE_RELEASE}-"
    r"(?P<flavour>cachyos(?:-(?:bmq|bore|deckify|eevdf|hardened|lts|rc|rt-bore|server))?(?:-(?:gcc|lto))?)",
    "linux-{flavour}-headers",
)
#: The number of the real-time patch stands before that of the package, or behind it.
_MANJARO = (
    Kernels(rf"{_VERSION}(?:-rc\d+)?-{_PACKAGE_RELEASE}-MANJARO", "linux{joined}-headers"),
    Kernels(rf"{_VERSION}(?:-rt\d+-{_PACKAGE_RELEASE}|-{_PACKAGE_RELEASE}-rt\d+)-MANJARO", "linux{joined}-rt-headers"),
)

_SUSE_FLAVOUR = r"-(?P<flavour>default|azure|rt|preempt|longterm|kvmsmall|debug|vanilla)"
#: The package provides the release of its source, which is the kernel's; its own has the number of its build, too.
_SUSE = Kernels(
    rf"(?P<base>{_VERSION}-(?:(?P<product>1[56]\d{{4}})\.)?{_NUMBER}){_SUSE_FLAVOUR}",
    "kernel-{flavour}-devel={base}",
    _of_suse,
)
#: A distribution that rolls has the headers of the newest kernel alone; they will do.
_TUMBLEWEED = Kernels(rf"{_VERSION}-{_PACKAGE_RELEASE}{_SUSE_FLAVOUR}", "kernel-{flavour}-devel")
_ALPINE = Kernels(rf"{_VERSION}-\d+-(?P<flavour>lts|virt|stable|edge)", "linux-{flavour}-dev")
_KALI = Kernels(rf"{_VERSION}(?:-kali\d+|\+kali(?:\d+)?)?-(?:rt-|cloud-)?amd64", "linux-headers-{release}")

#: By ID or ID_LIKE of os-release(5).
KERNELS: dict[str, Sequence[Kernels]] = {
    "debian": (_DEBIAN, *_PVE),
    "ubuntu": (_OF_UBUNTU,),
    "pop": (Kernels(r"\d+\.\d+\.\d+-76\d{6}-generic", "linux-headers-{release}"), _OF_UBUNTU),
    "kali": (_KALI,),
    "fedora": (_FEDORA,),
    "rhel": (_RHEL, _RHEL_RT, *_ELREPO),
    "ol": (_RHEL, _UEK, *_ELREPO),
    "rhcos": (Kernels(_RHEL.pattern, _RHEL.package),),
    "amzn": _AMAZON,
    "arch": _ARCH,
    "cachyos": (_CACHYOS, *_ARCH),
    "manjaro": _MANJARO,
    "suse": (_SUSE,),
    "opensuse-tumbleweed": (_TUMBLEWEED,),
    "opensuse-slowroll": (_TUMBLEWEED,),
    "opensuse-microos": (_TUMBLEWEED,),
    "opensuse-aeon": (_TUMBLEWEED,),
    "opensuse-kalpa": (_TUMBLEWEED,),
    "alpine": (_ALPINE,),
}


def headers_package(ids: Sequence[str], version_id: str, release: str) -> str:
    """The package with the headers of the kernel `release` in the first known of the distributions `ids`, or ""."""
    known = next((KERNELS[name] for name in ids if name in KERNELS), ())
    # Only a distribution's own VERSION_ID says which of its releases it is: Mint 22 is not Ubuntu 22.
    version = version_id if ids and (ids[0] in KERNELS or "rhel" in ids or "suse" in ids) else ""
    return next((found for kernels in known if (found := kernels.headers(release, version))), "")


def restricts_perf_events(release: str) -> bool | None:
    """Whether perf_event_open() of the kernel asks for CAP_SYS_ADMIN where perf_event_paranoid is above 2.

    Debian's kernels do (features/all/security-perf-allow-further-restriction-of-perf_event_open.patch); Ubuntu's, and
    Proxmox' made from them, from 3 or from 4 on; linux-hardened has the patch, too. None where it may be so.
    """
    if _DEBIAN.match(release) or _KALI.match(release):
        return True
    doubtful = (*KERNELS["ubuntu"], *KERNELS["pop"], *_PVE)
    if any(kernels.match(release) for kernels in doubtful) or "hardened" in release:
        return None
    return False if is_of_a_distribution(release) else None


def is_of_a_distribution(release: str) -> bool:
    """Whether the kernel is recognisably that of some distribution."""
    return any(kernels.match(release) for of_one in KERNELS.values() for kernels in of_one)
