# SPDX-License-Identifier: GPL-2.0-or-later
"""Offsets of structure members and ids of functions, from the BTF of the running kernel and its modules.

The format is in Documentation/bpf/btf.rst. A module's BTF is split: its string offsets and type ids continue those of
vmlinux.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

SYS_BTF = Path("/sys/kernel/btf")

_HEADER = struct.Struct("<HBBIIIII")  # struct btf_header
_TYPE = struct.Struct("<III")  # struct btf_type: name_off, info, size or type
_MEMBER = struct.Struct("<III")  # struct btf_member: name_off, type, offset in bits
_KIND_STRUCT, _KIND_FUNC = 4, 12
# The number of 32-bit words of a type (struct btf_type and what follows it), by the high byte of its info, whose low 5
# bits are the kind: a fixed part, and a part for each of the elements (vlen, the low 16 bits of info).
_UNKNOWN = 1 << 40  # longer than any section: there is no such kind
_FIXED = [_UNKNOWN, 4, 3, 6, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 3, 3, 4, 3, 3, *[_UNKNOWN] * 12] * 8
_PER_ELEMENT = [3 if kind in (4, 5, 15, 19) else 2 if kind in (6, 13) else 0 for kind in range(32)] * 8
_WORD = 4  # bytes


class BtfError(Exception):
    """There is no usable BTF, or it lacks a type or a member; the message says which."""


_kept: list[dict[Path, Btf]] = []  # of each context that is open


@contextmanager
def kernel_btf_kept() -> Iterator[None]:
    """In this context the kernel's BTF is read once; then it is let go, as it takes 10 MB."""
    _kept.append({})
    try:
        yield
    finally:
        _kept.pop()


class Btf:
    """The types of one BTF blob; `base` is the BTF that a split one continues."""

    def __init__(self, blob: bytes, base: Btf | None = None) -> None:
        try:
            types, self._strings = _sections(blob)
        except struct.error as error:
            raise BtfError(f"truncated BTF: {error}") from None
        self._types, self.base = _Types(types), base
        self._looked_up: dict[str, list[list[tuple[str, int]]]] = {}

    @classmethod
    def of_module(cls, module: str, sys_btf: Path = SYS_BTF, base: Btf | None = None) -> Btf:
        """The BTF of a loaded module; `base` is the kernel's, if already read. Raises BtfError if either is missing."""
        try:
            return cls((sys_btf / module).read_bytes(), base or cls.of_kernel(sys_btf))
        except OSError as error:
            raise BtfError(f"{error.filename}: {error.strerror}") from None

    @classmethod
    def of_kernel(cls, sys_btf: Path = SYS_BTF) -> Btf:
        """The BTF of the kernel image, with the types of everything built into it. Raises BtfError."""
        path = sys_btf / "vmlinux"
        kept = _kept[-1] if _kept else {}
        try:
            kept[path] = kept.get(path) or cls(path.read_bytes())
        except OSError as error:
            raise BtfError(f"{path}: {error.strerror}") from None
        return kept[path]

    def offset(self, structure: str, member: str) -> int:
        """The offset of a member in a structure, in bytes. Raises BtfError if there is no such structure or member."""
        found = self._looked_up.get(structure)
        if found is None:
            found = self._looked_up[structure] = list(self._structures(structure))
        for members in found:
            for name, bits in members:
                if name == member:
                    if bits % 8:
                        raise BtfError(f"struct {structure}: {member} is a bit field")
                    return bits // 8
        what = f"member {member} in struct {structure}" if found else f"struct {structure}"
        raise BtfError(f"the BTF has no {what}")

    def nested_offset(self, path: Iterable[tuple[str, str]]) -> int:
        """The offset, in bytes, of nested members, given as pairs of structure and member. Raises BtfError."""
        return sum(self.offset(structure, member) for structure, member in path)

    def size(self, structure: str) -> int:
        """The size of a structure, in bytes. Raises BtfError if there is no such structure."""
        names = self._name_offset(structure)
        for types in (self._types, *((self.base._types,) if self.base else ())):
            for size in types.sizes(names):
                return int(size)
        raise BtfError(f"the BTF has no struct {structure}")

    def kernel_ids(self, function: str, structure: str) -> tuple[int, int]:
        """The BTF ids of a function and a structure of the kernel image. Raises BtfError unless it has both."""
        kernel = self.base or self
        return kernel._id(_KIND_FUNC, function), kernel._id(_KIND_STRUCT, structure)

    def function_id(self, name: str) -> int:
        """The BTF id of a function of the module or, if this is not a module's BTF, of the kernel. Raises BtfError."""
        return self._id(_KIND_FUNC, name)

    def _id(self, kind: int, name: str) -> int:
        found = self._types.of(kind, self._name_offset(name))
        if not found:
            raise BtfError(f"the BTF has no {name}")
        return found[0][0] + (len(self.base._types) if self.base else 0)

    def _string(self, offset: int) -> bytes:
        strings = self.base._strings if self.base else self._strings
        if offset >= len(strings):
            strings, offset = self._strings, offset - len(strings)
        return strings[offset : strings.index(b"\0", offset)]

    def _name_offset(self, name: str) -> set[int]:
        """Every offset at which the name is stored as a whole string; cheaper than reading the name of every type."""
        wanted = b"\0" + name.encode() + b"\0"
        offsets: set[int] = set()
        start = 0
        for strings in (*((self.base._strings,) if self.base else ()), self._strings):
            at = strings.find(wanted)
            while at >= 0:
                offsets.add(start + at + 1)
                at = strings.find(wanted, at + 1)
            if strings.startswith(wanted[1:]):
                offsets.add(start)
            start += len(strings)
        return offsets

    def _structures(self, wanted: str) -> Iterator[list[tuple[str, int]]]:
        """The members (name, offset in bits) of each structure of that name: the module's, then the kernel's.

        A type that both have is only in the kernel's BTF: struct kvm_vcpu is, even where KVM is a module.
        """
        names = self._name_offset(wanted)
        for types in (self._types, *((self.base._types,) if self.base else ())):
            try:
                for members, kind_flag in types.structures(names):
                    # With kind_flag the high byte of an offset is the size of a bit field.
                    mask, shift = (0xFFFFFF, 24) if kind_flag else (0xFFFFFFFF, 32)
                    rows = _MEMBER.iter_unpack(members)
                    yield [(self._string(n).decode(), bits & mask) for n, _, bits in rows if not bits >> shift]
            except (struct.error, ValueError) as error:
                raise BtfError(f"malformed BTF: {error}") from None


class _Types:
    """A type section, with an index of the name and the position (in words) of each type."""

    def __init__(self, section: bytes) -> None:
        self._section = section

    @cached_property
    def _found(self) -> tuple[bytes, array[int]]:
        """The offset of each type's name, packed, and its position in words."""
        whole = len(self._section) // _WORD * _WORD
        words = memoryview(self._section)[:whole].cast("I")
        places, at, last = array("I"), 0, len(words) - 1
        place, fixed, per_element = places.append, _FIXED, _PER_ELEMENT
        while at < last:  # about 100,000 times, at every start
            place(at)
            info = words[at + 1]
            at += fixed[info >> 24] + per_element[info >> 24] * (info & 0xFFFF)
        if at >= _UNKNOWN:
            raise BtfError(f"unknown kind {info >> 24 & 0x1F} in the BTF")
        if at * _WORD != len(self._section):
            raise BtfError("truncated BTF: its last type is incomplete")
        return array("I", map(words.__getitem__, places)).tobytes(), places

    def __len__(self) -> int:
        """How many types there are."""
        return len(self._found[1])

    def of(self, kind: int, wanted: set[int]) -> list[tuple[int, int]]:
        """The id and the position (in bytes) of each type of a kind and name. Ids count from 1 within the section."""
        names, places = self._found
        numbers = []
        for name in (offset.to_bytes(_WORD, "little") for offset in wanted):
            at = names.find(name)  # 20 times as fast as to compare numbers
            while at >= 0:
                if at % _WORD == 0:
                    numbers.append(at // _WORD + 1)
                at = names.find(name, at + 1)
        return [
            (number, at)
            for number in sorted(numbers)
            for at in (places[number - 1] * _WORD,)
            if _TYPE.unpack_from(self._section, at)[1] >> 24 & 0x1F == kind
        ]

    def structures(self, wanted: set[int]) -> Iterator[tuple[bytes, bool]]:
        """The packed members of each structure of that name, and its kind_flag."""
        for _, at in self.of(_KIND_STRUCT, wanted):
            info, start = _TYPE.unpack_from(self._section, at)[1], at + _TYPE.size
            yield self._section[start : start + _MEMBER.size * (info & 0xFFFF)], bool(info >> 31)

    def sizes(self, wanted: set[int]) -> Iterator[int]:
        """The size of each structure of that name."""
        for _, at in self.of(_KIND_STRUCT, wanted):
            yield _TYPE.unpack_from(self._section, at)[2]


def _sections(blob: bytes) -> tuple[bytes, bytes]:
    """The type section and the string section of a blob."""
    magic, _, _, header, types_at, types_size, strings_at, strings_size = _HEADER.unpack_from(blob)
    if magic != 0xEB9F:
        raise BtfError("not little-endian BTF")
    types, strings = header + types_at, header + strings_at
    return blob[types : types + types_size], blob[strings : strings + strings_size]
