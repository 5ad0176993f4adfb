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
from pathlib import Path
from typing import BinaryIO

from cache import BUILD, RigError, say, sh
from disks import CYLINDER, Image
from emulator import Emulator, Job

TIMED_OUT = 124  # as timeout(1) has it
#: What a guest's kernel log may not contain.
TROUBLE = re.compile(
    r"Kernel panic|WARNING: (CPU|possible)|BUG: |Oops: |general protection fault|Call Trace:|"
    r"rcu_\w+ (self-)?detected|soft lockup|hung_task|blocked for more than"
)
#: What is the last that is heard of a guest.
DEAD = ("Kernel panic", "kvmhost: no root disk", "systemd[1]: Freezing execution")
#: Where it starts, in dmesg and on the console.
USER_SPACE = re.compile(r"Run /init as init process|^kvmhost: up ", re.M)
POLL_SECONDS = 0.05
TRACE_SECONDS = 1.0  # in which a kernel that dies prints where
OUT_BYTES = 256 << 20  # room for /out: sparse until written


class EmulatorError(RigError):
    """A guest died of what the emulator did wrong, not of what ran in it."""


class Machine:
    """A powered-on host. The context manager ends the emulator and removes what the run left, however it ends."""

    def __init__(self, emulator: Emulator, image: Image, job: Job) -> None:
        self.emulator, self.image, self.job = emulator, image, job
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
            "HOST": job.host,
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

    def _power_on(self) -> None:
        job, terminal = self.job, None
        self._send()
        for name in ("kernel.log", "command.log"):
            (self.work / name).touch()
        if job.shell:
            self.console, side = pty.openpty()
            tty.setraw(side)
            terminal = os.ttyname(side)
        if job.forward:
            try:
                socket.create_server(("127.0.0.1", job.forward[0])).close()
            except OSError as error:
                raise RigError(f"cannot forward port {job.forward[0]}: {error.strerror}") from None
        command = self.emulator.command(job, self.image, self.work, terminal)
        (self.work / "emulator.command").write_text(shlex.join(command) + "\n")  # for whoever reads the logs
        with (self.work / "emulator.out").open("wb") as out:
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
                if any(end in log for end in DEAD):
                    time.sleep(TRACE_SECONDS)
                    log += kernel.read().decode(errors="replace")
                    raise self._trouble("the guest's kernel died, or its init", log)
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
            logs = [self.work / name for name in ("emulator.log", "emulator.out")]
            said = "".join(log.read_text(errors="replace")[-2000:] for log in logs if log.exists())
            raise RigError(f"the guest ended without a result ({error}):\n{log}\n{said}") from None
        if self.job.out:
            shutil.copytree(back / "out", self.job.out, dirs_exist_ok=True)
        messages = (back / "dmesg").read_text(errors="replace")
        found = TROUBLE.search(self._judged(messages)) or TROUBLE.search(self._judged(log))
        if found:
            raise self._trouble(f"'{found[0]}' in the guest's kernel log", messages)
        return status

    def _trouble(self, what: str, log: str) -> RigError:
        kind = EmulatorError if self.emulator.erred(log) else RigError
        return kind(f"{what}:\n{log}")

    def _judged(self, log: str) -> str:
        """The part of a kernel LOG in which there may be no trouble."""
        return USER_SPACE.split(log, maxsplit=1)[-1] if self.emulator.warns_at_boot else log


def _owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def _directory(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.mode = tarfile.DIRTYPE, 0o755
    return member


def power_on(emulator: Emulator, image: Image, job: Job) -> int:
    """Run JOB, streaming its output to stdout; its exit status, 124 after the timeout.

    If the emulator itself fails, all is done again from the start, once, unless somebody outside has seen part of it.
    """

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

    def run() -> int:
        with Machine(emulator, image, job) as machine:
            if saved:
                tty.setraw(sys.stdin)
            return machine.run(show)

    try:
        return run()
    except EmulatorError as error:
        if job.real_time:
            raise
        say(str(error))
        say(f"{job.host}: THE EMULATOR FAILED, not what ran in it: doing all of it again")
        return run()
    finally:
        if saved:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, saved)
