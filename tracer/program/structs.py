# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the members of a C struct are, from the description that BCC makes of a map's values (bpf_table_leaf_desc)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

#: Bytes, by the names that Clang gives types.
_SIZES = {
    "char": 1,
    "unsigned char": 1,
    "unsigned short": 2,
    "int": 4,
    "unsigned int": 4,
    "unsigned long long": 8,
}


class Member(msgspec.Struct, frozen=True):
    """`length` times `size` bytes, from `offset` on."""

    offset: int
    size: int
    length: int = 1

    @property
    def bytes(self) -> int:
        """How many bytes it takes."""
        return self.size * self.length


_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}  # of the module struct


class Record:
    """How a struct of numbers and arrays of them lies in bytes."""

    def __init__(self, members: Mapping[str, Member]) -> None:
        """`members`: all of them, without unions."""
        form, end, first = "<", 0, 0
        self._places: dict[str, int | slice] = {}
        for name, member in sorted(members.items(), key=lambda item: item[1].offset):
            form += f"{member.offset - end}x{member.length}{_CODES[member.size]}"
            self._places[name] = first if member.length == 1 else slice(first, first + member.length)
            end, first = member.offset + member.bytes, first + member.length
        self._struct = struct.Struct(form)

    @property
    def size(self) -> int:
        """In bytes."""
        return self._struct.size

    def read(self, content: bytes, at: int) -> Mapping[str, Any]:
        """The members of the struct at a byte, numbers and tuples of them. Raises ValueError where it is not whole."""
        try:
            numbers = self._struct.unpack_from(content, at)
        except struct.error as error:
            raise ValueError(str(error)) from None
        return {name: numbers[place] for name, place in self._places.items()}


class Content:
    """Bytes that come in parts, and are taken in others: no more is kept of them than a part. False at their end."""

    def __init__(self, parts: Iterable[bytes]) -> None:
        """`parts`: none of them is empty."""
        self._parts, self._part, self._at = iter(parts), b"", 0

    def __bool__(self) -> bool:
        if self._at == len(self._part):
            self._part, self._at = next(self._parts, b""), 0
        return bool(self._part)

    def take(self, size: int) -> bytes:
        """The next bytes. Raises ValueError where there are not as many."""
        while len(self._part) - self._at < size:
            more = next(self._parts, b"")
            if not more:
                raise ValueError(f"{size} bytes are wanted, and fewer are left")
            self._part, self._at = self._part[self._at :] + more, 0
        start, self._at = self._at, self._at + size
        return self._part[start : self._at]


def members(description: str) -> dict[str, Member]:
    """The members of a struct by their names, those of a struct inside as `outer.inner`; none of a plain number.

    `description` is as BCC makes it: `["point", [["x","int"], ["y","int"]], "struct"]`. Raises ValueError if there
    is something in it that is not foreseen, like a bit field.
    """
    described = json.loads(description)
    found: dict[str, Member] = {}
    if isinstance(described, list):
        _place(described, 0, "", found)
    return found


def _place(described: list[Any], start: int, prefix: str, found: dict[str, Member]) -> int:
    """Put members that begin at `start` into `found`; where they end. BCC names the gaps between them, too."""
    _, inner, kind = described
    end = at = start
    for one in inner:
        match one:
            case [name, str(type_)]:
                found[prefix + name] = Member(at, _SIZES[type_])
                size = _SIZES[type_]
            case [name, str(type_), [int(length)]]:
                found[prefix + name] = Member(at, _SIZES[type_], length)
                size = found[prefix + name].bytes
            case [name, [*struct]]:
                size = _place(struct, at, f"{prefix}{name}.", found) - at
            case ["", [*_], "struct" | "struct_packed" | "union"]:
                size = _place(one, at, prefix, found) - at
            case _:
                raise ValueError(f"no plain number, struct, or array of numbers: {json.dumps(one)}")
        end = max(end, at + size)
        at = start if kind == "union" else end
    return end
