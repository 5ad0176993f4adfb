# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run does when the emulator itself is at fault. A script stands in for the emulator."""

from __future__ import annotations

import io
import signal
import sys
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import cache
import machine
import pytest
from bochs import Bochs
from disks import Image
from emulator import Job
from machine import EmulatorError, power_on
from qemu import Qemu

#: As 6.12 said it in a host with two CPUs: at a static branch that another CPU had just changed. And as 6.1 says it.
STALE = """\
[  108.698712] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI
[  108.699757] CPU: 0 UID: 0 PID: 0 Comm: swapper/0 Tainted: G           OE      6.12.118+deb13-amd64 #1
[  108.700022] RIP: 0010:finish_task_switch.isra.0+0xa9/0x2f0
[  108.700352] Code: 4c 8b bb 18 0b 00 00 fb 0f 1f 44 00 00 41 f6 45 2f 20 0f 85 6f 01 00 00 eb <3c> 65
[  108.701059] Call Trace:
[  108.702650] Kernel panic - not syncing: Fatal exception in interrupt
"""
OLD_STALE = STALE.replace("Oops: int3", "int3")
#: The same with an int3 in memory; and another death, whose code has none.
REAL = STALE.replace(" eb <3c>", " cc <3c>")
OTHER = STALE.replace("int3: 0000", "0000")
REAL_BEFORE_OTHER = REAL + OTHER.replace("[#1]", "[#2]")


@pytest.mark.parametrize(
    ("log", "erred"),
    [(STALE, True), (OLD_STALE, True), (REAL, False), (OTHER, False), (REAL_BEFORE_OTHER, False), ("", False)],
)
def test_a_stray_int3_is_qemu_s_if_memory_has_none(log: str, erred: bool) -> None:
    assert Qemu(Path()).erred(log) == erred
    assert not Bochs(Path(), Path(), Path(), debugger=True).erred(log)


@dataclass(frozen=True)
class Played:
    """An emulator that writes one of these logs with each run, and what a guest sends back that has done its work."""

    folder: Path
    logs: list[str]

    warns_at_boot = False

    def erred(self, log: str) -> bool:
        return Qemu(Path()).erred(log)

    def command(self, job: Job, image: Image, work: Path, terminal: str | None) -> list[str]:
        run = len([*self.folder.glob("log*")])
        log = self.folder / f"log{run}"
        log.write_text(self.logs[run])
        with tarfile.open(self.folder / "back", "w") as tar:
            for name, text in {"status": "7", "dmesg": self.logs[run]}.items():
                member = tarfile.TarInfo(name)
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text.encode()))
        play = (
            f"echo run {run} >{work}/command.log; cp {self.folder}/back {work}/back.img; cat {log} >{work}/kernel.log"
        )
        return ["sh", "-c", f"{play}; exec sleep 60"]


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Image:
    monkeypatch.setattr(machine, "BUILD", tmp_path)
    monkeypatch.setattr(machine, "TRACE_SECONDS", 0.2)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # they are pytest's
    return Image(tmp_path, tmp_path, tmp_path, tmp_path, "6.12")


JOB = Job(["true"])
DONE = "kvmhost: up 5\nkvmhost: done\n"
#: A kernel that killed a process instead.
SURVIVED = STALE.replace("Kernel panic - not syncing: Fatal exception in interrupt\n", DONE)


@pytest.mark.parametrize("log", [STALE, SURVIVED], ids=["died", "went on"])
def test_what_the_emulator_did_wrong_is_done_again_and_said(
    tmp_path: Path, image: Image, log: str, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert power_on(Played(tmp_path, [log, DONE]), image, JOB) == 7
    shown = capfdbinary.readouterr()
    assert shown.out == b"run 0\nrun 1\n"
    assert b"bookworm: THE EMULATOR FAILED, not what ran in it: doing all of it again" in shown.err
    assert b"finish_task_switch" in shown.err
    assert not [*(tmp_path / "runs").iterdir()]


def test_that_is_done_once(tmp_path: Path, image: Image) -> None:
    with pytest.raises(EmulatorError, match="finish_task_switch"):
        power_on(Played(tmp_path, [STALE, STALE]), image, JOB)


@pytest.mark.parametrize("log", [REAL, REAL_BEFORE_OTHER, OTHER])
def test_what_a_guest_did_wrong_is_not_done_again(tmp_path: Path, image: Image, log: str) -> None:
    with pytest.raises(cache.RigError, match="finish_task_switch") as raised:
        power_on(Played(tmp_path, [log]), image, JOB)
    assert not isinstance(raised.value, EmulatorError)


@pytest.mark.parametrize("job", [replace(JOB, shell=True), replace(JOB, forward=(0, 1))], ids=["shell", "forward"])
def test_what_somebody_has_seen_is_not_done_again(
    tmp_path: Path, image: Image, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = (tmp_path / "terminal").open("w+b")  # has nothing to say, and takes what is said
    monkeypatch.setattr(sys, "stdin", terminal)
    with terminal, pytest.raises(EmulatorError):
        power_on(Played(tmp_path, [STALE]), image, job)
