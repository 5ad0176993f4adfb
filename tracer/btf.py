"""Offsets of structure members, from the BTF that a running kernel publishes of itself and of its modules.

The format is Documentation/bpf/btf.rst. A module's BTF is split: its string offsets continue those of vmlinux,
and so do its type ids, which nothing here needs, since members are looked up by the names of their structures.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

SYS_BTF = Path("/sys/kernel/btf")

_HEADER = struct.Struct("<HBBIIIII")  # struct btf_header
_TYPE = struct.Struct("<III")  # struct btf_type: name_off, info, size or type
_MEMBER = struct.Struct("<III")  # struct btf_member: name_off, type, offset in bits
_KIND_STRUCT = 4
# Bytes that follow a struct btf_type, by kind: fixed, and per element counted in the low 16 bits of info.
_FIXED = {1: 4, 3: 12, 14: 4, 17: 4}
_PER_ELEMENT = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}
_KNOWN_KINDS = 20


class BtfError(Exception):
    """There is no usable BTF, or it lacks what was looked for; the message says which."""


class Btf:
    """The types of one BTF blob; `base` is the blob that a split one continues."""

    def __init__(self, blob: bytes, base: bytes | None = None) -> None:
        try:
            self._types, self._strings = _sections(blob)
            self._base_types, self._base_strings = _sections(base) if base is not None else (b"", b"")
        except struct.error as error:
            raise BtfError(f"truncated BTF: {error}") from None

    @classmethod
    def of_module(cls, module: str, sys_btf: Path = SYS_BTF) -> Btf:
        """The BTF of a loaded MODULE. Raises BtfError without one (CONFIG_DEBUG_INFO_BTF_MODULES)."""
        try:
            return cls((sys_btf / module).read_bytes(), (sys_btf / "vmlinux").read_bytes())
        except OSError as error:
            raise BtfError(f"{error.filename}: {error.strerror}") from None

    @classmethod
    def of_kernel(cls, sys_btf: Path = SYS_BTF) -> Btf:
        """The BTF of the kernel itself, which has the types of everything built into it."""
        try:
            return cls((sys_btf / "vmlinux").read_bytes())
        except OSError as error:
            raise BtfError(f"{sys_btf / 'vmlinux'}: {error.strerror}") from None

    def offset(self, structure: str, member: str) -> int:
        """Where MEMBER begins inside `struct STRUCTURE`, in bytes. Raises BtfError if there is no such thing."""
        found = False
        for name, members in self._structures(structure):
            found = True
            for member_name, bits in members:
                if member_name == member:
                    if bits % 8:
                        raise BtfError(f"struct {name}: {member} is a bit field")
                    return bits // 8
        what = f"member {member} in struct {structure}" if found else f"struct {structure}"
        raise BtfError(f"the BTF has no {what}")

    def bitmap_offset(self) -> int:
        """Where struct vcpu_vmx, and so a struct kvm_vcpu, has the address of its MSR bitmap, in bytes.

        That is vmcs01.msr_bitmap, arch/x86/kvm/vmx/vmx.h and vmcs.h; vmcs01 is the one that the traced functions
        write, also while a nested guest runs.
        """
        return self.offset("vcpu_vmx", "vmcs01") + self.offset("loaded_vmcs", "msr_bitmap")

    def _string(self, offset: int) -> bytes:
        strings = self._base_strings
        if offset >= len(strings):
            strings, offset = self._strings, offset - len(strings)
        return strings[offset : strings.index(b"\0", offset)]

    def _name_offset(self, name: str) -> set[int]:
        """Every string offset that spells NAME as a whole string; cheaper than reading the name of every type."""
        wanted = b"\0" + name.encode() + b"\0"
        offsets: set[int] = set()
        for strings, start in ((self._base_strings, 0), (self._strings, len(self._base_strings))):
            at = strings.find(wanted)
            while at >= 0:
                offsets.add(start + at + 1)
                at = strings.find(wanted, at + 1)
            if strings.startswith(wanted[1:]):
                offsets.add(start)
        return offsets

    def _structures(self, wanted: str) -> Iterator[tuple[str, list[tuple[str, int]]]]:
        """Each structure named WANTED with its members, name and offset in bits: the module's, then the kernel's.

        A type that both know is in the kernel's BTF alone: struct kvm_vcpu is, where KVM is a module too.
        """
        names = self._name_offset(wanted)
        for types in (self._types, self._base_types):
            try:
                for members, kind_flag in _structs(types, names):
                    # With kind_flag the high byte of an offset is the size of a bit field.
                    mask, shift = (0xFFFFFF, 24) if kind_flag else (0xFFFFFFFF, 32)
                    rows = _MEMBER.iter_unpack(members)
                    plain = [(self._string(n).decode(), bits & mask) for n, _, bits in rows if not bits >> shift]
                    yield wanted, plain
            except (struct.error, ValueError) as error:
                raise BtfError(f"malformed BTF: {error}") from None


def _structs(types: bytes, names: set[int]) -> Iterator[tuple[bytes, bool]]:
    """The members, still packed, of each structure in a type section that has one of NAMES; and its kind_flag."""
    at, end = 0, len(types)
    while at < end:
        name, info, _ = _TYPE.unpack_from(types, at)
        at += _TYPE.size
        kind, elements = info >> 24 & 0x1F, info & 0xFFFF
        if kind == 0 or kind >= _KNOWN_KINDS:
            raise BtfError(f"unknown kind {kind} in the BTF")
        size = _FIXED.get(kind, 0) + _PER_ELEMENT.get(kind, 0) * elements
        if kind == _KIND_STRUCT and name in names:
            yield types[at : at + size], bool(info >> 31)
        at += size


def _sections(blob: bytes) -> tuple[bytes, bytes]:
    """The type section and the string section of a blob."""
    magic, _, _, header, types_at, types_size, strings_at, strings_size = _HEADER.unpack_from(blob)
    if magic != 0xEB9F:
        raise BtfError("not BTF of a little-endian machine")
    types, strings = header + types_at, header + strings_at
    return blob[types : types + types_size], blob[strings : strings + strings_size]
