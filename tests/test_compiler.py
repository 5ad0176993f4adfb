"""The child that compiles, however it or its parent ends; reading maps; the rights that are kept."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tracer import compiler
from tracer.compiler import Builder, Variant
from tracer.errors import MsrtraceError
from tracer.syscalls import BpfMap

ROOT = str(Path(__file__).parents[1])
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may make BPF maps and give up capabilities")


def gone(pid: int) -> bool:
    """Whether a process has ended, or is about to be waited for; within some seconds."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def fake_python(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


@pytest.mark.parametrize(("script", "status"), [("exit 3", 3), ("kill -9 $$", -9)])
def test_a_child_that_dies_is_one_clear_error(
    script: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_python(tmp_path, script, monkeypatch)
    with pytest.raises(MsrtraceError, match=rf"^the process that compiles the BPF program ended with status {status}"):
        Builder().build(tmp_path / "none.c", [], [Variant("kprobe", {}, {})])


def test_a_child_that_is_not_needed_is_ended() -> None:
    builder = Builder()
    pid = builder._child.pid
    builder.abandon()
    assert gone(pid)


def test_the_child_does_not_outlive_its_parent() -> None:
    script = "from tracer.compiler import Builder; import time; print(Builder()._child.pid, flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        time.sleep(0.5)
        parent.send_signal(signal.SIGKILL)
        assert gone(child)


def test_why_it_cannot_be_compiled_is_said(tmp_path: Path) -> None:
    """This machine may have no kernel headers at all, which is an error like others."""
    (tmp_path / "program.c").write_text("int program(void *ctx) { return NOTHING; }\n")
    with pytest.raises(MsrtraceError, match=r"^the BPF program cannot be compiled or loaded: .*MSRTRACE_DEBUG"):
        Builder().build(tmp_path / "program.c", [], [Variant("kprobe", {}, {"program": ("kprobe", "program")})])


def test_nothing_is_imported_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bcc.py").write_text("raise SystemExit(77)\n")
    (tmp_path / "json.py").write_text("raise SystemExit(78)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MsrtraceError, match="cannot be compiled"):
        Builder().build(tmp_path / "none.c", [], [Variant("kprobe", {}, {})])


def hash_map(entries: int) -> BpfMap:
    """A new one: BPF_MAP_CREATE, BPF_MAP_TYPE_HASH; keys of 8 and values of 12 bytes."""
    from tracer.syscalls import _bpf

    return BpfMap(_bpf(0, struct.pack("IIII", 1, 8, 12, entries))[0], 8, 12, entries)


@as_root
@pytest.mark.parametrize("used", [0, 1, 1023, 1024, 1025, 4999, 5000])
def test_a_map_is_read_whole(used: int) -> None:
    table = hash_map(5000)
    try:
        content = {struct.pack("Q", n * 7919): struct.pack("III", n, n + 1, n + 2) for n in range(used)}
        for key, value in content.items():
            table.update(key, value)
        read = list(table.items())
        assert (dict(read), len(read)) == (content, used)
        assert dict(table._one_by_one()) == content
        assert sorted(table.keys()) == sorted(content)
        for key in content:
            table.delete(key)
        table.delete(b"notthere")
        assert list(table.items()) == []
        assert table.lookup(b"notthere") is None
    finally:
        os.close(table.fd)


RIGHTS = """
import re, sys
from pathlib import Path
import tracer.rights as rights
rights._PARANOID = Path(sys.argv[1])
rights._MOUNTS = Path(sys.argv[3])
assert rights.sees_processes()
def state():
    return [hex(rights._state(which)) for which in ("CapEff", "CapPrm", "CapBnd")]
before = state()
with rights.in_force():
    assert state() == before
rights.keep_needed(attaches_again=sys.argv[2] == "again")
print(*state())
with rights.in_force():
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


def test_replies_fit_into_a_message() -> None:
    assert int(Path("/proc/sys/net/core/wmem_default").read_text()) >= compiler._LONGEST_REPLY * 2
