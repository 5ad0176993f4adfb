# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the bits of an MSR are in a vCPU's bitmap: bpf/bitmap.h has the same for the program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tracer.model.msr_filter import READ, runs

_AREA = 0x2000  # MSRs


@dataclass(frozen=True)
class Geometry:
    """How a bitmap is laid out; 1: an access exits.

    `size` is in bytes; `areas` are the first MSR of each area of 0x2000, and the byte where its bits begin; an MSR in
    none of them always exits. `stride`: bits from one MSR to the next; `to_write`: from its read bit to its write bit.
    """

    size: int
    areas: tuple[tuple[int, int], ...]
    stride: int
    to_write: int

    @property
    def ranges(self) -> list[range]:
        """The MSRs of each area."""
        return [range(first, first + _AREA) for first, _ in self.areas]

    def place(self, msr: int, direction: int) -> int | None:
        """The number of a bit; None where there is none."""
        for first, byte in self.areas:
            if 0 <= msr - first < _AREA:
                return byte * 8 + (msr - first) * self.stride + (0 if direction == READ else self.to_write)
        return None

    def intercepted(self, bitmap: bytes, msr: int, direction: int) -> bool:
        """Whether an access exits; with no bitmap at all (b"") every access does."""
        at = self.place(msr, direction) if bitmap else None
        return at is None or bool(bitmap[at >> 3] >> (at & 7) & 1)

    def passed(self, bitmap: bytes, direction: int) -> Iterator[int]:
        """The MSRs whose bit is clear, in the order of their numbers."""
        if not bitmap:
            return
        clear = ~int.from_bytes(bitmap, "little") & ((1 << len(bitmap) * 8) - 1)
        for first, byte in self.areas:
            start = byte * 8 + (0 if direction == READ else self.to_write)
            last = start + (_AREA - 1) * self.stride
            area = clear >> start & ((1 << last - start + 1) - 1)
            for run in runs(area):
                yield from (first + bit // self.stride for bit in run if bit % self.stride == 0)
