# SPDX-License-Identifier: GPL-2.0-or-later
"""What is put into the instructions of a program when it is loaded: maps, values, functions of the kernel."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from tracer.program.program import (
    Function,
    Relocation,
    Variant,
)

# struct bpf_insn: code, the registers (source in the high half), offset, immediate
_INSTRUCTION = struct.Struct("<BBhi")
_LOAD_64, _CALL, _ATOMIC = 0x18, 0x85, 0xDB
_PSEUDO_MAP_FD, _PSEUDO_KFUNC = 1, 2
_CMPXCHG = 0xF1  # of an atomic operation
_GO_ON = _INSTRUCTION.pack(0x05, 0, 0, 0)  # a jump to the next instruction
_VALUE_MARK = 0x6D737274  # the high half of what stands for a value in bpf/values.h
_FIRST_KFUNC = 0x7F000001  # and the first number that stands for a function of the kernel


def relocated(code: bytes, maps: Mapping[int, int]) -> Function:
    """The function that BCC compiled to `code`; `maps`: the indices of maps by the descriptors that are there now."""
    found: list[Relocation] = []
    without = bytearray(code)
    wide = False
    for n, (operation, registers, _, number) in enumerate(_INSTRUCTION.iter_unpack(code)):
        at = n * _INSTRUCTION.size
        if wide:  # the second half of an instruction
            wide = False
        elif operation == _LOAD_64:
            wide = True
            if registers >> 4 == _PSEUDO_MAP_FD:
                found.append(Relocation(at, "map", maps[number]))
                without[at + 4 : at + 8] = bytes(4)
            elif struct.unpack_from("<12xI", code, at)[0] == _VALUE_MARK:
                found.append(Relocation(at, "value", number))
        elif operation == _CALL and registers == 0 and number >= _FIRST_KFUNC:
            found.append(Relocation(at, "kfunc", number))
        elif operation == _ATOMIC and number == _CMPXCHG:
            found.append(Relocation(at, "cmpxchg", number))
    return Function(bytes(without), found)


def resolved(function: Function, maps: list[int], names: list[str], variant: Variant) -> bytes:
    """The code of `function` with descriptors of `maps`, values by their `names`, and the kernel's functions put in."""
    code = bytearray(function.code)
    for one in function.relocations:
        immediate = one.at + 4
        if one.what == "map":
            struct.pack_into("<i", code, immediate, maps[one.number])
        elif one.what == "value":
            value = variant.values.get(names[one.number], 0)
            struct.pack_into("<I4xI", code, immediate, value & 0xFFFFFFFF, value >> 32)
        elif one.what == "cmpxchg" and not variant.cmpxchg:
            code[one.at : immediate + 4] = _GO_ON
        elif one.what == "kfunc" and one.number in variant.kfuncs:
            _INSTRUCTION.pack_into(code, one.at, _CALL, _PSEUDO_KFUNC << 4, 0, variant.kfuncs[one.number])
    return bytes(code)
