# SPDX-License-Identifier: GPL-2.0-or-later
"""Which capabilities a process that traces keeps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from needs import ROOT_ALONE, missing

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


AMBIENT = """
import ctypes, re
from pathlib import Path
import tracer.trace.capabilities as rights
rights._PARANOID = Path("/dev/null")
rights._LAST = Path("/proc/sys/kernel/cap_last_cap")
left = rights.drop_capabilities(attaches_again=False)
text = Path("/proc/thread-self/status").read_text()
print(*(hex(rights._state(which)) for which in ("CapInh", "CapPrm", "CapEff", "CapAmb")))
print(re.findall(r"^NoNewPrivs:\\s*(\\d)", text, re.M)[0])
print(*left)
"""


@as_root
def test_an_ordinary_user_with_ambient_capabilities_gives_up_what_it_can(tmp_path: Path) -> None:
    """The bounding set stays, without CAP_SETPCAP, and what is in it is named."""
    if not all(directory.stat().st_mode & 1 for directory in Path(sys.executable).resolve().parents):
        missing("a Python that other users can run", f"only root can run {sys.executable}")
    kept = "bpf,perfmon,syslog,net_admin"
    bounds = ",".join(f"+{name}" for name in (*kept.split(","), "chown", "setgid", "setuid", "setpcap"))
    ambient = ",".join(f"+{name}" for name in kept.split(","))
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", f"--inh-caps={ambient}"]
    done = subprocess.run(
        [*user, f"--ambient-caps={ambient}", f"--bounding-set=-all,{bounds}", sys.executable, "-c", AMBIENT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rights, new_privileges, left = done.stdout.splitlines()
    assert rights == f"0x0 {hex(BPF)} {hex(BPF)} 0x0"
    assert new_privileges == "1"
    assert left == "CAP_CHOWN CAP_SETGID CAP_SETUID CAP_SETPCAP CAP_NET_ADMIN CAP_SYSLOG CAP_PERFMON"
