# SPDX-License-Identifier: GPL-2.0-or-later
"""Maps of the kernel."""

from __future__ import annotations

import os
import struct

import pytest
from needs import ROOT_ALONE

from tracer.program import syscalls
from tracer.program.structs import Member
from tracer.program.syscalls import MMAPABLE, BpfMap, MappedArray, create_map

as_root = pytest.mark.skipif(os.geteuid() != 0, reason=ROOT_ALONE)


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


def test_an_iterator_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it wrote nothing for a million objects: EAGAIN, kernel/bpf/bpf_iter.c."""
    parts: list[bytes | OSError] = [b"one", BlockingIOError(), b"other", b""]
    closed: list[int] = []

    def read(fd: int, _: int) -> bytes:
        assert fd == 7
        part = parts.pop(0)
        if isinstance(part, OSError):
            raise part
        return part

    monkeypatch.setattr(syscalls, "_bpf", lambda *_: 7)
    iterator = syscalls.Iterator(5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "read", read)
        patch.setattr(os, "close", closed.append)
        assert iterator.read() == b"oneother"
        parts = [b"one", OSError(7, "Argument list too long")]
        with pytest.raises(OSError, match="too long"):
            iterator.read()
    assert closed == [7, 7]
