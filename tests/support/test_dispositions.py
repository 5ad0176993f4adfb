# SPDX-License-Identifier: GPL-2.0-or-later
"""Signals that whoever starts the suite ignores: tests pass as if it did not."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
IGNORED = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGPIPE)


def test_the_suite_passes_with_signals_ignored() -> None:
    """As under nohup, or in the background of a script: with tests of each file that send signals to children."""
    asked = {
        "tests/cli/test_main.py": "signal_ends_the_wait",
        "tests/trace/test_recording.py": "signal_is_forwarded or ignored_signals_stay",
        "tests/cli/test_report.py": "signal_ends_the_trace",
        "tests/cli/test_top.py": "end_it_cleanly or ctrl_c",
    }
    command = [sys.executable, "-m", "pytest", "-q", "--hosts", "none", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", " or ".join(asked.values()), *asked],
        cwd=ROOT,
        preexec_fn=lambda: [signal.signal(number, signal.SIG_IGN) for number in IGNORED],
        restore_signals=False,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 12
