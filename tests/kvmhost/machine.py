# SPDX-License-Identifier: GPL-2.0-or-later
"""One run of an emulated host: from power on to the exit status of its command."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import termios
import time
import tty
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from cache import BUILD, RigError, say, sh
from emulator import Bochs
from hosts import CYLINDER, Image

TIMED_OUT = 124  # as timeout(1) has it
#: What a guest's kernel log may not contain.
TROUBLE = re.compile(
    r"Kernel panic|WARNING: (CPU|possible)|BUG: |Oops: |general protection fault|Call Trace:|"
    r"rcu_\w+ (self-)?detected|soft lockup|hung_task|blocked for more than"
)
#: Where it starts, in dmesg and on the console.
USER_SPACE = re.compile(r"Run /init as init process|^kvmhost: up ", re.M)
POLL_SECONDS = 0.05
OUT_BYTES = 256 << 20  # room for /out: sparse until written

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
log: {work}/bochs.log
panic: action=fatal
error: action=report
info: action=ignore
debug: action=ignore
"""


@dataclass(frozen=True)
class Job:
    """What to run: `sent` maps names below /mnt in the guest to directories or files of this machine."""

    command: list[str]
    module: str = "patched"
    host: str = "bookworm"
    cpus: int = 1
    cpu_model: str | None = None
    memory: int = 2048
    forward: tuple[int, int] | None = None
    shell: bool = False
    sent: dict[str, Path] = field(default_factory=dict)
    out: Path | None = None
    timeout: float = 600
    keep_log: Path | None = None

    @property
    def real_time(self) -> bool:
        """Whether somebody outside watches: then idle time must pass as fast as theirs, not in a blink."""
        return self.shell or self.forward is not None


class Machine:
    """A powered-on host. The context manager ends Bochs and removes what the run left, however it ends."""

    def __init__(self, bochs: Bochs, image: Image, job: Job) -> None:
        self.bochs, self.image, self.job = bochs, image, job
        self.started = time.monotonic()
        self.boot_seconds: float | None = None
        (BUILD / "runs").mkdir(parents=True, exist_ok=True)
        self.work = Path(tempfile.mkdtemp(prefix=f"{job.host}-", dir=BUILD / "runs"))
        self.process: subprocess.Popen[bytes] | None = None
        self.console: int | None = None

    def __enter__(self) -> Machine:
        try:
            self._power_on()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.job.keep_log:
            shutil.copytree(
                self.work,
                self.job.keep_log,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns("*.img", "*.redolog*"),
            )
        shutil.rmtree(self.work, ignore_errors=True)

    def _settings(self) -> str:
        job = self.job
        values = {
            "MODULE": job.module,
            "VMXHOST": job.host,
            "FORWARD": "1" if job.forward else "",
            "SHELL_WANTED": "1" if job.shell else "",
        }
        return "".join(f"{key}={shlex.quote(value)}\n" for key, value in values.items())

    def _send(self) -> None:
        """Write the disk that the guest unpacks: a tar file, padded to whole cylinders."""
        (self.work / "settings").write_text(self._settings())
        (self.work / "command").write_text(f"exec {shlex.join(self.job.command)}\n")
        disk = self.work / "sent.img"
        with tarfile.open(disk, "w") as tar:
            for name in ("settings", "command"):
                tar.add(self.work / name, name)
            for name in ("in", "bin", "site", "modules"):
                source = self.job.sent.get(name)
                if source:
                    tar.add(source, name, filter=_owned_by_root)
                else:
                    tar.addfile(_directory(name))
        os.truncate(disk, -(-disk.stat().st_size // CYLINDER) * CYLINDER)
        with (self.work / "back.img").open("wb") as back:
            back.truncate(OUT_BYTES // CYLINDER * CYLINDER)

    def _configuration(self) -> str:
        job = self.job
        com2 = f"mode=file, dev={self.work}/command.log"
        if job.shell:
            self.console, terminal = pty.openpty()
            tty.setraw(terminal)
            com2 = f"mode=term, dev={os.ttyname(terminal)}"
        text = BOCHSRC.format(
            memory=job.memory,
            bochs=self.bochs,
            display="config_interface: textconfig\ndisplay_library: " + ("term" if self.bochs.debugger else "nogui"),
            cpu=job.cpu_model or self.bochs.cpu_model,
            cpus=job.cpus,
            image=self.image,
            work=self.work,
            com2=com2,
            clock="slowdown" if job.real_time else "none",
        )
        if job.forward:
            outside, inside = job.forward
            try:
                socket.create_server(("127.0.0.1", outside)).close()
            except OSError as error:
                raise RigError(f"cannot forward port {outside}: {error.strerror}") from None
            (self.work / "slirp.conf").write_text(f"# slirp config\nhostfwd = tcp:127.0.0.1:{outside}-:{inside}\n")
            card = "card=0, enabled=1, mac=52:54:00:12:34:56, ethmod=slirp"
            text += f"e1000: {card}, script={self.work}/slirp.conf\n"
        return text

    def _power_on(self) -> None:
        self._send()
        (self.work / "bochsrc").write_text(self._configuration())
        for name in ("kernel.log", "command.log"):
            (self.work / name).touch()
        command = [str(self.bochs.program), "-q", "-f", f"{self.work}/bochsrc"]
        if self.bochs.debugger:
            (self.work / "go").write_text("c\n")
            command = ["script", "-qec", shlex.join([*command, "-rc", f"{self.work}/go"]), "/dev/null"]
        with (self.work / "bochs.out").open("wb") as out:
            # Its own session, so that a Ctrl-C reaches this process first, which then ends it in order.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, show: Callable[[bytes], None]) -> int:
        """Let the host run to its end, giving its command's output to SHOW; the command's status, or 124."""
        assert self.process
        deadline = self.started + self.job.timeout
        with (
            (self.work / "command.log").open("rb") as output,
            (self.work / "kernel.log").open("rb") as kernel,
        ):
            log = ""
            while True:
                ended = self.process.poll() is not None
                log += kernel.read().decode(errors="replace")
                self._relay(output, show)
                if self.boot_seconds is None and "kvmhost: up " in log:
                    self.boot_seconds = time.monotonic() - self.started
                    say(f"{self.job.host}: Linux {self.image.release} up after {self.boot_seconds:.0f} s")
                # All that the guest sends back is on its disk then; its way through power-off is as long as a boot.
                if ended or "kvmhost: done" in log:
                    break
                if "Kernel panic" in log or "kvmhost: no root disk" in log:
                    time.sleep(1)  # let it print the trace
                    raise RigError(f"the guest's kernel died:\n{log + kernel.read().decode(errors='replace')}")
                if time.monotonic() > deadline:
                    say(f"{self.job.host}: timed out after {self.job.timeout:.0f} s")
                    return TIMED_OUT
        return self._collect(log)

    def _relay(self, output: BinaryIO, show: Callable[[bytes], None]) -> None:
        if self.console is None:
            time.sleep(POLL_SECONDS)
            show(output.read())
            return
        ready, _, _ = select.select([self.console, sys.stdin], [], [], POLL_SECONDS)
        if self.console in ready:
            show(os.read(self.console, 65536))
        if sys.stdin in ready:
            os.write(self.console, os.read(sys.stdin.fileno(), 1024))

    def _collect(self, log: str) -> int:
        """Take back what the guest left; the status of its command."""
        back = self.work / "back"
        try:
            back.mkdir()
            sh(["tar", "-x", "--no-same-owner", "-f", self.work / "back.img", "-C", back])
            status = int((back / "status").read_text())
        except (RigError, OSError, ValueError) as error:
            said = (self.work / "bochs.log").read_text(errors="replace")[-2000:]
            raise RigError(f"the guest ended without a result ({error}):\n{log}\n{said}") from None
        if self.job.out:
            shutil.copytree(back / "out", self.job.out, dirs_exist_ok=True)
        messages = (back / "dmesg").read_text(errors="replace")
        found = TROUBLE.search(self._judged(messages)) or TROUBLE.search(self._judged(log))
        if found:
            raise RigError(f"'{found[0]}' in the guest's kernel log:\n{messages}")
        return status

    def _judged(self, log: str) -> str:
        """The part of a kernel LOG in which there may be no trouble.

        With Debian's Bochs what precedes user space is left out: kernels from 6.12 on warn of its CPUs' topology.
        """
        return USER_SPACE.split(log, maxsplit=1)[-1] if self.bochs.debugger else log


def _owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def _directory(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.mode = tarfile.DIRTYPE, 0o755
    return member


def power_on(bochs: Bochs, image: Image, job: Job) -> int:
    """Run JOB, streaming its output to stdout; its exit status, 124 after the timeout."""

    def show(data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a background job starts with it ignored
        signal.signal(number, stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup(1) leaves it
        signal.signal(signal.SIGHUP, stop)
    saved = termios.tcgetattr(sys.stdin) if job.shell and sys.stdin.isatty() else None
    try:
        with Machine(bochs, image, job) as machine:
            if saved:
                tty.setraw(sys.stdin)
            return machine.run(show)
    finally:
        if saved:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, saved)
