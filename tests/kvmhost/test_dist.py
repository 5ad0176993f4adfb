# SPDX-License-Identifier: GPL-2.0-or-later
"""The sdist and the wheel: complete, the same wherever they are built, and installable without Debian's Python modules.

They take half a minute, a compiler and the network, so they are built while hosts boot.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from cache import REPO

from tracer.program.compiler import PROGRAMS, shipped_file


@dataclass(frozen=True)
class Built:
    """What was built in the checkout, and from its sdist elsewhere; and what the installed programs printed."""

    sdist: Path
    wheel: Path
    again: tuple[Path, Path]
    pipx: dict[str, str]
    pip: dict[str, str]
    site: Path  # site-packages of pipx's venv


def _build(source: Path, out: Path, **settings: str) -> tuple[Path, Path]:
    command: list[str | Path] = [source / "packaging/dist", sys.executable, out]
    umask = int(settings.pop("umask", "022"), 8)
    environment = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"} | settings
    subprocess.run(command, check=True, cwd="/", env=environment, umask=umask, stdout=subprocess.DEVNULL)
    [sdist], [wheel] = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def _tried(program: Path) -> dict[str, str]:
    """What two commands of it print, run as from a login shell."""
    found = {}
    for command in ("--version", "doctor"):
        done = subprocess.run(
            [program, command], cwd="/", env={"PATH": os.defpath}, capture_output=True, text=True, check=False
        )
        found[command] = done.stdout + done.stderr
    return found


def built_and_installed(folder: Path) -> Built:
    sdist, wheel = _build(REPO, folder / "first")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    subprocess.run(["tar", "-xzf", sdist, "-C", elsewhere], check=True, umask=0o077)
    [source] = elsewhere.iterdir()
    # A date that is set, another zone, and files that nobody else may read.
    again = _build(source, folder / "second", umask="077", SOURCE_DATE_EPOCH="1", TZ="Pacific/Auckland")
    homes = {f"PIPX_{name}": str(folder / name) for name in ("HOME", "BIN_DIR", "MAN_DIR")}
    python = Path(sys.executable).resolve()
    subprocess.run(["pipx", "install", "--python", python, wheel], check=True, env={**os.environ, **homes})
    [site] = (folder / "HOME/venvs/msrtrace/lib").glob("python3*/site-packages")
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    subprocess.run([folder / "venv/bin/pip", "install", "--quiet", sdist], check=True)
    pipx, pip = _tried(folder / "BIN_DIR/msrtrace"), _tried(folder / "venv/bin/msrtrace")
    return Built(sdist, wheel, again, pipx, pip, site)


pytestmark = pytest.mark.beside(boot=built_and_installed)


def test_the_sdist_is_what_git_has(beside: Built) -> None:
    command = ["git", "-c", f"safe.directory={REPO}", "-C", str(REPO), "ls-files", "--cached", "--others"]
    listed = subprocess.run([*command, "--exclude-standard"], capture_output=True, text=True, check=True).stdout
    with tarfile.open(beside.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names == {name for name in listed.splitlines() if (REPO / name).is_file()} | {"PKG-INFO"}


def test_they_are_the_same_wherever_they_are_built(beside: Built) -> None:
    for first, second in zip((beside.sdist, beside.wheel), beside.again, strict=True):
        assert first.name == second.name
        assert first.read_bytes() == second.read_bytes()


def test_the_wheel_has_the_compiled_programs(beside: Built) -> None:
    with zipfile.ZipFile(beside.wheel) as archive:
        names = set(archive.namelist())
    assert {str(shipped_file(Path("tracer/bpf", name), flags)) for name, flags in PROGRAMS} <= names


def test_pipx_installs_what_needs_bccs_library_alone(beside: Built) -> None:
    """Its venv sees no Python module of the system."""
    assert not (beside.site / "bcc").exists()
    assert "include-system-site-packages = false" in (beside.site.parents[2] / "pyvenv.cfg").read_text()
    assert beside.pipx["--version"].startswith("msrtrace, version ")
    for check in ("headers", "bcc"):
        [line] = [line for line in beside.pipx["doctor"].splitlines() if f" {check} " in line[:20]]
        assert line.split()[:4] == ["ok", check, "not", "needed:"]


def test_pip_installs_the_sdist_with_its_programs(beside: Built) -> None:
    assert beside.pip["--version"] == beside.pipx["--version"]
    assert "the BPF program is already compiled" in " ".join(beside.pip["doctor"].split())
