# SPDX-License-Identifier: GPL-2.0-or-later
"""msrtrace as a user starts it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: For msrtrace on a fake kernel.
ON_STANDIN = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}", "COLUMNS": "80"}


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "tracer.cli.main", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def on_standin(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """msrtrace with these arguments, in a process of its own, on a fake kernel that is files in a directory."""
    return subprocess.run(
        [sys.executable, "-m", "standin", directory, *arguments],
        env=ON_STANDIN,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


class Running:
    """A command of msrtrace in a process of its own, on a fake kernel that is files in a directory."""

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        command: str = "run",
        shell: str = "",
        descriptors: Sequence[int] = (),
        **environment: str,
    ) -> None:
        """Start it; `shell` is what bash does first in its process, which has the `descriptors`, too."""
        self.directory = directory
        self.out, self.err = directory / "out", directory / "err"
        words = [sys.executable, "-m", "standin", str(directory), command, *arguments]
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                ["bash", "-c", f"{shell}\nexec {shlex.join(words)}"] if shell else words,
                env=ON_STANDIN | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                pass_fds=descriptors,
            )

    def until(self, text: str, file: Path | None = None) -> str:
        """Wait until stdout (or a file) has the text; returns all of it."""
        end = time.monotonic() + 30
        while text not in (content := (file or self.out).read_text()):
            assert time.monotonic() < end, f"no {text!r} in {content!r}; stderr: {self.err.read_text()}"
            assert self.process.poll() is None, f"ended: {content!r}; stderr: {self.err.read_text()}"
            time.sleep(0.05)
        return content

    def url(self) -> str:
        return self.until("/metrics\n").rpartition("serving ")[2].splitlines()[0]

    def warnings(self) -> list[str]:
        """The lines on stderr, without those on capabilities unless run by root."""
        lines = self.err.read_text().splitlines()
        return lines if os.geteuid() == 0 else [line for line in lines if "capabilities" not in line]

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


def failed(running: Running) -> str:
    """The error line of a run that cannot serve; no probe may be left."""
    assert running.process.wait(30) == 1
    assert (running.directory / "closed").exists() == (running.directory / "attached").exists()
    assert "serving" not in running.out.read_text()
    error = running.err.read_text().splitlines()[-1]
    assert error.startswith("msrtrace: error: ")
    return error.removeprefix("msrtrace: error: ")
