# SPDX-License-Identifier: GPL-2.0-or-later
"""What the second iterator of bpf/state.c reads: the bitmaps for guests of vCPUs' guests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from tracer.kernel.btf import Btf, BtfError
from tracer.model.nested import MERGED, UNREADABLE, Nested, NestedBitmap
from tracer.program.structs import Content, Record

_GUEST_MODE = (("kvm_vcpu", "stat"), ("kvm_vcpu_stat", "guest_mode"))  # since 5.15


class NestedReading:
    """A record of it, and the bitmap that follows."""

    def __init__(self, members: Mapping[str, Any], bitmap: bytes, where: NestedBitmap) -> None:
        self.vcpu = members["vcpu"]
        readable = members["nested"] == members["nested_after"] and not members["failed"]
        self._use = where.use(members["in_use"], members["own"]) if readable else UNREADABLE
        self._bitmap = bitmap if self._use == MERGED else None
        self._running = bool(members["guest_mode"])
        #: The vCPU's own bitmap was changed since it was merged; or that is not known.
        self._changed = bool(members["changed"])

    def same_as(self, other: NestedReading | None) -> bool:
        """Whether an earlier reading of this vCPU found the same."""
        return other is not None and (self._use, self._bitmap) == (other._use, other._bitmap)

    def model(self, before: NestedReading | None, given: Mapping[str, int]) -> Nested:
        """What it says, with the reading before it, if any; GIVEN are the values of the program."""
        # That the own bitmap was changed is also noted where a bit is written as it was.
        merged_since = "nested_changed" in given and not (self._changed and (before is None or before._changed))
        settled = self.same_as(before) and (merged_since or self._use != MERGED)
        running = self._running if "vcpu_guest_mode" in given else None
        return Nested(self._use, self._bitmap, settled=settled, running=running)


def nested_values(btf: Btf, where: NestedBitmap) -> dict[str, int]:
    """The values of the program on these bitmaps. Raises BtfError where they cannot be found."""
    paths = {"made": where.made, "bitmap": where.bitmap, "in_use": where.in_use, "own": where.own}
    paths["inside"] = where.inside
    given = {f"nested_{name}": btf.nested_offset(path) for name, path in paths.items() if path}
    for name, path in (("nested_changed", where.changed), ("vcpu_guest_mode", _GUEST_MODE)):
        with suppress(BtfError):
            given[name] = btf.nested_offset(path)
    return given


def nested_readings(parts: Iterable[bytes], record: Record, where: NestedBitmap) -> dict[int, NestedReading]:
    """What is read of each vCPU that has such a bitmap, by its address; of several descriptors, that of the last."""
    found: dict[int, NestedReading] = {}
    content = Content(parts)
    while content:
        members = record.read(content.take(record.size), 0)
        one = NestedReading(members, content.take(members["bitmap_bytes"]), where)
        found[one.vcpu] = one
    return found
