# SPDX-License-Identifier: GPL-2.0-or-later
"""Report files are written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import Figures
from needs import ROOT_ALONE

from tracer.model.errors import MsrtraceError
from tracer.report.file import check_writable, write

as_root = pytest.mark.skipif(os.geteuid() != 0, reason=ROOT_ALONE)

OLD, NEW = b"old" * 100_000, b"new" * 100_000


def names(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0])
def test_a_new_file_honours_the_umask(tmp_path: Path, umask: Callable[[int], int], mask: int) -> None:
    umask(mask)
    file = tmp_path / ("\u6f22" * 85)  # 255 bytes: there is no longer name
    check_writable(file)
    assert names(tmp_path) == []
    write(file, NEW)
    assert (file.read_bytes(), names(tmp_path)) == (NEW, [file.name])
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask
    assert umask(0) == mask


def test_the_mode_of_a_file_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(OLD)
    file.chmod(0o640)
    write(file, NEW)
    assert (file.read_bytes(), stat.S_IMODE(file.stat().st_mode)) == (NEW, 0o640)


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    file, link, nowhere = tmp_path / "there/file", tmp_path / "link", tmp_path / "nowhere"
    file.write_bytes(OLD)
    link.symlink_to(file)
    nowhere.symlink_to("there/other")
    for path in (link, nowhere):
        check_writable(path)
        write(path, NEW)
        assert path.is_symlink()
        assert path.read_bytes() == NEW
    assert names(tmp_path / "there") == ["file", "other"]


def test_readers_see_the_old_file_or_the_new(tmp_path: Path) -> None:
    file, stop, torn = tmp_path / "a.json", threading.Event(), list[bytes]()
    write(file, OLD)

    def look() -> None:
        while not stop.is_set():
            seen = file.read_bytes()
            if seen not in (OLD, NEW):
                torn.append(seen)

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(40):
        write(file, NEW)
        write(file, OLD)
    stop.set()
    for reader in readers:
        reader.join()
    assert torn == []
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("can", [True, False])
def test_until_it_is_whole_a_new_file_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can: bool) -> None:
    """Where a file system can do that, a process that is killed while it writes leaves nothing."""
    seen, sync, make = list[str](), os.fsync, os.open

    def look(descriptor: int) -> None:
        seen.append(" ".join(names(tmp_path)))
        sync(descriptor)

    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not in this file system")
        return make(path, flags, mode)

    monkeypatch.setattr(os, "fsync", look)
    if not can:
        monkeypatch.setattr(os, "open", refuse)
    write(tmp_path / "a.json", NEW)
    write(tmp_path / "a.json", OLD)
    assert (tmp_path / "a.json").read_bytes() == OLD
    assert names(tmp_path) == ["a.json"]
    assert [re.sub(r"\.[0-9a-f]{8}", "", there) for there in seen] == (
        ["", "a.json"] if can else [".a.json", ".a.json a.json"]
    )


@pytest.mark.parametrize("step", ["fsync", "fchmod", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(OLD)

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises((MsrtraceError, KeyboardInterrupt)) as raised:
        write(file, NEW)
    assert (file.read_bytes(), names(tmp_path)) == (OLD, ["a.json"])
    if isinstance(error, OSError):
        assert str(raised.value) == f"cannot write {file}: No space left on device"


def test_pipes_are_written_to(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    check_writable(pipe)
    write(pipe, NEW)
    reader.join()
    assert got == [NEW]
    assert pipe.is_fifo()


WRITER = "import sys; from pathlib import Path; from tracer.report.file import *; print('before', flush=True); "


WRITER += "check_writable(Path(sys.argv[1])); write(Path(sys.argv[1]), b'text'); print(' after')"


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("mode", ["pipe", "wb", "ab"])
def test_standard_output_is_appended_to(tmp_path: Path, path: str, mode: str) -> None:
    """The file that the shell opened is appended to, not replaced."""
    command = [sys.executable, "-c", WRITER, path]
    if mode == "pipe":
        assert subprocess.run(command, capture_output=True, check=True).stdout == b"before\ntext after\n"
        return
    (tmp_path / "log").write_bytes(b"old\n")
    with (tmp_path / "log").open(mode) as log:
        subprocess.run(command, stdout=log, check=True)
    text = (tmp_path / "log").read_bytes()
    assert text.startswith(b"before\n" if mode == "wb" else b"old\nbefore\n")
    assert mode == "wb" or text == b"old\nbefore\ntext after\n"
    assert names(tmp_path) == ["log"]


def unwritable(function: Callable[[Path], None], path: Path) -> str:
    with pytest.raises(MsrtraceError) as error:
        function(path)
    return str(error.value).removeprefix(f"cannot write {path}: ")


def test_an_unwritable_path_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    for path in ("none/a.json", "file/a.json", "circle", "/proc/a.json"):
        assert unwritable(lambda file: write(file, NEW), tmp_path / path)
        assert unwritable(check_writable, tmp_path / path)
    assert unwritable(check_writable, tmp_path / "none/a.json") == f"there is no directory {tmp_path}/none"
    assert unwritable(check_writable, tmp_path / "circle") == "Too many levels of symbolic links"
    for path, why in {"/dev/full": "No space left on device", "x" * 256: "File name too long"}.items():
        assert unwritable(lambda file: write(file, NEW), tmp_path / path) == why
    assert names(tmp_path) == ["circle", "file"]


def test_missing_permission_to_write_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everything
    assert unwritable(check_writable, Path("/dev/stdout")) == "Permission denied"


# --- where other users can write, too ---


@pytest.fixture
def everybodys(tmp_path: Path) -> Path:
    """A directory like /tmp."""
    directory = tmp_path / "everybodys"
    directory.mkdir()
    directory.chmod(0o1777)
    return directory


@as_root
@pytest.mark.fault(
    "access", "-o in /tmp, where something is planted", "a link to a file of root, a link to nothing, a file, a pipe"
)
def test_nothing_is_written_through_what_another_user_has_planted(
    everybodys: Path, tmp_path: Path, figures: Figures
) -> None:
    """Where fs.protected_symlinks and the like are off, too."""
    victim = tmp_path / "victim"
    victim.write_bytes(OLD)
    (everybodys / "link").symlink_to(victim)
    (everybodys / "nowhere").symlink_to(tmp_path / "made")
    (everybodys / "file").write_bytes(OLD)
    os.mkfifo(everybodys / "pipe")
    planted = sorted(everybodys.iterdir())
    for path in planted:
        os.chown(path, 12345, 12345, follow_symlinks=False)
    for path in planted:
        for function in (check_writable, lambda file: write(file, NEW)):
            why = f"it belongs to another user, and everybody may create files in {everybodys}"
            assert unwritable(function, path) == why
    assert sorted(everybodys.iterdir()) == planted
    assert (victim.read_bytes(), (everybodys / "file").read_bytes()) == (OLD, OLD)
    assert not (tmp_path / "made").exists()
    own = everybodys / "own"
    own.symlink_to(victim)
    write(own, NEW)
    assert victim.read_bytes() == NEW
    figures["refused"] = f"{len(planted)} of {len(planted)}; a link of one's own is followed"


@as_root
@pytest.mark.fault(
    "access", "-o in another user's directory", "the new file is replaced by a link before it gets its owner"
)
def test_owner_and_mode_are_those_of_the_file_that_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: Figures
) -> None:
    victim, file = tmp_path / "victim", tmp_path / "a.json"
    victim.write_bytes(OLD)
    victim.chmod(0o600)
    file.write_bytes(OLD)
    file.chmod(0o4777)
    os.chown(file, 12345, 12345)
    file.chmod(0o4777)
    make = os.open

    def swap(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not in this file system")
        descriptor = make(path, flags, mode)
        if flags & os.O_CREAT:
            os.unlink(path)
            os.symlink(victim, path)
        return descriptor

    monkeypatch.setattr(os, "open", swap)
    write(file, NEW)
    status = victim.stat()
    assert (victim.read_bytes(), status.st_uid, stat.S_IMODE(status.st_mode)) == (OLD, 0, 0o600)
    monkeypatch.undo()
    file.unlink()
    file.write_bytes(OLD)
    os.chown(file, 12345, 12345)
    file.chmod(0o4777)
    write(file, NEW)
    assert (file.stat().st_uid, stat.S_IMODE(file.stat().st_mode)) == (12345, 0o777)  # and no longer setuid
    figures["owner and mode of root's file"] = "as before"
