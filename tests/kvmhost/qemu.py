# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU, whose software CPU has SVM: Debian 13's, unpacked beside the machine's own packages with its libraries.

Debian 12's QEMU 7.2 runs hosts with one CPU as well. With several, 6.12 died there in two boots of seven of what is
rare in this one: see `_STALE`.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from apt import Suite
from cache import cached, sh
from clock import tsc_khz
from disks import KERNEL_OPTIONS, Image
from emulator import GUEST_MAC, Job

SUITE = Suite("trixie")
PACKAGE = "qemu-system-x86"
LOADER = "ld-linux-x86-64.so.2"
PROGRAM = "qemu-system-x86_64"
#: The BIOS, the code that hands over to a kernel given with -kernel, and what a software CPU's APIC asks for.
DATA = ["seabios/bios-256k.bin", "qemu/linuxboot_dma.bin", "qemu/kvmvapic.bin"]
CPU = "EPYC,+svm,+npt"
#: The same with IBPB, which QEMU does not emulate, and without all else that it does not: guests may only write
#: PRED_CMD, so the one call for it (from 6.12 on) treats reads and writes differently, as no other does.
WITH_IBPB = f"{CPU},-fxsr-opt,-misalignsse,-nrip-save,-osvw,-topoext,-xsavec,x-force-features=on,+ibpb"

#: A kernel that died of an int3 where memory has another byte. It puts one there while it changes code, and QEMU drops
#: what it translated of that code before it writes (notdirty_write(), accel/tcg/cputlb.c): a CPU that translates it in
#: between keeps the int3 for good. What follows < is where execution would go on.
_STALE = re.compile(
    r"\bint3: 0000 \[#1\](?:(?!\bCode:).)*\bCode: (?:[0-9a-f]{2} )*(?!cc)[0-9a-f]{2} <[0-9a-f]{2}>", re.S
)


@dataclass(frozen=True)
class Qemu:
    """A QEMU to run: the directory with the program, its libraries, their loader, and its data files."""

    directory: Path

    @property
    def warns_at_boot(self) -> bool:
        """No: see Emulator."""
        return False

    def erred(self, log: str) -> bool:
        """See Emulator: whether a CPU executed what was overwritten before."""
        return bool(_STALE.search(log))

    def command(self, job: Job, image: Image, work: Path, terminal: str | None) -> list[str]:
        """See Emulator. Disks are where Bochs has them; the kernel needs no boot loader."""
        here = self.directory
        options = KERNEL_OPTIONS
        if job.count_instructions:
            # Each instruction takes a nanosecond of all clocks, and so does a tick of the TSC; idle time takes none.
            accelerator = ["-accel", "tcg", "-icount", f"shift=0,sleep={'on' if job.real_time else 'off'}"]
            options += " tsc_early_khz=1000000"
        else:
            # The TSC is that of this machine. A guest's kernel that measured it on a busy one would be far off.
            accelerator = ["-accel", "tcg,thread=multi"]
            options += f" tsc_early_khz={tsc_khz()}"
        command = [f"{here}/{LOADER}", "--library-path", f"{here}", f"{here}/{PROGRAM}", "-L", f"{here}"]
        command += ["-nodefaults", "-display", "none", "-vga", "none"]
        if not job.reboots:
            command += ["-no-reboot"]
        command += [*accelerator, "-cpu", job.cpu_model or CPU, "-smp", f"{job.cpus}", "-m", f"{job.memory}"]
        command += ["-kernel", f"{image.kernel}", "-initrd", f"{image.initrd}", "-append", options]
        disks = [
            f"file={image.disk},index=0,snapshot=on",
            f"file={work}/sent.img,index=1",
            f"file={work}/back.img,index=3",
        ]
        for disk in disks:
            command += ["-drive", f"{disk},if=ide,media=disk,format=raw"]
        command += ["-serial", f"file:{work}/kernel.log"]
        command += ["-serial", terminal or f"file:{work}/command.log"]
        if job.forward:
            outside, inside = job.forward
            command += ["-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{outside}-:{inside}"]
            command += ["-device", f"e1000,netdev=net,mac={GUEST_MAC},romfile="]
        return command


def qemu() -> Qemu:
    """The QEMU for hosts with an AMD CPU."""

    def make(work: Path) -> None:
        tree = work / "tree"
        # As for an empty machine, so that nothing depends on which libraries this one has.
        SUITE.unpack(SUITE.lacking([PACKAGE]), tree, work / "downloads")
        loader, libraries = tree / "usr/lib64" / LOADER, tree / "usr/lib/x86_64-linux-gnu"
        program = tree / "usr/bin" / PROGRAM
        listed = sh([loader, "--library-path", libraries, "--list", program])
        needed = [Path(file) for file in re.findall(rf"=> ({libraries}/\S+)", listed)]
        for file in [loader, program, *needed, *(tree / "usr/share" / name for name in DATA)]:
            shutil.copy(file, work)
        shutil.rmtree(tree)
        shutil.rmtree(work / "downloads")

    return Qemu(cached("qemu", [SUITE.candidate(PACKAGE), DATA], make))
