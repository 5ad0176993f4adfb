# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of `make run` where this machine is traced. Of an emulated host it is in tests/kvmhost/test_demo.py."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from project import REPO

#: What stands for msrtrace: the lines that `msrtrace run` ends with, and its end by Ctrl-C.
STAND_IN = """#!/bin/sh
echo msrtrace: backend fentry >&2
echo msrtrace: serving http://127.0.0.1:9753/metrics >&2
trap 'echo msrtrace: ended >&2; exit 3' INT
while :; do sleep 0.1; done
"""


def test_the_url_then_one_line_of_what_to_try(tmp_path: Path) -> None:
    program = tmp_path / "bin/msrtrace"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    # Some directory of /sys/module that every kernel has; nothing is made or installed.
    variables = ["KVM=kernel", f"VENV={tmp_path}", "SUDO=", "APT=:"]
    command = ["make", "--silent", "-o", f"{tmp_path}/run", "run", *variables]
    # A session of its own, so that Ctrl-C can be sent to all that runs in this terminal's foreground.
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True, start_new_session=True) as make:
        assert make.stdout
        lines = [make.stdout.readline().rstrip("\n") for _ in range(4)]
        os.killpg(make.pid, signal.SIGINT)
        rest = make.stdout.read()
    assert lines == [
        "make run: this machine has kernel: tracing it",
        "msrtrace: backend fentry",
        "msrtrace: serving http://127.0.0.1:9753/metrics",
        f"make run: in another terminal, live: {tmp_path}/bin/msrtrace top",
    ]
    assert make.returncode != 0
    assert "msrtrace: ended" in rest  # what it says at its end is still shown
