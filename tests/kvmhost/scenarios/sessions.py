# SPDX-License-Identifier: GPL-2.0-or-later
"""Types the commands of docs/examples.md into a shell of the host; /out/sessions.json gets what each printed.

The host has neither sudo nor curl: root needs none, and Python stands in for `curl -s URL`.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import time
from pathlib import Path

#: The last that `msrtrace run` says when it starts.
_SERVING = b"/metrics\n"
#: How long other commands that are started with `&` have to start, and what only Ctrl-C ends is left alone.
_START_SECONDS, _WATCHED_SECONDS = 2.0, 25.0
_LONGEST_SECONDS = 120.0
_CURL = """#!/usr/bin/python3
import sys, urllib.request
sys.stdout.write(urllib.request.urlopen(sys.argv[-1]).read().decode())
"""
#: That the kernel held its module for a moment, as it does now and then (guest/kvm-module).
_HELD = re.compile(rb"^(rmmod: ERROR: .*|kvm-module: .* is tried again)\n", re.M)
_TOOLS = Path("/tmp/tools")


class Shell:
    """A shell that is fed commands one after the other."""

    def __init__(self) -> None:
        environment = {**os.environ, "PATH": f"{_TOOLS}:{os.environ['PATH']}", "COLUMNS": "80"}
        Path("/tmp/sessions").mkdir()
        self._shell = subprocess.Popen(
            ["bash"],
            cwd="/tmp/sessions",
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def type(self, command: str, interrupted: bool) -> str:
        """Run a command, with Ctrl-C after a while if that is what ends it; what it printed."""
        assert self._shell.stdin
        typed = f"timeout -s INT {_WATCHED_SECONDS} {command}" if interrupted else command
        self._shell.stdin.write(f"{typed}\nprintf '\\0'\n".encode())
        self._shell.stdin.flush()
        printed = self._read(b"\0")
        if command.endswith("msrtrace run &"):
            printed += self._read(_SERVING)
        elif command.endswith("&"):
            time.sleep(_START_SECONDS)
        return _HELD.sub(b"", printed.replace(b"\0", b"")).decode()

    def _read(self, until: bytes) -> bytes:
        """What is printed up to these bytes."""
        assert self._shell.stdout
        printed, deadline = b"", time.monotonic() + _LONGEST_SECONDS
        while until not in printed:
            ready, _, _ = select.select([self._shell.stdout], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {until!r} after {printed!r}"
            printed += os.read(self._shell.stdout.fileno(), 65536)
        return printed


def main() -> None:
    """See the module."""
    _TOOLS.mkdir()
    for name, script in {"curl": _CURL, "sudo": '#!/bin/sh\nexec "$@"\n'}.items():
        (_TOOLS / name).write_text(script)
        (_TOOLS / name).chmod(0o755)
    shell = Shell()
    commands = json.loads(Path("/in/commands.json").read_text())
    printed = [shell.type(command, interrupted) for command, interrupted in commands]
    Path("/out/sessions.json").write_text(json.dumps(printed))


if __name__ == "__main__":
    main()
