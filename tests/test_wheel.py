# SPDX-License-Identifier: GPL-2.0-or-later
"""The wheel has man pages, completions and the compiled BPF programs, or says in a line that the host will compile."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[1]
PROGRAMS = ("msrtrace.bin", "msrtrace-fentry.bin", "exits.bin", "exits-fentry.bin", "state.bin")


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """hatch_build.py, with a stand-in for the class of hatchling, which a build alone has."""
    interface = ModuleType("hatchling.builders.hooks.plugin.interface")
    interface.BuildHookInterface = object  # type: ignore[attr-defined]
    for name in ("hatchling", "hatchling.builders", "hatchling.builders.hooks", "hatchling.builders.hooks.plugin"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    spec = importlib.util.spec_from_file_location("hatch_build", REPO / "hatch_build.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class App:
    """What hatchling gives a hook to speak with."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def display_warning(self, text: str) -> None:
        self.warnings.append(text)


def build(hook: ModuleType, version: str = "standard") -> tuple[list[str], dict[str, str]]:
    """The warnings of a build, and the files that it adds, by where they go."""
    made: Any = hook.CompiledPrograms()
    made.app, made.root = App(), str(REPO)
    data: dict[str, Any] = {"force_include": {}}
    made.initialize(version, data)
    return made.app.warnings, {where: file for file, where in data["force_include"].items()}


@pytest.fixture
def compiler(hook: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stands for both processes: where BCC is, and what compiles. The commands that were run."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if "tracer.trace.shipped" in command:
            for name in PROGRAMS:
                Path(command[-1], name).write_bytes(b"program")
        return subprocess.CompletedProcess(command, 0, "/usr/lib/python3/dist-packages\n", "")

    monkeypatch.setattr(hook.subprocess, "run", run)
    return commands


def test_the_wheel_has_every_program(hook: ModuleType, compiler: list[list[str]]) -> None:
    warnings, files = build(hook)
    assert [Path(command[1]).name for command in compiler] == ["pages.py", "-c", "-m"]
    assert warnings == []
    assert set(files) == {f"tracer/bpf/{name}" for name in PROGRAMS}
    assert {Path(file).read_bytes() for file in files.values()} == {b"program"}


def test_it_has_man_pages_and_completions(hook: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip puts them where man, pipx and the shells look, below the prefix."""
    monkeypatch.setattr(hook.CompiledPrograms, "_compile", lambda *_: "BCC is not installed")
    made: Any = hook.CompiledPrograms()
    made.app, made.root = App(), str(REPO)
    data: dict[str, Any] = {"force_include": {}}
    made.initialize("standard", data)
    shared = {where: Path(file) for file, where in data["shared_data"].items()}
    assert Path(shared["share/man/man1"], "msrtrace-run.1").read_text().startswith('.\\" SPDX')
    assert "#compdef msrtrace" in shared["share/zsh/site-functions/_msrtrace"].read_text()
    assert all(path.exists() for path in shared.values())
    assert len(shared) == 4
    made.finalize("standard", data, "")
    assert not any(path.exists() for path in shared.values())


def test_an_editable_installation_compiles_nothing(hook: ModuleType, compiler: list[list[str]]) -> None:
    assert build(hook, "editable") == ([], {})
    assert compiler == []


@pytest.mark.parametrize(
    ("failing", "printed", "reason"),
    [
        ("bcc.BPF", "ModuleNotFoundError: No module named 'bcc'", "BCC is not installed"),
        ("tracer.trace.shipped", "warning\nthere are no kernel headers\n", "there are no kernel headers"),
        ("tracer.trace.shipped", "", "for no reason given"),
    ],
)
def test_without_them_it_is_one_line_unless_they_are_required(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch, failing: str, printed: str, reason: str
) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        fails = any(failing in word for word in command)
        return subprocess.CompletedProcess(command, int(fails), "/site\n", printed if fails else "")

    monkeypatch.setattr(hook.subprocess, "run", run)
    [warning], files = build(hook)
    assert files == {}
    assert warning.startswith(
        f"msrtrace: the wheel has no compiled BPF programs, so the host will compile them ({reason})"
    )
    assert "python3-bpfcc" in warning
    assert "\n" not in warning
    monkeypatch.setenv("MSRTRACE_COMPILED", "required")
    with pytest.raises(RuntimeError, match=f"^the BPF programs cannot be compiled: {reason}$"):
        build(hook)
    monkeypatch.setenv("MSRTRACE_COMPILED", "no")
    assert build(hook) == ([], {})
