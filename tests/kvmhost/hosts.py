# SPDX-License-Identifier: GPL-2.0-or-later
"""The hosts that can be emulated: their root trees, kernels and modules. disks.py makes disks of these."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from apt import Suite
from cache import HERE, RigError, cached, sh

#: What the root file system holds beside the suite's essential packages: without an init, with systemd, and with
#: systemd and nothing that msrtrace needs, as it is before a package is installed.
PACKAGES = ["python3-bpfcc", "mount", "kmod", "procps", "iproute2", "bpftool", "libcap2-bin"]
FRESH = ["systemd-sysv", "dbus", "udev", "kmod", "procps", "iproute2", "python3", "curl", "openssl", "bpftool"]
USERLANDS = {"own": PACKAGES, "systemd": [*PACKAGES, *FRESH], "fresh": FRESH}
#: Left out where tests/kvmhost/guest/init is all that starts, and dpkg is not asked.
DOCUMENTATION = ["doc", "man", "locale", "info", "lintian"]


@dataclass(frozen=True)
class Vendor:
    """A vendor's CPUs, and the variants of its KVM module: what Debian ships, and what the patch makes of it.

    The patch is "KVM: VMX: Skip filter updates for MSRs that KVM is already intercepting", in 6.0 and later stable
    kernels. SVM's code never got it.
    """

    module: str
    stock: str  # which variant Debian ships
    built: str  # the other one, made from the same source (see Host.built)

    @property
    def file(self) -> str:
        """What the module's file is called."""
        return f"{self.module.replace('_', '-')}.ko"


INTEL = Vendor("kvm_intel", stock="patched", built="unpatched")
AMD = Vendor("kvm_amd", stock="unpatched", built="patched")


@dataclass(frozen=True)
class Host:
    """An emulated host: the kernel of one suite under the userland of another, on a vendor's CPU."""

    disk: str  # the name of its image, which hosts of both vendors boot
    userland: Suite
    kernel: Suite
    vendor: Vendor = INTEL
    built: bool = False  # the variant of the module that Debian does not ship is built, and sent with a run
    pinned: str | None = None  # the kernel release, where it is not the newest: such have no headers in the archive

    @property
    def name(self) -> str:
        """What `--host` calls it."""
        return self.disk if self.vendor is INTEL else f"{self.disk}-amd"

    @property
    def variants(self) -> list[str]:
        """The variants of its module that can be loaded, the stock one first."""
        return [self.vendor.stock, *([self.vendor.built] if self.built else []), "nobtf"]

    @property
    def release(self) -> str:
        """The kernel release as `uname -r` prints it: that of the newest kernel in the suite, unless it is pinned."""
        if self.pinned:
            return self.pinned
        for package in self.kernel.depends("linux-image-amd64"):
            found = re.fullmatch(r"linux-image-(\d.*-amd64)", package)
            if found:
                return found[1]
        raise RigError(f"linux-image-amd64 of Debian {self.kernel.name} depends on no kernel image")

    def kernel_packages(self) -> list[str]:
        """The packages that hold the kernel, its modules (7.x has them apart) and, if there are any, its headers."""
        release = self.release
        image = [f"linux-image-{release}"]
        split = [f"linux-{part}-{release}" for part in ("binary", "modules")]
        if set(split) <= set(self.kernel.depends(image[0])):
            image = split
        if self.pinned:
            return image
        headers = f"linux-headers-{release}"
        common = [p for p in self.kernel.depends(headers) if re.fullmatch(r"linux-headers-.*-common", p)]
        return [*image, headers, *common]


BACKPORTED = "6.17.13+deb13-amd64"  # of the kernels that changed KVM's MSR code, one that no suite has as its newest
HOSTS = {
    host.name: host
    for host in (
        Host("bookworm", Suite("bookworm"), Suite("bookworm"), built=True),
        Host("trixie", Suite("trixie"), Suite("trixie"), built=True),
        Host("sid", Suite("sid"), Suite("sid")),
        Host("filter-only", Suite("bookworm"), Suite("bullseye")),
        Host("backports", Suite("trixie"), Suite("trixie-backports"), pinned=BACKPORTED),
        Host("bookworm", Suite("bookworm"), Suite("bookworm"), AMD, built=True),
        Host("trixie", Suite("trixie"), Suite("trixie"), AMD, built=True),
        Host("sid", Suite("sid"), Suite("sid"), AMD),
        Host("filter-only", Suite("bookworm"), Suite("bullseye"), AMD),
        Host("backports", Suite("trixie"), Suite("trixie-backports"), AMD, pinned=BACKPORTED),
    )
}


def mmdebstrap(suite: Suite, packages: list[str], target: Path, *, whole: bool = False) -> None:
    """A root tree of SUITE with PACKAGES below TARGET; unless it is to be WHOLE, without documentation."""
    suite.refresh()
    options = ["--aptopt=Acquire::Retries 4", "--aptopt=APT::Sandbox::User root"]
    if not whole:
        options += [f"--dpkgopt=path-exclude=/usr/share/{directory}/*" for directory in DOCUMENTATION]
    command = ["mmdebstrap", "--mode=root", "--variant=apt", "--format=directory", *options]
    include = f"--include={','.join(packages)}"
    sh([*command, include, suite.name, target, *suite.sources()], log=target.parent / "mmdebstrap.log")


def userland(host: Host, kind: str = "own") -> Path:
    """The root tree without a kernel, with the packages of USERLANDS[KIND]: shared by the hosts of one userland."""
    suite, packages = host.userland, USERLANDS[kind]

    def make(work: Path) -> None:
        root, whole = work / "root", kind != "own"
        mmdebstrap(suite, packages, root, whole=whole)
        if whole:
            forget_the_making(root)
        else:
            for spare in ("var/lib/apt/lists", "var/cache/apt", "usr/share/doc", "usr/share/locale"):
                shutil.rmtree(root / spare, ignore_errors=True)
        compile_python(root)

    telling = ["python3-bpfcc", "python3", "libc6", *(["systemd"] if kind != "own" else [])]
    versions = [suite.candidate(package) for package in telling]
    name = suite.name if kind == "own" else f"{suite.name}-{kind}"
    return cached(f"userland-{name}", [suite.name, packages, "bytecode", *versions], make) / "root"


def forget_the_making(root: Path) -> None:
    """Remove from the tree ROOT what mmdebstrap configured for itself, and the archive, which no guest can reach."""
    for file in ("etc/apt/apt.conf.d/99mmdebstrap", "etc/dpkg/dpkg.cfg.d/99mmdebstrap", "etc/apt/sources.list"):
        (root / file).unlink(missing_ok=True)
    for fetched in [*(root / "var/lib/apt/lists").iterdir(), *(root / "var/cache/apt").rglob("*")]:
        if fetched.is_file():
            fetched.unlink()


def compile_python(root: Path) -> None:
    """Make bytecode of all Python in the root tree ROOT: emulated, compiling the standard library takes 10 s a boot.

    Debian's packages do that when they are installed, but not where PYTHONDONTWRITEBYTECODE is set.
    """
    folders = [f"/{path.relative_to(root)}" for path in sorted((root / "usr/lib").glob("python3*"))]
    # Some files are of older Pythons, and cannot be compiled.
    compiler = f"import compileall; [compileall.compile_dir(folder, quiet=2) for folder in {folders!r}]"
    sh(["chroot", root, "python3", "-c", compiler])


def kernel(host: Host) -> Path:
    """The unpacked kernel, modules and, if there are any, headers of HOST, as Debian ships them."""
    packages = host.kernel_packages()

    def make(work: Path) -> None:
        host.kernel.unpack(packages, work, work / "downloads")
        shutil.rmtree(work / "downloads")
        merge_lib(work)
        sh(["depmod", "-b", work, host.release])

    return cached(f"kernel-{host.kernel.name}", [packages, host.kernel.candidate(packages[0])], make)


def vmlinuz(tree: Path, release: str) -> Path:
    """The bootable kernel: in /boot, or since 7.x beside its modules."""
    old = tree / f"boot/vmlinuz-{release}"
    return old if old.exists() else tree / f"usr/lib/modules/{release}/vmlinuz"


def merge_lib(tree: Path) -> None:
    """Make TREE/lib a link to usr/lib, as on a running system, wherever the packages put their files."""
    old, new = tree / "lib", tree / "usr/lib"
    if old.is_dir() and not old.is_symlink():
        sh(["cp", "-a", f"{old}/.", new])
        shutil.rmtree(old)
    if not old.is_symlink():
        old.symlink_to("usr/lib")


def build_chroot(host: Host) -> Path:
    """A root tree of the kernel's own suite with its compiler, headers and source: for building its module."""
    suite = host.kernel
    series = re.match(r"\d+\.\d+", host.release)
    assert series
    packages = [
        "linux-headers-amd64",
        f"linux-source-{series[0]}",
        "dwarves",
        "make",
        "patch",
        "xz-utils",
        "zstd",
        "lz4",
    ]

    def make(work: Path) -> None:
        mmdebstrap(suite, packages, work / "root")

    return cached(f"buildroot-{suite.name}", [packages, suite.candidate(packages[1])], make) / "root"


#: What makes the other variant of a vendor's module: d895f28ed6da reverted, and the like of it for SVM.
DIFFS = {INTEL: "unpatch.diff", AMD: "skip-svm.diff"}


def other_module(host: Host) -> Path:
    """The variant of HOST's KVM module that Debian does not ship: same compiler, same source, with BTF."""
    file, diff = host.vendor.file, DIFFS[host.vendor]
    recipe = [HERE / diff, HERE / "build-module"]

    def make(work: Path) -> None:
        root = work / "root"
        sh(["cp", "-al", build_chroot(host), root])  # links: the build adds files and changes none
        for needed in recipe:
            shutil.copy(needed, root / "tmp")
        # The compressed kernel is where pahole finds the BTF that the module's is a split of.
        shutil.copy(vmlinuz(kernel(host), host.release), root / "tmp/vmlinuz")
        sh(["chroot", root, "/tmp/build-module", host.release, file, diff], log=work / "log")
        shutil.copy(root / "tmp" / file, work)
        shutil.rmtree(root)

    packages = host.kernel_packages()
    inputs = [host.release, host.kernel.candidate(packages[0]), *recipe]
    return cached(f"{host.vendor.built}-{host.name}", inputs, make) / file
