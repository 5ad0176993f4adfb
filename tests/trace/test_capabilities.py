# SPDX-License-Identifier: GPL-2.0-or-later
"""Which capabilities a process that traces keeps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from needs import ROOT_ALONE

ROOT = Path(__file__).parents[2]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason=ROOT_ALONE)

RIGHTS = """
import re, sys
from pathlib import Path
import tracer.trace.capabilities as rights
rights._PARANOID = Path(sys.argv[1])
rights._MOUNTS = Path(sys.argv[3])
assert rights.sees_processes()
def state():
    return [hex(rights._state(which)) for which in ("CapEff", "CapPrm", "CapBnd")]
before = state()
with rights.raised():
    assert state() == before
rights.drop_capabilities(attaches_again=sys.argv[2] == "again")
print(*state())
with rights.raised():
    print(*state())
print(*state())
assert rights.sees_processes()
"""
BPF, PERFMON, SYSLOG, SYS_ADMIN, SYS_PTRACE = 1 << 39, 1 << 38, 1 << 34, 1 << 21, 1 << 19


@as_root
@pytest.mark.parametrize(
    ("paranoid", "again", "mounted", "effective", "permitted"),
    [
        ("2", "again", "rw,hidepid=0", BPF | PERFMON | SYSLOG, BPF | PERFMON | SYSLOG),
        ("3", "again", "rw", BPF | PERFMON | SYSLOG, BPF | PERFMON | SYSLOG | SYS_ADMIN),
        ("3", "never", "rw", BPF, BPF),
        ("3", "never", "rw,gid=7,hidepid=invisible", BPF | SYS_PTRACE, BPF | SYS_PTRACE),
        ("3", "never", "rw,hidepid=2", BPF | SYS_PTRACE, BPF | SYS_PTRACE),
    ],
)
def test_rights_that_are_kept(  # noqa: PLR0917 (pytest passes them by name)
    paranoid: str, again: str, mounted: str, effective: int, permitted: int, tmp_path: Path
) -> None:
    (tmp_path / "paranoid").write_text(f"{paranoid}\n")
    (tmp_path / "mounts").write_text(f"sysfs /sys sysfs rw 0 0\nproc /proc proc {mounted} 0 0\n")
    done = subprocess.run(
        [sys.executable, "-c", RIGHTS, tmp_path / "paranoid", again, tmp_path / "mounts"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    few, all_ = (f"{hex(e)} {hex(permitted)} {hex(permitted)}" for e in (effective, permitted))
    assert done.stdout.splitlines() == [few, all_, few]
