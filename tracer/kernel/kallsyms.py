# SPDX-License-Identifier: GPL-2.0-or-later
"""The lines of /proc/kallsyms and /proc/modules: 200,000 of the former, so only few are parsed."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from tracer.model.symbol_name import plain_name

#: Types of symbols that are not in the module that lists them, such as those a livepatch refers to, or that have no
#: section in it (elf_type(), kernel/module/kallsyms.c).
_ELSEWHERE = b"aAuU?"

#: Suffixes of what has an address other than the function's: code that was moved out of it, and a jump to it.
_NOT_ITSELF = re.compile(r"\.(cold|part|__part|cfi_jt)(\.|$)")

#: Hex digits of an address, and of its page number, at the start of a line.
ADDRESS, _PAGE = 16, 13
_PAGE_SHIFT = 12
_CHUNK = 1 << 16  # bytes; the file has 20 MB, and larger buffers cost more than they save


def scan(file: BinaryIO, names: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """The lines with one of `names`; and, in chunks, all lines of modules, which follow those of the image."""
    named: list[bytes] = []
    listed: list[bytes] = []
    rest = b""
    while chunk := file.read(_CHUNK):
        whole, newline, following = (rest + chunk).rpartition(b"\n")
        lines, rest = whole + newline, following
        for name in names:
            named += lines_with(name, lines)
        if listed:
            listed.append(lines)
        elif (at := lines.find(b"\t[")) >= 0:
            listed.append(lines[lines.rfind(b"\n", 0, at) + 1 :])
    return named, listed


def lines_with(part: bytes, lines: bytes) -> list[bytes]:
    """The lines, with their ends, that have `part`."""
    found = []
    at = lines.find(part)
    while at >= 0:
        end = lines.find(b"\n", at + len(part) - 1) + 1
        found.append(lines[lines.rfind(b"\n", 0, at) + 1 : end])
        at = lines.find(part, end)
    return found


def rows_of(module: str, listed: list[bytes]) -> list[bytes]:
    """The lines of a module, from those that `scan` has listed."""
    end = f"\t[{module}]\n".encode()
    return [row for lines in listed for row in lines_with(end, lines)]


def module_of(row: bytes) -> str | None:
    """The module of a line, or None for the kernel image."""
    _, tab, module = row.decode(errors="replace").rstrip().partition("\t[")
    return module.rstrip("]") if tab else None


def bounds(rows: Mapping[str, list[bytes]], listed: list[bytes], modules: Mapping[str, range]) -> set[int]:
    """The addresses at which symbols of any kind begin.

    Of the modules in `rows`, every symbol. Other modules have too many: where their code begins is enough, if
    `modules` has it. Otherwise the pages with their symbols are used, as modules never share a page
    (kernel/module/main.c, mm/execmem.c); where they seem to, their symbols in that page are taken one by one.
    """
    kept = [row for of_module in rows.values() for row in of_module]
    pages, others = {row[:_PAGE] for row in kept}, set[bytes]()
    if rows.keys() <= modules.keys():
        listed = []
    ends = tuple(f"\t[{module}]".encode() for module in rows)
    for lines in (piece.splitlines() for piece in listed):
        others.update([line[:_PAGE] for line in lines])
        kept += [line for line in lines if line[:_PAGE] in pages and not line.endswith(ends)]
    bounds = {int(row[:ADDRESS], 16) for row in kept if row[ADDRESS + 1 : ADDRESS + 2] not in _ELSEWHERE}
    bounds.update(module.start for module in modules.values())
    return bounds.union(int(page, 16) << _PAGE_SHIFT for page in others - pages)


def loaded_modules(modules: Path) -> dict[str, range]:
    """Upper bounds of the address ranges of modules, from /proc/modules: name, size, users, used by, state, address.

    Since 6.4 the size is the sum over the separate parts of a module, and the address that of its code (m_show(),
    kernel/module/procfs.c). Hidden addresses are 0.
    """
    try:
        lines = [line.split() for line in modules.read_text().splitlines()]
        places = {name: (int(at, 16), int(size)) for name, size, _, _, _, at, *_ in lines}
    except (OSError, ValueError):  # a kernel without modules, or a malformed file
        return {}
    return {name: range(at, at + size) for name, (at, size) in places.items() if at}


def places_of(
    named: Sequence[bytes], listed: list[bytes], names: Collection[str], modules: Collection[str]
) -> dict[str, range]:
    """Where functions and data of those names are, from what `scan` found: in one of `modules`, or else in the image.

    A range goes to the next symbol of the module, for data has no size here; in the image it is empty. What has no
    address, as they are hidden, is missing. A name without a suffix of a compiler goes before one that has some.
    """
    found: dict[str, tuple[tuple[bool, bool], int, str]] = {}
    for row in named:
        address, _, name, *module = row.decode(errors="replace").split()
        plain, home, start = plain_name(name), module[0].strip("[]") if module else "", int(address, 16)
        if plain in names and (home in modules or not home) and start and not _NOT_ITSELF.search(name):
            found[plain] = max(found.get(plain, ((False, False), 0, "")), ((bool(home), name == plain), start, home))
    return {name: range(start, _end(start, home, listed)) for name, (_, start, home) in found.items()}


def _end(start: int, module: str, listed: list[bytes]) -> int:
    """Where the next symbol of a module is; the start itself in the image."""
    rows = rows_of(module, listed) if module else []
    here = (int(row[:ADDRESS], 16) for row in rows if row[ADDRESS + 1 : ADDRESS + 2] not in _ELSEWHERE)
    return min((address for address in here if address > start), default=start)
