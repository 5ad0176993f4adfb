# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a vCPU has to stay as it is until that is taken for what is in force."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from itertools import chain, repeat

import pytest

from tracer.model.msr_filter import NO_FILTER, MsrFilter
from tracer.model.state import BOTH, KVM, UNKNOWN, UNRECORDED
from tracer.model.svm import SVM
from tracer.trace.state_reader import Reading, StateReader

ESP = 0x175  # passed through on a condition
DENIES = MsrFilter(default_allow=False)
_REQUESTED = 1 << 37
_MEMBERS = (
    *("vcpu", "kvm", "tgid", "vcpu_id", "owned", "vm_type", "exits", "failed", "shadow_read", "shadow_write"),
    *("requests", "filter", "filter_after", "gp_seq", "gp_seq_needed", "nested"),
)


def reading(filter_: MsrFilter = NO_FILTER, **members: int) -> Reading:
    """Of a vCPU whose bitmap lets nothing pass."""
    told = {name: members.get(name, 0) for name in _MEMBERS}
    return Reading(told, b"\xff" * SVM.bitmap_geometry.size, filter_)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, int]]:
    """What is said of reading ESP, and how often the vCPU was read, if it is found as one of these after the other."""
    monkeypatch.setattr(time, "sleep", lambda _: None)

    def of(found: Iterator[Reading], recorded: tuple[int, ...] = ()) -> tuple[str, int]:
        reads = []

        def read(_: object) -> dict[int, Reading]:
            reads.append(next(found))
            return {reads[-1].vcpu: reads[-1]}

        reader = StateReader.__new__(StateReader)
        reader._vendor, reader.recorded, reader.notes, reader._given = SVM, recorded, [], {"vcpu_bitmap": 1}
        reader._pid = None
        monkeypatch.setattr(reader, "_read", read)
        state = reader.read(steady=True)
        [vm] = state.vms
        return state.verdict(vm.vcpus[0], ESP).read, len(reads)

    return of


def test_kvm_wants_what_stays_so(said: Callable[..., tuple[str, int]]) -> None:
    assert said(repeat(reading())) == (KVM, 6)
    assert said(repeat(reading()), recorded=(ESP,))[1] == 2


def test_a_request_may_come_late(said: Callable[..., tuple[str, int]]) -> None:
    # The new filter is there, its grace period is over, and the VMM waits for a CPU before it asks the vCPUs.
    late = chain(
        repeat(reading(filter=2, filter_after=2), 4), repeat(reading(filter=2, filter_after=2, requests=_REQUESTED))
    )
    assert said(late) == (UNRECORDED, 10)


def test_filters_may_be_where_others_were(said: Callable[..., tuple[str, int]]) -> None:
    swapped = (reading(gp_seq=4 * n, gp_seq_needed=4 * n) for n in range(100))
    assert said(swapped)[0] == UNRECORDED


@pytest.mark.parametrize("replaced", [[0, 6], [5, 6], range(1, 7), range(6)])
def test_one_whose_filter_is_replaced_while_it_is_read_is_as_it_was_before(
    said: Callable[..., tuple[str, int]], replaced: Collection[int]
) -> None:
    swapped = (reading(DENIES, filter=n, filter_after=n + (n in replaced), gp_seq=4 * n) for n in range(100))
    assert said(swapped, recorded=(ESP,)) == (BOTH, 7)
    always = (reading(DENIES, filter=n, filter_after=n + 1, gp_seq=4 * n) for n in range(100))
    assert said(always, recorded=(ESP,)) == (UNKNOWN, 7)


def test_a_filter_that_denies_is_to_blame_at_once(said: Callable[..., tuple[str, int]]) -> None:
    assert said(repeat(reading(DENIES)))[0] == UNRECORDED
