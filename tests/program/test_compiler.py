# SPDX-License-Identifier: GPL-2.0-or-later
"""The child that compiles, however it or its parent ends; programs that are kept; loading; maps; rights."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from needs import ROOT_ALONE

from tracer.model.errors import MsrtraceError
from tracer.program import compiler, program
from tracer.program.compiler import build, compiled
from tracer.program.program import (
    Function,
    MapDefinition,
    Program,
    Relocation,
    Target,
    Unfit,
    Variant,
    keep,
    kept,
    load,
)
from tracer.program.structs import Member
from tracer.program.syscalls import MMAPABLE, BpfMap, MappedArray, create_map

ROOT = str(Path(__file__).parents[2])
as_root = pytest.mark.skipif(os.geteuid() != 0, reason=ROOT_ALONE)


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


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where programs are kept, which does not exist yet."""
    monkeypatch.setenv("CACHE_DIRECTORY", f"{tmp_path / 'cache'}:/other")
    return tmp_path / "cache"


# --- the child ---


@pytest.mark.parametrize(("script", "status"), [("exit 3", 3), ("kill -9 $$", -9)])
def test_a_child_that_dies_is_one_clear_error(
    script: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_python(tmp_path, script, monkeypatch)
    with pytest.raises(MsrtraceError, match=rf"^the process that compiles the BPF program ended with status {status}"):
        build(tmp_path / "none.c", [Variant("kprobe", {}, {})])


def test_a_child_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", "/none/python")
    with pytest.raises(MsrtraceError, match=r"cannot be started: No such file or directory$"):
        build(tmp_path / "none.c", [Variant("kprobe", {}, {})])


def test_the_child_does_not_outlive_its_parent(tmp_path: Path) -> None:
    """Even if the compiler takes forever."""
    (tmp_path / "bcc.py").write_text("import time\ntime.sleep(60)\n")
    script = "from pathlib import Path; import tracer.program.compiler as c; c._compile(Path('none.c'), {})"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        while not children.read_text():
            assert parent.poll() is None
            time.sleep(0.02)
        time.sleep(1)
        [child] = map(int, children.read_text().split())
        parent.send_signal(signal.SIGKILL)
        assert gone(child)


def test_why_it_cannot_be_compiled_is_said(tmp_path: Path) -> None:
    """This machine may have no kernel headers at all, which is an error like others."""
    (tmp_path / "program.c").write_text("int program(void *ctx) { return NOTHING; }\n")
    with pytest.raises(MsrtraceError, match=r"^the BPF program cannot be compiled: .*MSRTRACE_DEBUG"):
        build(tmp_path / "program.c", [Variant("kprobe", {}, {"program": Target("kprobe")})])


def test_nothing_is_imported_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bcc.py").write_text("raise SystemExit(77)\n")
    (tmp_path / "json.py").write_text("raise SystemExit(78)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MsrtraceError, match="cannot be compiled"):
        build(tmp_path / "none.c", [Variant("kprobe", {}, {})])


# --- what is kept ---

ANY = Program(
    [MapDefinition("m", 2, 4, 8, 1, 0, {"a": Member(0, 4), "b": Member(4, 1, 4)})],
    {"f": Function(bytes(range(16)), [Relocation(8, "value", 0)])},
    ["v"],
)


def test_what_was_kept_is_what_comes_back(cache: Path) -> None:
    assert kept("one") is None
    keep("one", ANY)
    assert kept("one") == ANY
    assert kept("other") is None
    assert [path.name for path in cache.iterdir()] == ["one"]
    assert (cache.stat().st_mode & 0o777, (cache / "one").stat().st_mode & 0o777) == (0o700, 0o600)


def test_a_program_that_is_not_whole_is_none(cache: Path) -> None:
    keep("one", ANY)
    whole = (cache / "one").read_bytes()
    for at in range(len(whole)):
        (cache / "one").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert kept("one") is None
        (cache / "one").write_bytes(whole[:at])
        assert kept("one") is None
    keep("one", ANY)
    assert kept("one") == ANY


@as_root
def test_a_program_in_reach_of_another_user_is_none(cache: Path) -> None:
    keep("one", ANY)
    for mode in (0o620, 0o602):
        (cache / "one").chmod(mode)
        assert kept("one") is None
    (cache / "one").chmod(0o644)
    assert kept("one") == ANY
    os.chown(cache / "one", 12345, -1)
    assert kept("one") is None


def test_what_was_not_used_for_longest_goes(cache: Path) -> None:
    for n in range(program._KEPT):
        keep(f"{n}", ANY)
        os.utime(cache / f"{n}", (n, n))
    assert kept("0") == ANY
    keep("new", ANY)
    assert {path.name for path in cache.iterdir()} == {"new", *map(str, range(program._KEPT))} - {"1"}


def test_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "file"))
    keep("one", ANY)
    assert kept("one") is None


def test_where_programs_are_kept(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert program.folder() == cache
    monkeypatch.delenv("CACHE_DIRECTORY")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert program.folder() == Path("/var/cache/msrtrace")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert program.folder() == Path("/xdg/msrtrace")


def test_it_is_compiled_once_for_each_thing_that_makes_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Program] = []

    def compile_(*_: object) -> Program:
        made.append(Program([], {"f": Function(bytes([len(made)] * 8))}))
        return made[-1]

    monkeypatch.setattr(compiler, "_compile", compile_)
    source = tmp_path / "program.c"
    source.write_text('one\n#include "part.h"\n')
    (tmp_path / "part.h").write_text("part of one")
    assert compiled(source, {"A": 1}) == compiled(source, {"A": 1}) == made[-1]
    assert len(made) == 1
    seen = [compiled(source, {"A": 2}), compiled(source, {"B": 1}), compiled(source, {"A": 1, "B": 1})]
    (tmp_path / "part.h").write_text("part of another")
    seen.append(compiled(source, {"A": 1}))
    source.write_text("other")
    seen.append(compiled(source, {"A": 1}))
    monkeypatch.setenv("BCC_KERNEL_SOURCE", "/elsewhere")
    seen.append(compiled(source, {"A": 1}))
    monkeypatch.setattr(os, "uname", lambda: ("Linux", "host", "6.1.0", "#2 SMP", "x86_64"))
    seen.append(compiled(source, {"A": 1}))
    assert seen == made[1:]


# --- loading ---


def instruction(code: int, registers: int, immediate: int, offset: int = 0) -> bytes:
    return struct.pack("<BBhi", code, registers, offset, immediate)


def test_what_is_put_in_at_loading() -> None:
    """Descriptors, values and ids go where they belong, and nowhere else."""
    mark, kfunc, cmpxchg = program._VALUE_MARK, program._FIRST_KFUNC + 1, instruction(0xDB, 0x1A, 0xF1, -8)
    code = b"".join(
        (
            instruction(0x18, 0x12, 7) + instruction(0, 0, 0),  # a map
            instruction(0x18, 0x03, 1) + instruction(0, 0, mark),  # a value
            instruction(0x18, 0x03, 0) + instruction(0, 0, mark),  # one that is not given
            instruction(0x18, 0x03, 1) + instruction(0, 0, 7),  # any number
            instruction(0x18, 0x03, 0x85) + instruction(0, 0, 0x18),
            instruction(0x85, 0, 14),  # a helper
            instruction(0x85, 0, kfunc),  # a function of the kernel
            instruction(0x85, 0x10, 99),  # a function of the program
            cmpxchg,
            instruction(0xDB, 0x1A, 0, -8),  # another atomic operation
            instruction(0x95, 0, 0),
        )
    )
    variant = Variant("kprobe", {}, {}, values={"given": 0xFFFFFFFF81234567}, kfuncs={kfunc: 4242})
    function = program.relocated(code, {7: 1})
    assert function == program.relocated(code.replace(b"\7", b"\x08", 1), {8: 1})  # whatever it was
    resolved = program._resolved(function, [50, 51], ["absent", "given"], variant)
    words = list(struct.iter_unpack("<BBhi", resolved))
    assert [words[n][3] for n in (0, 2, 4, 6, 8, 10, 11, 12)] == [51, 0x81234567 - 2**32, 0, 1, 0x85, 14, 4242, 99]
    assert [words[n][3] for n in (3, 5, 7, 9)] == [-1, 0, 7, 0x18]
    assert [words[n][1] for n in (10, 11, 12)] == [0, 0x20, 0x10]
    assert resolved[13 * 8 :] == code[13 * 8 :]
    without = program._resolved(function, [50, 51], ["absent", "given"], replace(variant, kfuncs={}, cmpxchg=False))
    # A jump to the next instruction; and the call stays what BCC made of it.
    assert without[13 * 8 :] == instruction(0x05, 0, 0) + code[14 * 8 :]
    assert without[11 * 8 : 12 * 8] == instruction(0x85, 0, kfunc)


RETURN_0 = instruction(0xB7, 0, 0) + instruction(0x95, 0, 0)


@as_root
def test_what_the_kernel_refuses_is_said_and_nothing_stays() -> None:
    def descriptors() -> set[str]:
        return set(os.listdir("/proc/self/fd"))

    before = descriptors()
    good = Program(
        [MapDefinition("m", 2, 4, 8, 1, 0)], {"f": Function(RETURN_0), "g": Function(instruction(0x95, 0, 0))}
    )
    both = {"f": Target("kprobe"), "g": Target("kprobe")}
    with pytest.raises(Unfit, match=r"^the kernel refuses the BPF program g: R0 !read_ok$") as failure:
        load(good, Variant("kprobe", {}, both))
    assert "0: (95) exit" in failure.value.said
    with pytest.raises(Unfit, match=r"^the kernel makes no BPF map m: Invalid argument$"):
        load(Program([MapDefinition("m", 2, 5, 8, 1, 0)], {}), Variant("kprobe", {}, {}))
    with pytest.raises(Unfit, match=r"^the kernel gives no BTF of none: No such file or directory$"):
        load(good, Variant("fentry", {}, {"f": Target("fentry", 1, "none")}))
    assert descriptors() == before
    loaded = load(good, Variant("kprobe", {}, {"f": Target("kprobe")}))
    assert (list(loaded.maps), list(loaded.functions)) == (["m"], ["f"])
    loaded.close()
    assert descriptors() == before


# --- maps ---


@as_root
@pytest.mark.parametrize("used", [0, 1, 1023, 5000])
def test_a_map_is_emptied(used: int) -> None:
    table = BpfMap(create_map("test", 1, key_size=8, value_size=4, max_entries=5000, flags=0), 8, 4)
    try:
        keys = [struct.pack("Q", n * 7919) for n in range(used)]
        for key in keys:
            table.update(key, bytes(4))
        assert sorted(table.keys()) == sorted(keys)
        for key in keys:
            table.delete(key)
        table.delete(b"notthere")
        assert table.keys() == []
    finally:
        os.close(table.fd)


@as_root
def test_an_array_is_read_and_written_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The map itself has what was written, and what others write is seen: it is one memory."""
    fd = create_map("test", 2, key_size=4, value_size=32, max_entries=5000, flags=MMAPABLE)
    members = {"key": Member(0, 8), "half": Member(8, 4), "byte": Member(12, 1), "text": Member(13, 1, 3)}
    members |= {"pair": Member(16, 8, 2)}
    array, other = (MappedArray(fd, 32, 5000, members) for _ in range(2))
    BpfMap(fd, 4, 32).update(struct.pack("I", 4999), struct.pack("QIB3sQQ", 2**64 - 1, 2**32 - 1, 255, b"ab", 7, 9))
    monkeypatch.setattr("tracer.program.syscalls._bpf", lambda *_: pytest.fail("a system call"))
    try:
        assert array.getter("pair", "key")(4999) == (7, 9, 2**64 - 1)
        assert [array.get(4999, name) for name in ("half", "byte")] == [2**32 - 1, 255]
        assert array.text(4999, "text") == b"ab"
        assert (array.entries, array.used("key"), array.used("byte")) == (5000, [4999], [4999])
        array.set(0, "half", 5)
        assert (other.get(0, "half"), other.used("half"), other.get(0, "byte")) == (5, [0, 4999], 0)
        with pytest.raises(ValueError, match="not a word"):
            array.getter("key", "half")
        array.clear()
        assert [other.used(name) for name in ("key", "half", "byte")] == [[]] * 3
    finally:
        array.close()
        other.close()
        os.close(fd)


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
