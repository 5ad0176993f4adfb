# SPDX-License-Identifier: GPL-2.0-or-later
"""The root disk of each emulated host, and what it boots from."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import direct
from cache import HERE, cached, digest, sh
from hosts import AMD, INTEL, Host, kernel, merge_lib, userland, vmlinuz

#: Modules for the root disk and for the boot medium; what they depend on comes along.
ROOT_MODULES = ["kvm_intel", "kvm_amd", "e1000"]
SYSTEMD_MODULES = ["autofs4", "binfmt_misc", "overlay"]
BOOT_MODULES = ["ata_piix", "sd_mod", "ext4"]
#: What every emulated host's kernel is told; each emulator adds what its clocks need.
KERNEL_OPTIONS = (
    "console=ttyS0,115200 loglevel=5 tsc=reliable no_timer_check cryptomgr.notests mitigations=off panic=0 "
    "audit=0 selinux=0 apparmor=0"
)
# One cylinder of the geometry that Bochs assumes for a flat image: 16 heads of 63 sectors.
CYLINDER = 16 * 63 * 512


@dataclass(frozen=True)
class Image:
    """What an emulator boots: a root disk, and a boot medium or the kernel and initrd on it."""

    disk: Path
    iso: Path
    kernel: Path
    initrd: Path
    release: str  # as `uname -r` prints it


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


def image(host: Host, *, packed: bool = False, kind: str = "own") -> Image:
    """The root disk and boot medium of HOST, built unless they are in the cache.

    Modules built here are none of it: a run that needs one is sent it (payload.py), and one that does not has not to
    wait until it is built.

    :param packed: with the kernel as Debian packed it
    :param kind: of its userland
    """
    tree, base = kernel(host), userland(host, kind)
    release = host.release
    sources = [HERE / name for name in ("disks.py", "direct.py", "enter.S")]
    guest = sorted(file for file in (HERE / "guest").rglob("*") if file.is_file())

    def make(work: Path) -> None:
        make_disk(host, base, tree, work / "root.img", kind)

    name = host.disk if kind == "own" else f"{host.disk}-{kind}"
    disk = cached(f"image-{name}", [base.parent.name, tree.name, *sources, *guest], make) / "root.img"
    starter = HERE / "guest/initramfs-init"
    media = cached(f"media-{host.disk}", [tree.name, *sources, starter], lambda work: make_media(tree, release, work))
    boot = "packed" if packed else "boot"
    return Image(disk, media / f"{boot}.iso", media / f"{boot}.vmlinuz", media / "initrd", release)


def make_disk(host: Host, base: Path, tree: Path, disk: Path, kind: str) -> None:
    """The root disk: userland, the kernel's headers if any, the few modules needed, both vendors' also without BTF."""
    root, release = disk.parent / "root", host.release
    sh(["cp", "-al", base, root])
    merge_lib(root)
    modules = root / "usr/lib/modules" / release
    wanted = [*ROOT_MODULES, *BOOT_MODULES, *(SYSTEMD_MODULES if kind != "own" else [])]
    for file in module_files(tree, release, wanted):
        relative = file.relative_to(tree / "lib/modules" / release)
        unpacked_copy(file, modules / relative.with_name(relative.name.removesuffix(".xz")))
    for listing in (tree / "lib/modules" / release).glob("modules.[ob]*"):
        if not listing.name.endswith((".bin", ".alias")):
            shutil.copy(listing, modules)
    sh(["depmod", "-b", root, release])
    if kind != "fresh" and (tree / "usr/src").exists():
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
    for script in ("kvm-module", "kvmhost-network", "kvmhost-end"):
        shutil.copy(HERE / "guest" / script, root / "usr/local/sbin")
    if kind == "own":
        shutil.copy(HERE / "guest/init", root / "usr/local/sbin")
        make_ext4(root, disk, spare=256 << 20)
    else:
        for file in (HERE / "guest/systemd").rglob("*"):
            if file.is_file():
                target = root / file.relative_to(HERE / "guest/systemd")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
        set_up_systemd(root, digest(host.disk, kind))
        make_ext4(root, disk, spare=4 << 30)
    shutil.rmtree(root)


#: Units that an emulated host has no use for: consoles, jobs of the night, hardware that it lacks.
MASKED = [
    *("serial-getty@ttyS0.service", "getty@tty1.service", "getty-static.service"),
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer"),
    *("systemd-pstore.service", "systemd-hwdb-update.service", "e2scrub_reap.service"),
]


def set_up_systemd(root: Path, identity: str) -> None:
    """What an installer would do in the tree ROOT, and what starts the run's command."""
    system = root / "etc/systemd/system"
    for unit in MASKED:
        (system / unit).unlink(missing_ok=True)
        (system / unit).symlink_to("/dev/null")
    sh(["chroot", root, "systemctl", "enable", "kvmhost-module.service", "kvmhost-command.service"])
    for name, text in {"machine-id": f"{identity * 3:.32}\n", "fstab": "", "apt/sources.list": ""}.items():
        (root / "etc" / name).unlink(missing_ok=True)  # one file with that of the userland
        (root / "etc" / name).write_text(text)
    (root / "var/log/journal").mkdir(exist_ok=True)  # so it outlives a reboot
    for directory in ("etc", "var"):
        (root / directory / ".updated").touch()  # else ldconfig and others run at the first boot, as after an upgrade


def make_ext4(root: Path, disk: Path, spare: int) -> None:
    """An ext4 image of the tree ROOT, with a quarter more room and SPARE bytes, which take no space until written."""
    used = int(sh(["du", "-s", "--block-size=1", root]).split()[0])
    size = (used * 5 // 4 + spare) // CYLINDER * CYLINDER
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
