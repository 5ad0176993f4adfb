# SPDX-License-Identifier: GPL-2.0-or-later
"""The hosts that can be emulated, and the disk image and boot medium of each."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import direct
from apt import Suite
from cache import HERE, RigError, cached, sh

#: What the root file system holds beside the suite's essential packages.
PACKAGES = ["python3-bpfcc", "mount", "kmod", "procps", "iproute2", "bpftool", "libcap2-bin"]
#: Modules for the root disk and for the boot medium; what they depend on comes along.
ROOT_MODULES = ["kvm_intel", "kvm_amd", "e1000"]
BOOT_MODULES = ["ata_piix", "sd_mod", "ext4"]
#: What every emulated host's kernel is told; each emulator adds what its clocks need.
KERNEL_OPTIONS = (
    "console=ttyS0,115200 loglevel=5 tsc=reliable no_timer_check cryptomgr.notests mitigations=off panic=0 "
    "audit=0 selinux=0 apparmor=0"
)
# One cylinder of the geometry that Bochs assumes for a flat image: 16 heads of 63 sectors.
CYLINDER = 16 * 63 * 512


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


@dataclass(frozen=True)
class Image:
    """What an emulator boots: a root disk, and a boot medium or the kernel and initrd on it."""

    disk: Path
    iso: Path
    kernel: Path
    initrd: Path
    release: str  # as `uname -r` prints it


def mmdebstrap(suite: Suite, packages: list[str], target: Path, *options: str) -> None:
    """A root tree of SUITE with PACKAGES (and no documentation) below TARGET."""
    suite.refresh()
    aptopts = ["--aptopt=Acquire::Retries 4", "--aptopt=APT::Sandbox::User root"]
    excluded = [f"--dpkgopt=path-exclude=/usr/share/{d}/*" for d in ("doc", "man", "locale", "info", "lintian")]
    command = ["mmdebstrap", "--mode=root", "--variant=apt", "--format=directory", *aptopts, *excluded]
    include = f"--include={','.join(packages)}"
    sh(
        [*command, *options, include, suite.name, target, *suite.sources()],
        log=target.parent / "mmdebstrap.log",
    )


def userland(host: Host) -> Path:
    """The root tree without a kernel: shared by the hosts of one userland."""
    suite = host.userland

    def make(work: Path) -> None:
        mmdebstrap(suite, PACKAGES, work / "root")
        for spare in ("var/lib/apt/lists", "var/cache/apt", "usr/share/doc", "usr/share/locale"):
            shutil.rmtree(work / "root" / spare, ignore_errors=True)
        compile_python(work / "root")

    inputs = [suite.name, PACKAGES, "bytecode", *(suite.candidate(p) for p in ("python3-bpfcc", "python3", "libc6"))]
    return cached(f"userland-{suite.name}", inputs, make) / "root"


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


def module_files(tree: Path, release: str, modules: list[str]) -> list[Path]:
    """The files of MODULES and of what they need, in the order in which they load."""
    files: dict[Path, None] = {}
    for module in modules:
        for line in sh(["modprobe", "-d", tree, "-S", release, "--show-depends", module]).splitlines():
            if line.startswith("insmod "):
                files[Path(line.split()[1])] = None
    return list(files)


def unpacked_copy(module: Path, target: Path) -> None:
    """Copy a module to TARGET, uncompressed: the initramfs and insmod of old kernels read no .xz."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if module.suffix == ".xz":
        with target.open("wb") as out:
            subprocess.run(["xz", "-dc", module], stdout=out, check=True)
    else:
        shutil.copy(module, target)


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


def image(host: Host, *, packed: bool = False) -> Image:
    """The root disk and boot medium of HOST, built unless they are in the cache; PACKED: with the kernel as packed.

    Modules built here are none of it: a run that needs one is sent it (payload.py), and one that does not has not to
    wait until it is built.
    """
    guest = sorted((HERE / "guest").iterdir())
    tree, base = kernel(host), userland(host)
    release = host.release

    def make(work: Path) -> None:
        make_disk(host, base, tree, work / "root.img")
        make_media(tree, release, work)

    inputs = [base.parent.name, tree.name, *guest]
    inputs += [HERE / name for name in ("hosts.py", "direct.py", "enter.S")]
    built = cached(f"image-{host.disk}", inputs, make)
    boot = "packed" if packed else "boot"
    return Image(built / "root.img", built / f"{boot}.iso", built / f"{boot}.vmlinuz", built / "initrd", release)


def make_disk(host: Host, base: Path, tree: Path, disk: Path) -> None:
    """The root disk: userland, the kernel's headers if any, the few modules needed, both vendors' also without BTF."""
    root, release = disk.parent / "root", host.release
    sh(["cp", "-al", base, root])
    merge_lib(root)
    modules = root / "usr/lib/modules" / release
    for file in module_files(tree, release, [*ROOT_MODULES, *BOOT_MODULES]):
        relative = file.relative_to(tree / "lib/modules" / release)
        unpacked_copy(file, modules / relative.with_name(relative.name.removesuffix(".xz")))
    for listing in (tree / "lib/modules" / release).glob("modules.[ob]*"):
        if not listing.name.endswith((".bin", ".alias")):
            shutil.copy(listing, modules)
    sh(["depmod", "-b", root, release])
    if (tree / "usr/src").exists():
        sh(["cp", "-a", tree / "usr/src", root / "usr"])
        for link in ("build", "source"):  # BCC needs both: the headers are in two packages
            (modules / link).symlink_to((tree / "lib/modules" / release / link).readlink())
    for vendor in (INTEL, AMD):
        stock = modules / "kernel/arch/x86/kvm" / vendor.file
        with_btf, without = (modules / "msrtrace" / variant for variant in (vendor.stock, "nobtf"))
        for folder in (with_btf, without):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(stock, with_btf)
        sh(["objcopy", "--remove-section=.BTF", stock, without / vendor.file])
    for script in ("init", "kvm-module"):
        shutil.copy(HERE / "guest" / script, root / "usr/local/sbin")
    make_ext4(root, disk)
    shutil.rmtree(root)


def make_ext4(root: Path, disk: Path) -> None:
    """An ext4 image of the tree ROOT, with room to spare."""
    used = int(sh(["du", "-s", "--block-size=1", root]).split()[0])
    size = (used * 5 // 4 + (256 << 20)) // CYLINDER * CYLINDER
    with disk.open("wb") as file:
        file.truncate(size)
    sh(["mke2fs", "-q", "-t", "ext4", "-m", "0", "-O", "^has_journal", "-d", root, disk])


def make_media(tree: Path, release: str, work: Path) -> None:
    """The boot media: isolinux, the kernel, and an initramfs that finds the root disk.

    WORK/boot.iso has the kernel without its decompressor, WORK/packed.iso as Debian packed it. The same kernels are
    WORK/boot.vmlinuz and WORK/packed.vmlinuz, and the initramfs is WORK/initrd: for emulators that are given them.
    """
    medium, initramfs = work / "medium", work / "initramfs"
    (medium / "isolinux").mkdir(parents=True)
    (initramfs / "bin").mkdir(parents=True)
    shutil.copy(HERE / "guest/initramfs-init", initramfs / "init")
    shutil.copy("/usr/bin/busybox", initramfs / "bin")
    for index, file in enumerate(module_files(tree, release, BOOT_MODULES)):
        unpacked_copy(file, initramfs / "modules" / f"{index:02}-{file.name.removesuffix('.xz')}")
    cpio = f"cd {initramfs} && find . | LC_ALL=C sort | cpio -o -H newc --quiet -R 0:0 > {medium}/initrd"
    sh(["sh", "-c", cpio])
    configuration = (HERE / "guest/isolinux.cfg").read_text().format(options=KERNEL_OPTIONS)
    (medium / "isolinux/isolinux.cfg").write_text(configuration)
    shutil.copy("/usr/lib/ISOLINUX/isolinux.bin", medium / "isolinux")
    shutil.copy("/usr/lib/syslinux/modules/bios/ldlinux.c32", medium / "isolinux")
    boot = ["-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat", "-no-emul-boot", "-boot-load-size", "4"]
    iso = ["xorriso", "-as", "mkisofs", "-quiet", *boot, "-boot-info-table"]
    shutil.copy(vmlinuz(tree, release), medium / "vmlinuz")
    sh([*iso, "-o", work / "packed.iso", medium])
    (medium / "vmlinuz").rename(work / "packed.vmlinuz")
    direct.prepare(vmlinuz(tree, release), medium)
    sh([*iso, "-o", work / "boot.iso", medium])
    (medium / "vmlinuz").rename(work / "boot.vmlinuz")
    (medium / "initrd").rename(work / "initrd")
    shutil.rmtree(medium)
    shutil.rmtree(initramfs)
