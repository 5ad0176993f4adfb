# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a compiled program comes from, and the child that compiles, however it or its parent ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tracer.model.errors import MsrtraceError
from tracer.program import compiler
from tracer.program.compiler import PROGRAMS, build, compiled, is_compiled, shipped_content, shipped_file
from tracer.program.loading import Loaded
from tracer.program.program import Function, MapDefinition, Program, Relocation, Target, Variant
from tracer.program.structs import Member

ROOT = str(Path(__file__).parents[2])


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
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where programs are cached, which does not exist yet."""
    monkeypatch.setenv("CACHE_DIRECTORY", f"{tmp_path / 'cache'}:/other")
    return tmp_path / "cache"


def test_the_child_imports_from_where_its_parent_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package's own directory is in sys.path alone, and that of a venv is not that of its base."""
    python, seen = sys.executable, tmp_path / "seen"
    (tmp_path / "private").mkdir()
    (tmp_path / "private/known_here_alone.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "private"))
    fake_python(tmp_path, f'printf "%s" "$2" > {seen}', monkeypatch)
    with pytest.raises(MsrtraceError):
        compiled(tmp_path / "none.c", {})
    paths, _, _ = seen.read_text().partition("; from tracer")
    subprocess.run([python, "-c", f"{paths}; import known_here_alone, tracer.program.bcc_compiler"], check=True)


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
    script = "from pathlib import Path; import tracer.program.compiler as c; c.compile_program(Path('none.c'), {})"
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


ANY = Program(
    [MapDefinition("m", 2, 4, 8, 1, 0, {"a": Member(0, 4), "b": Member(4, 1, 4)})],
    {"f": Function(bytes(range(16)), [Relocation(8, "value", 0)])},
    ["v"],
)


def test_it_is_compiled_once_for_each_thing_that_makes_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Program] = []

    def compile_(*_: object) -> Program:
        made.append(Program([], {"f": Function(bytes([len(made)] * 8))}))
        return made[-1]

    monkeypatch.setattr(compiler, "compile_program", compile_)
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


# --- what a package ships ---


def test_what_was_shipped_is_loaded_and_nothing_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "msrtrace.c"
    source.write_text("one\n")
    monkeypatch.setattr(compiler, "compile_program", lambda *_: pytest.fail("compiled"))
    assert not is_compiled(source, {})
    for definitions, file in (({}, "msrtrace.bin"), ({"FENTRY": 1}, "msrtrace-fentry.bin")):
        assert shipped_file(source, definitions) == tmp_path / file
        (tmp_path / file).write_bytes(shipped_content(source, definitions, ANY))
        assert compiled(source, definitions) == ANY
        assert is_compiled(source, definitions)
        assert is_compiled(source, {"FENTRY": 1}) is ("FENTRY" in definitions)


def test_a_variant_that_cannot_be_compiled_is_passed_over_for_one_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers may be gone, and one form of the program kept: the one that this kernel took."""

    def compile_(*_: object) -> Program:
        raise MsrtraceError("there are no kernel headers")

    source = tmp_path / "msrtrace.c"
    source.write_text("one\n")
    monkeypatch.setattr(compiler, "compile_program", compile_)
    monkeypatch.setattr(compiler, "load", lambda *_: Loaded({}, {}))
    variants = [Variant("fentry", {"FENTRY": 1}, {}), Variant("kprobe", {}, {})]
    with pytest.raises(MsrtraceError, match=r"^there are no kernel headers$"):
        build(source, variants)
    shipped_file(source, {}).write_bytes(shipped_content(source, {}, ANY))
    assert (is_compiled(source, {}), is_compiled(source, {"FENTRY": 1})) == (True, False)
    built = build(source, variants)
    assert (built.backend, built.passed_over) == ("kprobe", ("there are no kernel headers",))


def test_each_program_is_compiled_or_not_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "compiled"))
    sources = {name: tmp_path / name for name, _ in PROGRAMS}
    assert [*sources] == ["msrtrace.c", "exits.c", "state.c"]
    for source in sources.values():
        source.write_text("one\n")
        assert not is_compiled(source, {})
    state = sources["state.c"]
    shipped_file(state, {}).write_bytes(shipped_content(state, {}, ANY))
    assert [is_compiled(source, {}) for source in sources.values()] == [False, False, True]


@pytest.mark.parametrize("change", ["text", "content", "cut"])
def test_what_was_shipped_for_something_else_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source = tmp_path / "program.c"
    source.write_text("one\n")
    whole = shipped_content(source, {}, ANY)
    made = {"text": whole, "content": whole[:-1] + bytes([whole[-1] ^ 1]), "cut": whole[:-1]}[change]
    (tmp_path / "program.bin").write_bytes(made)
    if change == "text":
        source.write_text("another\n")
    other = Program([], {})
    monkeypatch.setattr(compiler, "compile_program", lambda *_: other)
    assert compiled(source, {}) == other
