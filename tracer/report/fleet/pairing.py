# SPDX-License-Identifier: GPL-2.0-or-later
"""Which hosts of two windows are the same, by the labels of their targets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence

from tracer.report.fleet.targets import MACHINE_LABELS, REPLICA_LABELS, Target, innermost

#: All targets as which a host was scraped.
Targets = frozenset[Target]
_LOOPBACK = ("127.", "localhost", "[::1]", "::1")


def unpaired(base: Sequence[Targets], new: Sequence[Targets]) -> tuple[list[int], list[int]]:
    """The places of those hosts that are on one side only.

    A host is the same if all its labels are, but for those of replicas; else if it is the only one on either side of
    that job and machine, whose other labels may have changed: an upgrade changes what says how patched it is, or the
    pod. Where labels do not decide, hosts are not the same.
    """
    sides = [dict(enumerate(base)), dict(enumerate(new))]
    for key in (_whole, _machine):
        keyed = [_by_key(side, key) for side in sides]
        for one, other in ((keyed[0][shared], keyed[1][shared]) for shared in keyed[0].keys() & keyed[1].keys()):
            if key is _whole or len(one) == len(other) == 1:
                for side, places in zip(sides, (one, other), strict=True):
                    for place in places:
                        side.pop(place, None)
    return list(sides[0]), list(sides[1])


def _by_key(hosts: dict[int, Targets], key: Callable[[Target], Hashable | None]) -> dict[Hashable, Collection[int]]:
    found: dict[Hashable, set[int]] = defaultdict(set)
    for place, targets in hosts.items():
        for one in targets:
            if (name := key(one)) is not None:
                found[name].add(place)
    return dict(found)


def _whole(target: Target) -> Hashable:
    return tuple((name, value) for name, value in target if name not in REPLICA_LABELS)


def _machine(target: Target) -> Hashable | None:
    """The job and what names the machine: the instance, unless another label does; None if nothing does."""
    labels = innermost(target)
    names = tuple((name, labels[name]) for name in sorted(MACHINE_LABELS - {"instance"}) if name in labels)
    instance = labels.get("instance", "")
    if not names and (not instance or instance.startswith(_LOOPBACK)):
        return None
    return labels.get("job"), names or instance
