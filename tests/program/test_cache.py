# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiled programs in files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from faults import Figures
from needs import ROOT_ALONE

from tracer.program import cache
from tracer.program.cache import cache_dir, cache_get, cache_put
from tracer.program.program import Function, MapDefinition, Program, Relocation
from tracer.program.structs import Member

as_root = pytest.mark.skipif(os.geteuid() != 0, reason=ROOT_ALONE)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where programs are cached, which does not exist yet."""
    monkeypatch.setenv("CACHE_DIRECTORY", f"{tmp_path / 'cache'}:/other")
    return tmp_path / "cache"


ANY = Program(
    [MapDefinition("m", 2, 4, 8, 1, 0, {"a": Member(0, 4), "b": Member(4, 1, 4)})],
    {"f": Function(bytes(range(16)), [Relocation(8, "value", 0)])},
    ["v"],
)


def test_what_was_kept_is_what_comes_back(directory: Path) -> None:
    assert cache_get("one") is None
    cache_put("one", ANY)
    assert cache_get("one") == ANY
    assert cache_get("other") is None
    assert [path.name for path in directory.iterdir()] == ["one"]
    assert (directory.stat().st_mode & 0o777, (directory / "one").stat().st_mode & 0o777) == (0o700, 0o600)


@pytest.mark.fault("killed", "a cache that is corrupt", "each byte of a program changed, and the file cut off at each")
def test_a_program_that_is_not_whole_is_none(directory: Path, figures: Figures) -> None:
    cache_put("one", ANY)
    whole = (directory / "one").read_bytes()
    figures["programs loaded"] = f"0 of {2 * len(whole):,}, and the whole one"
    for at in range(len(whole)):
        (directory / "one").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert cache_get("one") is None
        (directory / "one").write_bytes(whole[:at])
        assert cache_get("one") is None
    cache_put("one", ANY)
    assert cache_get("one") == ANY


@as_root
def test_a_program_in_reach_of_another_user_is_none(directory: Path) -> None:
    cache_put("one", ANY)
    for mode in (0o620, 0o602):
        (directory / "one").chmod(mode)
        assert cache_get("one") is None
    (directory / "one").chmod(0o644)
    assert cache_get("one") == ANY
    os.chown(directory / "one", 12345, -1)
    assert cache_get("one") is None


def key(number: int) -> str:
    return f"{number:064x}"


def test_what_was_not_used_for_longest_goes(directory: Path) -> None:
    for n in range(cache._KEPT):
        cache_put(key(n), ANY)
        os.utime(directory / key(n), (n, n))
    (directory / f"{key(99)}.killed").touch()
    os.utime(directory / f"{key(99)}.killed", (0, 0))
    assert cache_get(key(0)) == ANY
    cache_put(key(50), ANY)
    assert {path.name for path in directory.iterdir()} == {key(50), *map(key, range(cache._KEPT))} - {key(1)}


@pytest.mark.fault("access", "a cache directory that is used for more", "CACHE_DIRECTORY with 40 older files of others")
def test_nothing_of_others_is_removed(directory: Path, figures: Figures) -> None:
    directory.mkdir(mode=0o755)
    others = {f"other{n}" for n in range(40)}
    for name in others:
        (directory / name).touch()
        os.utime(directory / name, (0, 0))
    for n in range(cache._KEPT + 5):
        cache_put(key(n), ANY)
    left = {path.name for path in directory.iterdir()}
    assert others <= left
    assert len(left - others) == cache._KEPT
    figures["files of others"] = f"{len(others & left)} of 40 left"


@as_root
@pytest.mark.fault(
    "access",
    "a cache that others can write to",
    "another user's directory, one of all, a link, a pipe in a program's place",
)
def test_a_directory_in_reach_of_another_user_is_not_used(directory: Path, tmp_path: Path, figures: Figures) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    cache_put("one", ANY)
    assert cache_get("one") == ANY
    ways = 0
    for mode, owner in ((0o777, 0), (0o1777, 0), (0o770, 0), (0o700, 12345)):
        directory.chmod(mode)
        os.chown(directory, owner, -1)
        assert cache_get("one") is None  # although the file is root's: it may have been another program's
        cache_put("two", ANY)
        assert [path.name for path in directory.iterdir()] == ["one"]
        ways += 1
    directory.chmod(0o700)
    os.chown(directory, 0, -1)
    (directory / "two").symlink_to(victim)
    os.mkfifo(directory / "three")
    for name in ("two", "three"):
        assert cache_get(name) is None  # and at once
        cache_put(name, ANY)
        assert cache_get(name) == ANY
        ways += 1
    assert victim.read_text() == "precious"
    figures["ways"] = f"{ways}, of which 0 had a program loaded or a file written"


def test_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "file"))
    cache_put("one", ANY)
    assert cache_get("one") is None


def test_where_programs_are_kept(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    assert cache_dir() == directory
    monkeypatch.delenv("CACHE_DIRECTORY")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert cache_dir() == Path("/var/cache/msrtrace")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/msrtrace")
