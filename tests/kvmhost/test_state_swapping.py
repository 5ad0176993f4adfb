# SPDX-License-Identifier: GPL-2.0-or-later
"""Filters that are swapped while `state` reads never make it say what was not so: scenarios/swapping.py."""

from __future__ import annotations

import pytest
from answers import AMD, RECALCULATING
from conftest import Collected
from states import SPEC_CTRL
from swapping import FS_BASE, SWAPPED, SYSENTER_CS, SYSENTER_ESP, UNKNOWN, WAYS

#: Of an access that is allowed, or denied; where nothing is recorded it may be either.
ALLOWED = {"passed", "kvm", "pending_allowed", "unrecorded"}
DENIED = {"filter", "both", "pending_denied", "unrecorded"}


def said(swapping_on: Collected, way: str) -> dict[tuple[str, ...], int]:
    """How often what was said of SWAPPED: of reading and of writing the first, then the next.

    These two may differ: a reading may fall into the middle of KVM's update of the bitmap.
    """
    found = swapping_on.scenario("swapping")["said"][way]
    return {tuple(words.replace("/", " ").split()): times for words, times in found.items()}


@pytest.mark.parametrize("way", WAYS)
def test_one_filter_at_a_time_is_in_force(swapping_on: Collected, way: str) -> None:
    found = said(swapping_on, way)
    assert sum(found.values()) > 40
    for words in found:
        assert set(words) <= ALLOWED or set(words) <= DENIED, words
    assert {words[0] in ALLOWED for words in found} == {True, False}


@pytest.mark.parametrize("way", WAYS)
def test_kvm_is_never_blamed_for_what_a_filter_denied(swapping_on: Collected, way: str) -> None:
    passed = swapping_on.scenario("swapping")["passed"]
    assert {FS_BASE, SYSENTER_CS} <= set(passed)
    [conditional] = {SYSENTER_ESP if swapping_on.host in AMD else SPEC_CTRL} & set(passed)
    found = said(swapping_on, way)
    of = {msr: {word for words in found for word in words[2 * at : 2 * at + 2]} for at, msr in enumerate(SWAPPED)}
    for msr in passed:
        assert not of[msr] & {"kvm", "both"}, f"{msr:#x}: {found}"
    assert of[UNKNOWN] <= {"kvm", "both", "pending_allowed", "pending_denied"}
    if swapping_on.host not in RECALCULATING:
        assert "unrecorded" not in of[conditional]


def test_what_rests_is_said_in_full(swapping_on: Collected) -> None:
    recorded = swapping_on.host not in RECALCULATING
    seen = {word for words in said(swapping_on, "and rest") for word in words}
    # Without a record of what KVM wants it has to rest for longer.
    assert seen >= ({"passed", "filter", "kvm", "both"} if recorded else {"passed", "filter"})
