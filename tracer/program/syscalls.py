# SPDX-License-Identifier: GPL-2.0-or-later
"""bpf(2): BPF programs and maps, from their loading to their end. Programs are attached by bcc_library.py.

BCC's library has no way to run a program once or to find a module's BTF, and that of Debian 12 (0.26) loses the BTF of
a program for a module's function (attach_btf_obj_fd, bcc_prog_load_xattr()). Numbers and structures are those of
include/uapi/linux/bpf.h, on x86-64.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
from collections.abc import Callable, Mapping
from collections.abc import Iterator as Parts
from dataclasses import dataclass
from itertools import compress
from operator import itemgetter
from pathlib import Path

from tracer.program.bpf_attr import BtfInfo, Element, Id, Info, IterCreate, LinkCreate, MapCreate, ProgLoad, TestRun
from tracer.program.structs import Member

_WORD = _INSTRUCTION_SIZE = 8  # bytes
_libc = ctypes.CDLL(None, use_errno=True)
_SYS_BPF = 321

# enum bpf_cmd
_MAP_CREATE, _, _MAP_UPDATE_ELEM, _MAP_DELETE_ELEM, _MAP_GET_NEXT_KEY, _PROG_LOAD = range(6)
_PROG_TEST_RUN, _OBJ_GET_INFO_BY_FD = 10, 15
_BTF_GET_FD_BY_ID, _BTF_GET_NEXT_ID = 19, 23
_LINK_CREATE, _ITER_CREATE = 28, 33
_TRACE_ITER = 28  # enum bpf_attach_type
_READ = 1 << 18  # bytes; the kernel gives at most 32 KiB at a time

MMAPABLE = 1 << 10  # BPF_F_MMAPABLE


def _bpf(command: int, attributes: ctypes.Structure) -> int:
    """The result; the kernel may have written to the attributes. Raises OSError."""
    result = int(_libc.syscall(_SYS_BPF, command, ctypes.byref(attributes), ctypes.sizeof(attributes)))
    if result < 0:
        raise last_error()
    return result


def last_error() -> OSError:
    """What a function of the C library that was loaded with `use_errno` has failed by, in this thread."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def create_map(name: str, kind: int, *, key_size: int, value_size: int, max_entries: int, flags: int) -> int:
    """A new map's descriptor; `kind` is of enum bpf_map_type, sizes are in bytes. Raises OSError."""
    attributes = MapCreate(
        map_type=kind,
        key_size=key_size,
        value_size=value_size,
        max_entries=max_entries,
        map_flags=flags,
        map_name=_object_name(name),
    )
    return _bpf(_MAP_CREATE, attributes)


def load_program(
    name: str, kind: int, code: bytes, *, attach_type: int, function: int, btf: int, log: bytearray | None
) -> int:
    """The descriptor of a program of the instructions `code`; `kind` and `attach_type` are of enums of bpf.h.

    `function`: the BTF id of what a tracing program is for; `btf`: a descriptor of the module's BTF that has it, or 0.
    `log` gets what the verifier says, ended by a 0. Raises OSError.
    """
    instructions, license_ = bytearray(code), bytearray(b"GPL\0")
    attributes = ProgLoad(
        prog_type=kind,
        insn_cnt=len(code) // _INSTRUCTION_SIZE,
        insns=_address(instructions),
        license=_address(license_),
        prog_name=_object_name(name),
        expected_attach_type=attach_type,
        attach_btf_id=function,
        attach_btf_obj_fd=btf,
    )
    if log:
        attributes.log_level, attributes.log_size, attributes.log_buf = 1, len(log), _address(log)
    return _bpf(_PROG_LOAD, attributes)


def _object_name(name: str) -> bytes:
    return name.encode()[:15]  # BPF_OBJ_NAME_LEN, with a 0 at the end


def btf_of_module(module: str) -> int:
    """A descriptor of the BTF of a loaded `module`. Raises OSError, without CAP_SYS_ADMIN too."""
    following = Id()
    while True:
        following.id = following.next_id
        _bpf(_BTF_GET_NEXT_ID, following)  # ENOENT after the last
        try:
            fd = _bpf(_BTF_GET_FD_BY_ID, Id(id=following.next_id))
        except OSError as error:
            if error.errno == errno.ENOENT:  # its module went in the meantime
                continue
            raise
        name = bytearray(64)
        info = BtfInfo(name=_address(name), name_len=len(name))  # the types themselves are not wanted
        _bpf(_OBJ_GET_INFO_BY_FD, Info(bpf_fd=fd, info_len=ctypes.sizeof(info), info=ctypes.addressof(info)))
        if name[: name.index(0)].decode() == module:
            return fd
        os.close(fd)


@dataclass(frozen=True)
class BpfMap:
    """A BPF map by its descriptor, to be filled and emptied; sizes in bytes."""

    fd: int
    key_size: int
    value_size: int

    def keys(self) -> list[bytes]:
        """Every key. Raises OSError."""
        found: list[bytes] = []
        key, following = bytearray(), bytearray(self.key_size)
        while True:
            attributes = Element(map_fd=self.fd, key=_address(key) if key else 0, value=_address(following))
            try:
                _bpf(_MAP_GET_NEXT_KEY, attributes)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return found
                raise
            key = bytearray(following)
            found.append(bytes(key))

    def update(self, key: bytes, value: bytes) -> None:
        """Set the value at `key`. Raises OSError."""
        name, content = bytearray(key), bytearray(value)
        _bpf(_MAP_UPDATE_ELEM, Element(map_fd=self.fd, key=_address(name), value=_address(content)))

    def delete(self, key: bytes) -> None:
        """Remove `key`, if it is there. Raises OSError."""
        name = bytearray(key)
        try:
            _bpf(_MAP_DELETE_ELEM, Element(map_fd=self.fd, key=_address(name)))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise


def _address(buffer: bytearray) -> int:
    return ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))


class MappedArray:
    """An array (BPF_F_MMAPABLE) in the memory of this process: reading it asks nothing of the kernel.

    So it keeps no probe from running, as other ways to read a map do: bpf(2) raises bpf_prog_active on its CPU
    (bpf_disable_instrumentation(), kernel/bpf/syscall.c), may be preempted then, and meanwhile trace_call_bpf() runs
    no program at a kprobe. A member is read at once, and several are in the order of their addresses.
    """

    def __init__(self, fd: int, value_size: int, entries: int, members: Mapping[str, Member]) -> None:
        """`fd`: of the map; `value_size` in bytes, a multiple of 8; `members`: of a value. Raises OSError."""
        self.entries, self.members, self._value_size = entries, members, value_size
        self._memory = mmap.mmap(fd, value_size * entries, flags=mmap.MAP_SHARED)
        whole = memoryview(self._memory)
        self._views = {1: whole, 2: whole.cast("H"), 4: whole.cast("I"), _WORD: whole.cast("Q")}

    def get(self, index: int, member: str) -> int:
        """A `member` of the value at `index`."""
        size, at = self._place(index, member)
        return self._views[size][at]

    def set(self, index: int, member: str, value: int) -> None:
        """Set a `member` of the value at `index`."""
        size, at = self._place(index, member)
        self._views[size][at] = value

    def _place(self, index: int, member: str) -> tuple[int, int]:
        """The size of a `member`, and where it is among all that have that size."""
        found = self.members[member]
        return found.size, (index * self._value_size + found.offset) // found.size

    def text(self, index: int, member: str) -> bytes:
        """A `member` that is an array of characters, of the value at `index`, up to the first 0."""
        _, at = self._place(index, member)
        return bytes(self._views[1][at : at + self.members[member].length]).partition(b"\0")[0]

    def raw(self, index: int, size: int) -> bytes:
        """The first `size` bytes of the value at `index`."""
        start = index * self._value_size
        return bytes(self._views[1][start : start + size])

    def getter(self, *members: str) -> Callable[[int], tuple[int, ...]]:
        """What gives the MEMBERS, which are words or arrays of them, of the value at an index, quickly."""
        places: list[int] = []
        for member in (self.members[name] for name in members):
            if member.size != _WORD:
                raise ValueError("a member that is not a word")
            places += range(member.offset // _WORD, (member.offset + member.bytes) // _WORD)
        pick, words, stride = itemgetter(*places), self._views[_WORD], self._value_size // _WORD

        def get(index: int) -> tuple[int, ...]:
            start = index * stride
            return pick(words[start : start + stride].tolist())  # type: ignore[no-any-return] # one of several

        return get

    def used(self, member: str) -> list[int]:
        """The indices of the values whose `member` is not 0."""
        size, first = self._place(0, member)
        return list(compress(range(self.entries), self._views[size][first :: self._value_size // size].tolist()))

    def clear(self) -> None:
        """Make all of it 0."""
        self._memory[:] = bytes(len(self._memory))

    def close(self) -> None:
        """Give the memory back; the map stays as long as it has a descriptor or a program."""
        for view in self._views.values():
            view.release()
        self._memory.close()


def run_program(program: int, *arguments: int) -> int:
    """Run `program` (of type raw tracepoint) once, here and now; what it returns. Raises OSError."""
    context = (ctypes.c_uint64 * len(arguments))(*arguments)
    attributes = TestRun(prog_fd=program, ctx_size_in=ctypes.sizeof(context), ctx_in=ctypes.addressof(context))
    _bpf(_PROG_TEST_RUN, attributes)
    return int(attributes.retval)


class Iterator:
    """An iterator program (BPF_TRACE_ITER) that is ready to run: `read` needs no rights."""

    def __init__(self, program: int) -> None:
        """`program` is its descriptor, which may be closed afterwards. Raises OSError."""
        self._link = _bpf(_LINK_CREATE, LinkCreate(prog_fd=program, attach_type=_TRACE_ITER))

    def read(self) -> bytes:
        """Run it over everything; what it wrote. Raises OSError."""
        return b"".join(self.parts())

    def parts(self) -> Parts[bytes]:
        """The same in parts, as the kernel gives it: each ends anywhere."""
        run = _bpf(_ITER_CREATE, IterCreate(link_fd=self._link))
        try:
            while True:
                try:
                    part = os.read(run, _READ)
                except BlockingIOError:  # a million objects that wrote nothing: bpf_seq_read(), kernel/bpf/bpf_iter.c
                    continue
                if not part:
                    return
                yield part
        finally:
            os.close(run)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._link)


def misses(program: int) -> int:
    """Runs of `program` that the kernel skipped since another ran on that CPU (bpf_prog->stats.misses), if it tells."""
    try:
        text = Path(f"/proc/self/fdinfo/{program}").read_text()
    except OSError:
        return 0
    found = re.search(r"^recursion_misses:\s*(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0
