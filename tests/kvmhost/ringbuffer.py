# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads pages of the kernel's ring buffer, as trace_pipe_raw gives them, by the descriptions that the kernel gives too.

Emulated, the kernel takes longer to write its trace as text than all else that the stress run does: it looks up two
symbols a line. So a guest sends its pages, and what they say is found here.
"""

from __future__ import annotations

import heapq
import re
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PAGE = 4096
# A page: the time of its first event, how many bytes of events follow, and flags (kernel/trace/ring_buffer.c).
_HEADER = struct.Struct("<QQ")
_LENGTH, _MISSED = 0xFFFFF, 1 << 31
# An event: five bits of a kind, 27 of the time since the one before (include/linux/ring_buffer.h). Kinds from 1 on
# are the length in words; 0 is followed by it in bytes, itself counted.
_PADDING, _TIME_EXTEND, _TIME_STAMP = 29, 30, 31
_DELTA_BITS, _STAMP_BITS = 27, 59
_FIELD = re.compile(r"^\tfield:.*?(\w+)(?:\[\d*\])?;\toffset:(\d+);\tsize:(\d+);\tsigned:([01]);$", re.MULTILINE)
_GRAPH = (10, 11)  # TRACE_GRAPH_RET and TRACE_GRAPH_ENT (enum trace_type, kernel/trace/trace.h)
_CODES = {1: "b", 2: "h", 4: "i", 8: "q"}


@dataclass(frozen=True)
class Event:
    """One event: on which CPU, of which thread; `place` is the function that returned to or probed, with an offset.

    `arrays` are the values that are arrays of numbers, as bytes.
    """

    cpu: int
    thread: int
    name: str
    place: str
    values: dict[str, int]
    arrays: dict[str, bytes] = field(default_factory=dict)


class _Format:
    """How an event of one kind is laid out: its file `format` in tracefs."""

    def __init__(self, text: str) -> None:
        [self.name] = re.findall(r"^name: (\w+)$", text, re.MULTILINE)
        [number] = re.findall(r"^ID: (\d+)$", text, re.MULTILINE)
        self.number = int(number)
        self._names: list[str] = []
        self._arrays: set[str] = set()
        codes, end = "<", 0
        for name, offset, size, signed in _FIELD.findall(text):
            code = _CODES.get(int(size))
            if code is None:
                self._arrays.add(name)
                code = f"{size}s"
            elif signed != "1":
                code = code.upper()
            codes += f"{int(offset) - end}x{code}"
            end = int(offset) + int(size)
            self._names.append(name)
        self._fields = struct.Struct(codes)

    def values(self, data: memoryview) -> tuple[dict[str, int], dict[str, bytes]]:
        """Numbers, and arrays of them."""
        numbers = dict(zip(self._names, self._fields.unpack_from(data), strict=True))
        return numbers, {name: numbers.pop(name) for name in self._arrays}


class Symbols:
    """Names of addresses, by lines of /proc/kallsyms."""

    def __init__(self, kallsyms: str) -> None:
        rows = [line.split()[:3] for line in kallsyms.splitlines()]
        self._functions = sorted((int(address, 16), name) for address, kind, name in rows if kind in "tT")
        self._addresses = [address for address, _ in self._functions]

    def name(self, address: int) -> str:
        """As FUNCTION+OFFSET; empty if it is below all that are known, as the trampolines of return probes are."""
        found = bisect_right(self._addresses, address)
        if not found:
            return ""
        start, name = self._functions[found - 1]
        return f"{name}+{address - start:#x}"


def _records(pages: bytes) -> Iterator[tuple[int, memoryview]]:
    """The time and the content of every event. Raises ValueError where the kernel says that some are missing."""
    for at in range(0, len(pages), PAGE):
        page = memoryview(pages)[at : at + PAGE]
        first, commit = _HEADER.unpack_from(page)
        if commit & _MISSED:
            raise ValueError("events are missing before a page")
        time, position, end = first, _HEADER.size, _HEADER.size + (commit & _LENGTH)
        while position < end:
            [word] = struct.unpack_from("<I", page, position)
            kind, delta = word & 31, word >> 5
            [following] = struct.unpack_from("<I", page, position + 4) if position + 8 <= end else [0]
            if kind == _PADDING:
                if not delta:
                    break  # the rest of the page
                position += 4 + following  # discarded; its delta is no time
            elif kind == _TIME_EXTEND:
                time += delta + (following << _DELTA_BITS)
                position += 8
            elif kind == _TIME_STAMP:
                above = time >> _STAMP_BITS << _STAMP_BITS
                time = above | delta + (following << _DELTA_BITS)
                position += 8
            else:
                time += delta
                start, length = (position + 4, 4 * kind) if kind else (position + 8, following - 4)
                yield time, page[start : start + length]
                position = start + (length + 3 & ~3)


def events(pages: Sequence[bytes], formats: str, kallsyms: str) -> Iterator[Event]:
    """The events of all CPUs in their order: of each CPU its PAGES, and FORMATS, the files `format` one after another.

    What the function graph tracer left among them is passed over.

    Raises ValueError for events that are missing, and KeyError for one that no format describes.
    """
    described = {one.number: one for one in map(_Format, re.split(r"(?m)^(?=name: )", formats)[1:])}
    symbols = Symbols(kallsyms)

    def of_cpu(cpu: int) -> Iterator[tuple[int, int, memoryview]]:
        for time, data in _records(pages[cpu]):
            yield time, cpu, data

    for _, cpu, data in heapq.merge(*map(of_cpu, range(len(pages))), key=lambda record: record[:2]):
        number = int.from_bytes(data[:2], "little")
        if number in _GRAPH:
            continue
        kind = described[number]
        values, arrays = kind.values(data)
        # Of a return probe, where it returns to; a tracepoint has no place.
        address = values.get("__probe_ret_ip", values.get("__probe_ip", 0))
        yield Event(cpu, values["common_pid"], kind.name, symbols.name(address), values, arrays)


def read(folder: Path) -> Iterator[Event]:
    """The events that a KernelTracer (scenarios/kerneltracer.py) left in FOLDER."""
    files = sorted(folder.glob("cpu*.raw"), key=lambda file: int(file.stem.removeprefix("cpu")))
    texts = [(folder / name).read_text() for name in ("formats", "symbols")]
    return events([file.read_bytes() for file in files], *texts)
