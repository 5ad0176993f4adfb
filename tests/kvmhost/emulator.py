# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run asks of a host, and what an emulator does about it: bochs.py has the Intel hosts, qemu.py those of AMD."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from disks import Image

#: Of the network card of a host behind --forward.
GUEST_MAC = "52:54:00:12:34:56"


@dataclass(frozen=True)
class Job:
    """What to run: `sent` maps names below /mnt in the guest to directories or files of this machine."""

    command: list[str]
    module: str = "patched"
    host: str = "bookworm"
    cpus: int = 1
    cpu_model: str | None = None
    memory: int = 2048  # MiB
    count_instructions: bool = False
    forward: tuple[int, int] | None = None  # a port of this machine, a port of the guest
    shell: bool = False
    reboots: bool = False  # whether the guest may, and is back then; else that ends the run
    sent: dict[str, Path] = field(default_factory=dict)
    out: Path | None = None
    timeout: float = 600
    keep_log: Path | None = None

    @property
    def real_time(self) -> bool:
        """Whether somebody outside watches: then idle time must pass as fast as theirs, not in a blink."""
        return self.shell or self.forward is not None


class Emulator(Protocol):
    """A program that emulates a host."""

    @property
    def warns_at_boot(self) -> bool:
        """Whether it emulates a CPU of which healthy kernels warn before user space runs."""

    def erred(self, log: str) -> bool:
        """Whether a kernel with this log died of a fault that is known to be the emulator's alone."""

    def command(self, job: Job, image: Image, work: Path, terminal: str | None) -> list[str]:
        """The command line that powers on a host for JOB from IMAGE.

        :param work: a directory with the disks `sent.img` and `back.img`. The serial lines go there, as `kernel.log`
            and `command.log`, and whatever else the emulator reads or writes; its own log is `emulator.log`
        :param terminal: the terminal that takes the place of `command.log`
        """
