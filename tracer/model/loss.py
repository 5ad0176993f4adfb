# SPDX-License-Identifier: GPL-2.0-or-later
"""What a trace missed: as reports store it, and as every view words it."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, field

from tracer.model.sanitized import Count, Sanitized, Text
from tracer.model.snapshot import Snapshot


class Loss(Sanitized, frozen=True, kw_only=True):
    """What a trace missed: by map, by function, and the rest. `not_probed` names the functions without a probe.

    In `blind_seconds` the kernel's probes were switched off.

    `uncounted` says, a phrase each, what could not be counted from the start: because of a livepatch, say.
    """

    dropped_updates: Annotated[dict[Text, Count], Meta(max_length=256)] = field(default_factory=dict)
    probe_missed: Annotated[dict[Text, Count], Meta(max_length=256)] = field(default_factory=dict)
    unpaired_returns: Count = 0
    unpaired_refusals: Count = 0
    read_failures: Count = 0
    blind_seconds: Annotated[float, Meta(ge=0)] = 0.0
    open_calls: Count = 0
    open_exits: Count = 0
    module_unloads: Count = 0
    not_probed: Annotated[list[Text], Meta(max_length=256)] = field(default_factory=list)
    uncounted: Annotated[list[Text], Meta(max_length=256)] = field(default_factory=list)

    def words(self) -> list[str]:
        """What the attached probes missed, a phrase each."""
        found = [f"{count:,} updates of map {name} dropped" for name, count in self.dropped_updates.items()]
        found += [f"{count:,} runs of {name} missed" for name, count in self.probe_missed.items()]
        if self.unpaired_returns:
            found.append(f"{self.unpaired_returns:,} unpaired returns")
        if self.unpaired_refusals:
            found.append(f"{self.unpaired_refusals:,} refused accesses whose exit was not seen")
        if self.read_failures:
            found.append(f"{self.read_failures:,} bitmaps not read")
        if self.blind_seconds:
            found.append(f"{self.blind_seconds:,.1f} s with the kernel's probes switched off")
        if self.open_calls:
            found.append(f"{self.open_calls:,} calls still in progress")
        if self.open_exits:
            found.append(f"{self.open_exits:,} exits still in progress")
        return found + self.uncounted


def loss_of(counted: Snapshot) -> Loss:
    """What the trace behind the snapshot `counted` missed."""
    return Loss(
        dropped_updates={m.name: m.dropped for m in counted.maps if m.dropped},
        probe_missed={p.function: p.missed for p in counted.probes if p.missed},
        unpaired_returns=counted.unpaired_returns,
        unpaired_refusals=counted.unpaired_refusals,
        read_failures=counted.read_failures,
        blind_seconds=round(counted.blind_seconds, 3),
        open_calls=counted.open_calls,
        open_exits=counted.open_exits,
        uncounted=list(counted.uncounted),
        module_unloads=counted.module_unloads,
        not_probed=[p.function for p in counted.probes if not p.attached],
    )
