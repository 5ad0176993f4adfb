# SPDX-License-Identifier: GPL-2.0-or-later
"""Bochs, whose CPU has VMX: built from Debian's source without its debugger, or, where that fails, Debian's binary."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from apt import Suite
from cache import BUILD, UNUSED_SECONDS, RigError, cached, locked, retried, say, sh
from disks import Image
from emulator import GUEST_MAC, Job

# trixie's 3.0 first: the others' upstream tarballs were missing from the archive when this was written.
SOURCE_SUITES = [Suite(name) for name in ("trixie", "sid", "bookworm")]
BINARY_SUITE = Suite("bookworm")
CONFIGURE = [
    *("--enable-x86-64", "--enable-cpu-level=6", "--enable-vmx=2", "--enable-svm"),
    *("--enable-all-optimizations", "--enable-handlers-chaining", "--enable-avx", "--enable-evex"),
    *("--enable-pci", "--enable-e1000", "--disable-docbook", "--with-nogui"),
    *("CFLAGS=-O2", "CXXFLAGS=-O2"),
]

BOCHSRC = """\
memory: guest={memory}, host={memory}
romimage: file={bochs.bios}
vgaromimage: file={bochs.vgabios}
{display}
cpu: model={cpu}, count={cpus}, ips=100000000, reset_on_triple_fault=0, ignore_bad_msrs=1
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15
ata0-master: type=disk, path={image.disk}, mode=volatile, journal={work}/root.redolog
ata0-slave: type=disk, path={work}/sent.img, mode=flat
ata1-master: type=cdrom, path={image.iso}, status=inserted
ata1-slave: type=disk, path={work}/back.img, mode=flat
boot: cdrom
com1: enabled=1, mode=file, dev={work}/kernel.log
com2: enabled=1, {com2}
clock: sync={clock}, time0=utc
log: {work}/emulator.log
panic: action=fatal
error: action=report
info: action=ignore
debug: action=ignore
"""


@dataclass(frozen=True)
class Bochs:
    """A Bochs to run: its program, its BIOS images, and whether the debugger is compiled in."""

    program: Path
    bios: Path
    vgabios: Path
    debugger: bool

    @property
    def cpu_model(self) -> str:
        """The CPU model to emulate. Bochs 2.7 has a Skylake whose XSAVE sizes kernels warn of, and 7.x panics on it."""
        return "corei7_haswell_4770" if self.debugger else "corei7_skylake_x"

    @property
    def warns_at_boot(self) -> bool:
        """With Debian's Bochs: kernels from 6.12 on warn of its CPUs' topology."""
        return self.debugger

    def erred(self, log: str) -> bool:
        """No: see Emulator."""
        return False

    def command(self, job: Job, image: Image, work: Path, terminal: str | None) -> list[str]:
        """See Emulator. The TSC counts instructions in any case."""
        (work / "bochsrc").write_text(self._configuration(job, image, work, terminal))
        command = [str(self.program), "-q", "-f", f"{work}/bochsrc"]
        if self.debugger:
            (work / "go").write_text("c\n")
            command = ["script", "-qec", shlex.join([*command, "-rc", f"{work}/go"]), "/dev/null"]
        return command

    def _configuration(self, job: Job, image: Image, work: Path, terminal: str | None) -> str:
        text = BOCHSRC.format(
            memory=job.memory,
            bochs=self,
            display="config_interface: textconfig\ndisplay_library: " + ("term" if self.debugger else "nogui"),
            cpu=job.cpu_model or self.cpu_model,
            cpus=job.cpus,
            image=image,
            work=work,
            com2=f"mode=term, dev={terminal}" if terminal else f"mode=file, dev={work}/command.log",
            clock="slowdown" if job.real_time else "none",
        )
        if job.forward:
            outside, inside = job.forward
            (work / "slirp.conf").write_text(f"# slirp config\nhostfwd = tcp:127.0.0.1:{outside}-:{inside}\n")
            card = f"card=0, enabled=1, mac={GUEST_MAC}, ethmod=slirp"
            text += f"e1000: {card}, script={work}/slirp.conf\n"
        return text


def bochs(cpus: int = 1) -> Bochs:
    """The fastest Bochs that can be had here for a host of CPUS processors.

    MSRTRACE_BOCHS=binary takes Debian's; MSRTRACE_BOCHS=source builds though that failed in the last day.
    """
    wanted = os.environ.get("MSRTRACE_BOCHS", "")
    if wanted not in ("", "source", "binary"):
        raise RigError(f"MSRTRACE_BOCHS is '{wanted}'; it can be `source` or `binary`")
    smp = cpus > 1
    failed = BUILD / ("bochs-smp-not-built" if smp else "bochs-not-built")
    if wanted == "source" or not (wanted == "binary" or _lately(failed)):
        for suite in SOURCE_SUITES:
            try:
                built = from_source(suite, smp=smp)
            except RigError as error:
                say(f"no Bochs from the source of {suite.name}: {str(error).splitlines()[-1]}")
                continue
            failed.unlink(missing_ok=True)
            return built
        failed.touch()
    say("using Debian's Bochs binary, which is 3 times slower")
    return from_binary()


def _lately(failed: Path) -> bool:
    """Whether a build failed in the last day: FAILED is the file that says so."""
    return failed.exists() and time.time() - failed.stat().st_mtime < UNUSED_SECONDS


def bios_images(suite: Suite, work: Path) -> None:
    """Put the BIOS and VGA BIOS of Debian's packages into WORK: the source tarball has neither."""
    suite.unpack(["bochsbios", "vgabios"], work / "packages", work / "downloads")
    shutil.copy(work / "packages/usr/share/bochs/BIOS-bochs-latest", work / "bios")
    shutil.copy(work / "packages/usr/share/vgabios/vgabios.bin", work / "vgabios")
    shutil.rmtree(work / "packages")
    shutil.rmtree(work / "downloads")


def from_source(suite: Suite, *, smp: bool = False) -> Bochs:
    """Bochs compiled from the upstream tarball that SUITE's source package names; SMP: for more than one CPU."""
    configure = [*CONFIGURE, *(["--enable-smp"] if smp else [])]
    uri, checksum = suite.upstream_tarball("bochs")

    def make(work: Path) -> None:
        tarball, source = work / "source.tar", work / "source"
        # One attempt is enough when the archive says that it lacks the file.
        retried(f"download of {Path(uri).name}", lambda: fetch(uri, tarball, checksum), attempts=2)
        source.mkdir()
        sh(["tar", "-x", "-f", tarball, "-C", source, "--strip-components=1"])
        sh(["./configure", *configure], cwd=source, log=work / "log")
        with locked("compiler"):
            sh(["make", f"-j{os.cpu_count()}"], cwd=source, log=work / "log")
        shutil.copy(source / "bochs", work / "bochs")
        bios_images(suite, work)
        shutil.rmtree(source)
        tarball.unlink()

    made = cached("bochs-smp" if smp else "bochs", [checksum, configure], make)
    return Bochs(made / "bochs", made / "bios", made / "vgabios", debugger=False)


def fetch(uri: str, file: Path, checksum: str) -> None:
    """Download URI to FILE and check it against CHECKSUM, as apt does."""
    sh(["/usr/lib/apt/apt-helper", "-o", "APT::Sandbox::User=root", "download-file", uri, file, checksum])


def from_binary() -> Bochs:
    """Debian's Bochs, with the terminal display it cannot do without and the libraries that it needs."""

    def make(work: Path) -> None:
        sh(["apt-get", "install", "-y", "--no-install-recommends", "bochs", "bochs-term"], log=work / "log")
        bios_images(BINARY_SUITE, work)

    made = cached("bochs-binary", [BINARY_SUITE.candidate("bochs")], make)
    program = shutil.which("bochs")
    if not program:
        shutil.rmtree(made)
        raise RigError("Debian's package bochs is not installed any more; run the command again")
    return Bochs(Path(program), made / "bios", made / "vgabios", debugger=True)
