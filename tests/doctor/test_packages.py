# SPDX-License-Identifier: GPL-2.0-or-later
"""Which package has the headers of a kernel in a distribution: the right one, or none is named."""

from __future__ import annotations

import pytest
from machines import FAILED, RELEASE, Host

from tracer.doctor.check import Check
from tracer.doctor.examination import obstacle
from tracer.doctor.packages import distribution, install_bcc, install_headers, install_library

DEBIAN, UBUNTU = "ID=debian", "ID=ubuntu ID_LIKE=debian"
FEDORA, RHEL = "ID=fedora", 'ID="rhel" ID_LIKE="fedora"'
ROCKY, ORACLE = 'ID="rocky" ID_LIKE="rhel centos fedora"', 'ID="ol" ID_LIKE="fedora"'
LEAP, SLES = 'ID="opensuse-leap" ID_LIKE="suse opensuse"', 'ID="sles" ID_LIKE="suse"'
TUMBLEWEED = 'ID="opensuse-tumbleweed" ID_LIKE="opensuse suse"'
MICROOS = 'ID="opensuse-microos" ID_LIKE="suse opensuse opensuse-tumbleweed"'
SILVERBLUE, RHCOS = "ID=fedora VARIANT_ID=silverblue", 'ID="rhcos" ID_LIKE="rhel fedora" VERSION_ID="4.16"'
CACHYOS, MANJARO = "ID=cachyos ID_LIKE=arch", "ID=manjaro ID_LIKE=arch"
ELREPO = " --enablerepo=elrepo-kernel"

#: The distribution, the kernel that runs, and the command that installs its headers.
NAMED = [
    (DEBIAN, RELEASE, f"sudo apt-get install linux-headers-{RELEASE}"),
    (f"{DEBIAN} VERSION_ID=12", RELEASE, f"sudo apt-get install linux-headers-{RELEASE}"),
    (DEBIAN, "6.12.117+deb13-amd64", "sudo apt-get install linux-headers-6.12.117+deb13-amd64"),
    (
        f"{DEBIAN} VERSION_ID=13",
        "6.12.117+deb13-cloud-amd64",
        "sudo apt-get install linux-headers-6.12.117+deb13-cloud-amd64",
    ),
    (f"{DEBIAN} VERSION_ID=11", "5.10.0-32-rt-amd64", "sudo apt-get install linux-headers-5.10.0-32-rt-amd64"),
    (f"{DEBIAN} VERSION_ID=12", "6.5.0-0.deb12.4-amd64", "sudo apt-get install linux-headers-6.5.0-0.deb12.4-amd64"),
    (f"{DEBIAN} VERSION_ID=12", "6.12.9+bpo-amd64", "sudo apt-get install linux-headers-6.12.9+bpo-amd64"),
    (DEBIAN, "6.17.7+deb14+1-amd64", "sudo apt-get install linux-headers-6.17.7+deb14+1-amd64"),
    (DEBIAN, "6.11.2-amd64", "sudo apt-get install linux-headers-6.11.2-amd64"),
    (DEBIAN, "6.8.12-4-pve", "sudo apt-get install proxmox-headers-6.8.12-4-pve"),
    (f"{DEBIAN} VERSION_ID=11", "5.15.35-1-pve", "sudo apt-get install pve-headers-5.15.35-1-pve"),
    (f"{DEBIAN} VERSION_ID=11", "6.2.16-11-bpo11-pve", "sudo apt-get install pve-headers-6.2.16-11-bpo11-pve"),
    (f"{DEBIAN} VERSION_ID=12", "6.2.16-3-pve", "sudo apt-get install pve-headers-6.2.16-3-pve"),
    (f"{DEBIAN} VERSION_ID=12", "6.2.16-19-pve", "sudo apt-get install proxmox-headers-6.2.16-19-pve"),
    (f"{DEBIAN} VERSION_ID=13", "6.17.2-1-pve", "sudo apt-get install proxmox-headers-6.17.2-1-pve"),
    (UBUNTU, "6.8.0-45-generic", "sudo apt-get install linux-headers-6.8.0-45-generic"),
    (f"{UBUNTU} VERSION_ID=22.04", "6.8.0-45-generic", "sudo apt-get install linux-headers-6.8.0-45-generic"),
    (f"{UBUNTU} VERSION_ID=24.04", "6.14.0-1012-aws", "sudo apt-get install linux-headers-6.14.0-1012-aws"),
    (
        'ID=linuxmint ID_LIKE="ubuntu debian" VERSION_ID=22',
        "6.8.0-45-generic",
        "sudo apt-get install linux-headers-6.8.0-45-generic",
    ),
    (
        'ID=pop ID_LIKE="ubuntu debian" VERSION_ID=22.04',
        "6.9.3-76060903-generic",
        "sudo apt-get install linux-headers-6.9.3-76060903-generic",
    ),
    (
        "ID=kali ID_LIKE=debian VERSION_ID=2024.4",
        "6.11.2-amd64",
        "sudo apt-get install linux-headers-6.11.2-amd64",
    ),
    (FEDORA, "6.11.4-301.fc41.x86_64", "sudo dnf install kernel-devel-6.11.4-301.fc41.x86_64"),
    (
        f"{FEDORA} VERSION_ID=41",
        "6.11.4-301.fc41.x86_64+debug",
        "sudo dnf install kernel-debug-devel-6.11.4-301.fc41.x86_64",
    ),
    (
        RHEL,
        "5.14.0-427.13.1.el9_4.x86_64+rt",
        "sudo dnf install kernel-rt-devel-5.14.0-427.13.1.el9_4.x86_64",
    ),
    (
        f"{RHEL} VERSION_ID=8.10",
        "4.18.0-553.rt7.346.el8_10.x86_64",
        "sudo dnf install kernel-rt-devel-4.18.0-553.rt7.346.el8_10.x86_64",
    ),
    (
        f"{RHEL} VERSION_ID=9.2",
        "5.14.0-284.11.1.rt14.296.el9_2.x86_64",
        "sudo dnf install kernel-rt-devel-5.14.0-284.11.1.rt14.296.el9_2.x86_64",
    ),
    (f"{ROCKY} VERSION_ID=9.4", "5.14.0-427.el9.x86_64", "sudo dnf install kernel-devel-5.14.0-427.el9.x86_64"),
    (
        f"{ROCKY} VERSION_ID=9.5",
        "6.12.1-1.el9.elrepo.x86_64",
        f"sudo dnf install kernel-ml-devel-6.12.1-1.el9.elrepo.x86_64{ELREPO}",
    ),
    (
        f"{ROCKY} VERSION_ID=9.5",
        "6.1.119-1.el9.elrepo.x86_64",
        f"sudo dnf install kernel-lt-devel-6.1.119-1.el9.elrepo.x86_64{ELREPO}",
    ),
    (
        ORACLE,
        "5.15.0-206.153.7.el9uek.x86_64",
        "sudo dnf install kernel-uek-devel-5.15.0-206.153.7.el9uek.x86_64",
    ),
    (
        'ID="amzn" ID_LIKE="fedora" VERSION_ID=2023',
        "6.1.112-122.189.amzn2023.x86_64",
        "sudo dnf install kernel-devel-6.1.112-122.189.amzn2023.x86_64",
    ),
    (
        'ID="amzn" ID_LIKE="centos rhel fedora" VERSION_ID=2',
        "5.10.227-219.884.amzn2.x86_64",
        "sudo yum install kernel-devel-5.10.227-219.884.amzn2.x86_64",
    ),
    (
        f"{SILVERBLUE} VERSION_ID=41",
        "6.11.4-301.fc41.x86_64",
        "sudo rpm-ostree install kernel-devel-6.11.4-301.fc41.x86_64, and reboot",
    ),
    (
        RHCOS,
        "5.14.0-427.40.1.el9_4.x86_64",
        "add the extension kernel-devel to the node, by a MachineConfig (spec: extensions: [kernel-devel])",
    ),
    ("ID=arch", "6.11.5-arch1-1", "sudo pacman -S linux-headers"),
    ("ID=arch", "6.6.63-1-lts", "sudo pacman -S linux-lts-headers"),
    ("ID=arch", "6.11.5-zen1-1-zen", "sudo pacman -S linux-zen-headers"),
    ("ID=endeavouros ID_LIKE=arch", "6.10.10-hardened1-1-hardened", "sudo pacman -S linux-hardened-headers"),
    (CACHYOS, "6.18.40-1-cachyos-lts", "sudo pacman -S linux-cachyos-lts-headers"),
    (CACHYOS, "6.12.1-2-cachyos", "sudo pacman -S linux-cachyos-headers"),
    (CACHYOS, "6.12.1-2-cachyos-rt-bore-lto", "sudo pacman -S linux-cachyos-rt-bore-lto-headers"),
    (MANJARO, "6.6.10-1-MANJARO", "sudo pacman -S linux66-headers"),
    (MANJARO, "6.12.4-1-MANJARO", "sudo pacman -S linux612-headers"),
    (MANJARO, "6.13.0-rc3-1-MANJARO", "sudo pacman -S linux613-headers"),
    (MANJARO, "6.6.10-1-rt20-MANJARO", "sudo pacman -S linux66-rt-headers"),
    (MANJARO, "6.1.46-rt13-1-MANJARO", "sudo pacman -S linux61-rt-headers"),
    (LEAP, "6.4.0-150600.23-default", "sudo zypper install kernel-default-devel=6.4.0-150600.23"),
    (
        f"{SLES} VERSION_ID=15.6",
        "6.4.0-150600.23.25-default",
        "sudo zypper install kernel-default-devel=6.4.0-150600.23.25",
    ),
    (f"{SLES} VERSION_ID=15.6", "6.4.0-150600.8.5-azure", "sudo zypper install kernel-azure-devel=6.4.0-150600.8.5"),
    (f"{LEAP} VERSION_ID=16.0", "6.12.0-160000.5-default", "sudo zypper install kernel-default-devel=6.12.0-160000.5"),
    (TUMBLEWEED, "6.11.3-1-default", "sudo zypper install kernel-default-devel"),
    ('ID="opensuse-tumbleweed"', "6.11.3-1-default", "sudo zypper install kernel-default-devel"),
    (MICROOS, "6.11.3-1-default", "sudo transactional-update pkg install kernel-default-devel, and reboot"),
    ("ID=alpine VERSION_ID=3.20.3", "6.6.58-0-lts", "sudo apk add linux-lts-dev"),
    ("ID=alpine VERSION_ID=3.20.3", "6.6.58-0-virt", "sudo apk add linux-virt-dev"),
]

#: Kernels that are not the distribution's own, or whose package is not certain.
UNNAMED = [
    (f"{UBUNTU} VERSION_ID=22.04", "5.15.153.1-microsoft-standard-WSL2"),
    (DEBIAN, "6.6.36.6-microsoft-standard-WSL2"),
    ("ID=arch", "5.15.153.1-microsoft-standard-WSL2"),
    (DEBIAN, "5.14.0-427.22.1.el9_4.x86_64"),
    (DEBIAN, "6.18.44-custom"),
    (DEBIAN, "6.18.44-custom-amd64"),
    (DEBIAN, "6.8.0-45-generic"),
    (f"{DEBIAN} VERSION_ID=12", "6.12.117+deb13-amd64"),
    (f"{DEBIAN} VERSION_ID=13", RELEASE),
    (f"{DEBIAN} VERSION_ID=11", "6.8.12-4-pve"),
    (f"{DEBIAN} VERSION_ID=12", "5.15.35-1-pve"),
    (UBUNTU, RELEASE),
    (UBUNTU, "6.8.12-4-pve"),
    (UBUNTU, "6.11.0-061100-generic"),
    (f"{UBUNTU} VERSION_ID=20.04", "6.8.0-45-generic"),
    (FEDORA, "6.8.0-45-generic"),
    (f"{FEDORA} VERSION_ID=40", "6.11.4-301.fc41.x86_64"),
    (FEDORA, "6.12.9-201.fsync.fc41.x86_64"),
    (FEDORA, "6.13.0-vanilla+"),
    (f"{ROCKY} VERSION_ID=8.9", "5.14.0-427.el9.x86_64"),
    (f"{ROCKY} VERSION_ID=9.4", "5.15.0-206.153.7.el9uek.x86_64"),
    (f"{ROCKY} VERSION_ID=9.5", "6.6.60-1.el9.elrepo.x86_64"),
    ('ID="amzn" ID_LIKE="fedora" VERSION_ID=2023', "6.12.40-63.114.amzn2023.x86_64"),
    ('ID="amzn" ID_LIKE="fedora" VERSION_ID=2023', "5.10.227-219.884.amzn2.x86_64"),
    (f"{DEBIAN} VERSION_ID=12", "5.10.227-219.884.amzn2.x86_64"),
    (f"{DEBIAN} VERSION_ID=12", "6.12.8-1-liquorix-amd64"),
    (f"{DEBIAN} VERSION_ID=13", "6.14.8-2-bpo12-pve"),
    (f"{UBUNTU} VERSION_ID=24.04", "6.13.0-061300rc3-generic"),
    ("ID=endless ID_LIKE=debian VERSION_ID=6", "6.5.0-10-generic"),
    ('ID="almalinux" ID_LIKE="rhel centos fedora" VERSION_ID=10.0', "6.12.0-55.9.1.el10_0.x86_64_v2"),
    ('ID=nobara ID_LIKE="rhel centos fedora" VERSION_ID=41', "6.12.9-204.nobara.fc41.x86_64"),
    ("ID=arch", "6.6.52.arch1-rt43-1-rt"),
    ("ID=artix ID_LIKE=arch", "6.11.5-artix1-1"),
    ("ID=cos", "6.6.97+"),
    (RHCOS, "6.11.4-301.fc41.x86_64"),
    ("ID=arch", "6.18.40-1-cachyos-lts"),
    ("ID=arch", "6.12.4-1-MANJARO"),
    ("ID=arch", "6.11.5-1-custom"),
    ("ID=arch", "6.11.5-xanmod1"),
    (CACHYOS, "6.12.1-2-cachyos-mine"),
    (MANJARO, "6.11.5-arch1-1"),
    (MANJARO, "6.6.10-1-mine-MANJARO"),
    (MANJARO, "6.6.10-1-MANJARO-ARM"),
    ("ID=steamos ID_LIKE=arch", "6.1.52-valve16-1-neptune-61"),
    (f"{LEAP} VERSION_ID=15.5", "6.4.0-150600.23-default"),
    (LEAP, "6.4.0-mine"),
    (TUMBLEWEED, "6.11.3-1.g1a2b3c4-default"),
    ("ID=alpine", "6.6.58-0-mine"),
    ("ID=alpine", RELEASE),
    ("ID=nixos", "6.6.58"),
    ("ID=gentoo", "6.6.58-gentoo"),
    ("", "6.6.58"),
]


def become(host: Host, os_release: str, release: str) -> None:
    """That distribution, with that kernel but no headers."""
    fields = os_release.replace(" VERSION_ID", "\nVERSION_ID").replace(" ID_LIKE", "\nID_LIKE")
    host.write("etc/os-release", f'NAME="some"\n{fields}\n'.replace(" VARIANT_ID", "\nVARIANT_ID"))
    host.be(release=release)
    host.remove("usr/src")
    for link in ("build", "source"):
        host.remove(f"lib/modules/{RELEASE}/{link}")


@pytest.mark.parametrize(("os_release", "release", "fix"), NAMED)
def test_the_package_of_a_distributions_own_kernel_is_named(
    host: Host, os_release: str, release: str, fix: str
) -> None:
    become(host, os_release, release)
    detail = (
        "no kernel headers, which BCC needs to compile (this msrtrace came without the compiled BPF program): "
        f"/lib/modules/{release}/build/include/linux/kconfig.h does not exist"
    )
    assert host.check("headers") == Check("headers", FAILED, detail, fix)
    assert obstacle(host.machine) == f"{detail}: {fix}"


@pytest.mark.parametrize(("os_release", "release"), UNNAMED)
def test_no_package_is_named_for_another_kernel(host: Host, os_release: str, release: str) -> None:
    become(host, os_release, release)
    assert install_headers(host.machine) == ""
    check = host.check("headers")
    assert check.state is FAILED
    assert f"the headers of kernel {release} (those of any kernel will do)" in str(check.fix)
    assert "BCC_KERNEL_SOURCE" in str(check.fix)


def test_a_kernel_built_by_its_user(host: Host) -> None:
    become(host, DEBIAN, "6.18.44-custom")
    check = host.check("headers")
    assert check.detail.endswith("; and that kernel is not known to be one of some's")
    assert check.fix == (
        "install the headers of kernel 6.18.44-custom (those of any kernel will do), or set BCC_KERNEL_SOURCE to them"
    )


def test_a_kernel_of_wsl2_has_no_package(host: Host) -> None:
    become(host, UBUNTU, "5.15.153.1-microsoft-standard-WSL2")
    assert host.check("headers").fix == (
        "sudo modprobe kheaders, if the kernel carries its headers; else set BCC_KERNEL_SOURCE to its prepared "
        "sources, or to the headers of kernel 5.15.153.1-microsoft-standard-WSL2 (those of any kernel will do)"
    )


OF_RHEL = "5.14.0-427.22.1.el9_4.x86_64"
MOUNT = (
    "mount the headers of the host (-v /lib/modules:/lib/modules:ro -v /usr/src:/usr/src:ro); or set "
    f"BCC_KERNEL_SOURCE to the headers of kernel {OF_RHEL} (those of any kernel will do)"
)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (".dockerenv", ""),
        ("run/.containerenv", ""),
        ("run/systemd/container", "lxc"),
        ("proc/1/cgroup", "0::/kubepods.slice/kubepods-burstable.slice/cri-containerd-1f.scope\n"),
        ("proc/self/cgroup", "12:cpuset:/docker/0a1b\n"),
        ("proc/self/mounts", "overlay / overlay rw,lowerdir=/var/lib/containerd/1 0 0\nproc /proc proc rw 0 0\n"),
    ],
)
def test_in_a_container_the_headers_are_the_hosts(host: Host, file: str, content: str) -> None:
    become(host, DEBIAN, OF_RHEL)
    host.write(file, content)
    assert host.found("headers") == (FAILED, MOUNT)


@pytest.mark.parametrize("os_release", [f"{DEBIAN} VERSION_ID=12", UBUNTU])
def test_a_container_of_a_proxmox_host_has_no_package_of_its_kernel(host: Host, os_release: str) -> None:
    become(host, os_release, "6.8.12-4-pve")
    host.write("run/systemd/container", "lxc")
    assert str(host.check("headers").fix).startswith("mount the headers of the host (")


def test_the_kernel_of_another_distribution_looks_like_a_container(host: Host) -> None:
    become(host, DEBIAN, OF_RHEL)
    assert host.found("headers") == (FAILED, f"if this is a container, {MOUNT}")


def test_os_release_may_be_in_usr_lib_alone(host: Host) -> None:
    become(host, DEBIAN, RELEASE)
    host.remove("etc/os-release")
    host.write("usr/lib/os-release", "ID=debian\n")
    assert distribution(host.machine) == "debian"
    assert host.found("headers") == (FAILED, f"sudo apt-get install linux-headers-{RELEASE}")


@pytest.mark.parametrize(
    ("os_release", "bcc", "library"),
    [
        (DEBIAN, "sudo apt-get install python3-bpfcc", "sudo apt-get install libbpfcc"),
        (UBUNTU, "sudo apt-get install python3-bpfcc", "sudo apt-get install libbpfcc"),
        (ROCKY, "sudo dnf install python3-bcc", "sudo dnf install bcc"),
        (SILVERBLUE, "sudo rpm-ostree install python3-bcc, and reboot", "sudo rpm-ostree install bcc, and reboot"),
        (RHCOS, "", ""),
        (CACHYOS, "sudo pacman -S python-bcc", "sudo pacman -S bcc"),
        (TUMBLEWEED, "sudo zypper install python3-bcc", "sudo zypper install libbcc0"),
        (
            MICROOS,
            "sudo transactional-update pkg install python3-bcc, and reboot",
            "sudo transactional-update pkg install libbcc0, and reboot",
        ),
        ("ID=nixos", "", ""),
        ("ID=steamos ID_LIKE=arch", "", ""),
    ],
)
def test_packages_of_bcc(host: Host, os_release: str, bcc: str, library: str) -> None:
    become(host, os_release, RELEASE)
    assert (install_bcc(host.machine), install_library(host.machine)) == (bcc, library)


def test_an_image_of_any_edition_of_fedora(host: Host) -> None:
    become(host, f"{FEDORA} VERSION_ID=41", "6.11.4-301.fc41.x86_64")
    host.write("run/ostree-booted")
    assert str(host.check("headers").fix).startswith("sudo rpm-ostree install kernel-devel-6.11.4")


def test_a_transactional_server(host: Host) -> None:
    become(host, f"{SLES} VERSION_ID=15.6", "6.4.0-150600.23.25-default")
    host.write("proc/self/mounts", "/dev/vda2 / btrfs ro,relatime 0 0\n")
    host.write("usr/sbin/transactional-update")
    assert str(host.check("headers").fix).startswith("sudo transactional-update pkg install kernel-default-devel=6.4.0")
