# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiled programs in files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
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


def test_a_program_that_is_not_whole_is_none(directory: Path) -> None:
    cache_put("one", ANY)
    whole = (directory / "one").read_bytes()
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


def test_what_was_not_used_for_longest_goes(directory: Path) -> None:
    for n in range(cache._KEPT):
        cache_put(f"{n}", ANY)
        os.utime(directory / f"{n}", (n, n))
    assert cache_get("0") == ANY
    cache_put("new", ANY)
    assert {path.name for path in directory.iterdir()} == {"new", *map(str, range(cache._KEPT))} - {"1"}


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
