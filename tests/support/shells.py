# SPDX-License-Identifier: GPL-2.0-or-later
"""Interactive shells with the completions of this checkout, as a user types into them."""

from __future__ import annotations

import json
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

REPO = Path(__file__).parents[2]
BASH_COMPLETION = Path("/usr/share/bash-completion/bash_completion")
_SECONDS = 30.0

#: msrtrace, which completes as ever, with VMs by another /proc; else it writes its arguments to a file.
_MSRTRACE = """#!{python}
import json, os, sys
sys.path.insert(0, {repo!r})
if "_MSRTRACE_COMPLETE" not in os.environ:
    with open({typed!r}, "a") as file:
        print(json.dumps(sys.argv[1:]), file=file)
    sys.exit()
from pathlib import Path
from tracer.trace.running_vms import running_vms
running_vms.__defaults__ = (Path({proc!r}),)
from tracer.cli.__main__ import main
main()
"""
#: What a user's ~/.bashrc and ~/.zshrc have.
START = {
    "bash": [f"source {BASH_COMPLETION}", "BASH_COMPLETION_USER_DIR={completions}"],
    "bash alone": ["source {completions}/msrtrace"],
    "zsh": [
        "fpath=({completions} $fpath)",
        "autoload -Uz compinit",
        "compinit -u -D",
        "unsetopt beep",
    ],
}


def pages(directory: Path) -> None:
    """Write the man pages and the completions, as the makers of packages do."""
    command = [sys.executable, str(REPO / "packaging/pages.py"), str(directory)]
    subprocess.run(command, check=True, cwd="/", env={**os.environ, "SOURCE_DATE_EPOCH": "1795000000"}, timeout=60)


class Shells:
    """A directory with files, a fake /proc with VMs, and a msrtrace that shows what it was given."""

    def __init__(self, directory: Path) -> None:
        """Make all of it below a directory."""
        self._directory, self._typed = directory, directory / "typed"
        self._proc, self._bin, self._cwd = (directory / name for name in ("proc", "bin", "cwd"))
        for path in (self._proc, self._bin, self._cwd / "subdir", directory / "home"):
            path.mkdir(parents=True)
        for name in ("before.json", "my report.json", "before.txt", "other.txt", "subdir/deep.json"):
            (self._cwd / name).touch()
        script = _MSRTRACE.format(python=sys.executable, repo=str(REPO), typed=str(self._typed), proc=str(self._proc))
        self._program("msrtrace", script)
        self._program("sudo", '#!/bin/sh\nexec "$@"\n')
        self._program("workload-of-mine", "#!/bin/sh\n")
        pages(directory / "made")
        self.completions = directory / "made/completions"
        # Where bash-completion looks below BASH_COMPLETION_USER_DIR
        (self.completions / "completions").symlink_to(".")

    def _program(self, name: str, script: str) -> None:
        (self._bin / name).write_text(script)
        (self._bin / name).chmod(0o755)

    def vm(self, pid: int, name: str) -> None:
        """Let there be a VM."""
        process = self._proc / str(pid)
        (process / "fd").mkdir(parents=True)
        (process / "cmdline").write_bytes(b"\0".join([b"/usr/bin/qemu-system-x86_64", b"-name", name.encode(), b""]))
        (process / "comm").write_text("qemu-system-x86\n")
        (process / "fd/11").symlink_to("anon_inode:kvm-vm")

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("COMP", "XDG_", "FISH"))}
        home = str(self._directory / "home")
        path = f"{self._bin}:/usr/sbin:/usr/bin:/sbin:/bin"
        return {**kept, "HOME": home, "PATH": path, "TERM": "xterm", "LANG": "C.UTF-8", "INPUTRC": "/dev/null"}

    def type(self, shell: Sequence[str], start: Sequence[str], lines: Sequence[str]) -> list[list[str]]:
        """Type lines, with their tabs, into an interactive shell; the arguments that msrtrace was given by each.

        :param start: lines that come first; see START
        """
        self._typed.unlink(missing_ok=True)
        process, terminal = pty.fork()
        if not process:
            os.chdir(self._cwd)
            os.execvpe(shell[0], list(shell), self._environment())
        try:
            started = [line.format(completions=self.completions) for line in start]
            self._enter(terminal, "\r".join([*started, "msrtrace started"]), 1)
            for number, line in enumerate(lines, 2):
                self._enter(terminal, line, number)
        finally:
            os.kill(process, signal.SIGKILL)
            os.close(terminal)
            os.waitpid(process, 0)
        return self.given()[1:]

    def _enter(self, terminal: int, line: str, number: int) -> None:
        """Type a line; wait until msrtrace has run so often."""
        os.write(terminal, f"{line}\r".encode())
        deadline, screen = time.monotonic() + _SECONDS, b""
        while len(self.given()) < number:
            assert time.monotonic() < deadline, f"{line!r} runs no msrtrace:\n{screen.decode(errors='replace')}"
            if select.select([terminal], [], [], 0.02)[0]:
                screen += os.read(terminal, 65536)

    def given(self) -> list[list[str]]:
        """The arguments that msrtrace was run with since `type` began."""
        return [json.loads(line) for line in self._typed.read_text().splitlines()] if self._typed.exists() else []

    def fish(self, fish: str, lines: Sequence[str]) -> list[dict[str, str]]:
        """What fish offers for lines: in place of the last word of each, and what it says of that."""
        script = [f"set fish_complete_path {shlex.quote(str(self.completions))} $fish_complete_path"]
        script += [f"complete -C {shlex.quote(line)}; printf '\\f'" for line in lines]
        done = subprocess.run(
            [fish, "-c", "\n".join(script)],
            cwd=self._cwd,
            env=self._environment(),
            capture_output=True,
            text=True,
            check=True,
            timeout=_SECONDS,
        )
        assert done.stderr == ""
        offered = done.stdout.split("\f")[:-1]
        return [dict(_split(value) for value in values.split("\n") if value) for values in offered]


def _split(offered: str) -> tuple[str, str]:
    value, _, text = offered.partition("\t")
    return value, text
