# SPDX-License-Identifier: GPL-2.0-or-later
"""What a scrape says of exits of guests' RDMSR and WRMSR."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from tracer.export import exit_metrics
from tracer.export.exit_metrics import MSRS
from tracer.export.exposition import exposed
from tracer.export.metrics import SnapshotCollector
from tracer.model.exits import FAST, FILTERED, INVALID, L1, L2, OK, REFLECTED, SLOW, UNKNOWN, Exit
from tracer.model.snapshot import Snapshot, VmInfo

SPEC_CTRL, DEADLINE, FS_BASE, NAMELESS = 0x48, 0x6E0, 0xC0000100, 0x12345678
WRITTEN = Exit(SPEC_CTRL, "write", SLOW, OK, L1)
COUNTED: Mapping[Exit, int] = {
    WRITTEN: 12_400,
    replace(WRITTEN, access="read"): 7,
    Exit(DEADLINE, "write", FAST, OK, L1): 1_009,
    replace(WRITTEN, guest=L2): 3,
    replace(WRITTEN, guest=L2, result=REFLECTED): 2,
    Exit(FS_BASE, "read", SLOW, FILTERED, L1): 404,
    Exit(FS_BASE, "write", SLOW, INVALID, L1): 1,
    Exit(NAMELESS, "read", SLOW, UNKNOWN, L1): 5,
}
SNAPSHOT = Snapshot("toggle", exits=COUNTED, open_exits=2, unpaired_refusals=6)
#: Two VMs run; another is gone, whose counts were moved to pid 0, but for one counted since.
BY_VM = replace(
    SNAPSHOT,
    by_vm=True,
    exits={
        replace(WRITTEN, pid=100): 11,
        replace(WRITTEN, pid=200): 13,
        replace(WRITTEN, pid=300): 1,
        WRITTEN: 21,
        Exit(FS_BASE, "read", SLOW, FILTERED, L1, 200): 17,
    },
    vms={100: VmInfo("web"), 200: VmInfo("db")},
)
EXITS, OF_HOST = "msrtrace_msr_exits_total", "msrtrace_host_msr_exits_total"
LABELS = ("name", "access", "path", "result", "guest", "vm", "pid")


class Scraped:
    """A collector whose snapshot the test replaces between scrapes."""

    def __init__(self) -> None:
        self.snapshot = Snapshot("toggle")
        self._registry = CollectorRegistry()
        self._registry.register(SnapshotCollector(lambda: self.snapshot, "0.1.0", "6.1"))

    def values(self, snapshot: Snapshot, family: str = "exit|refusal") -> dict[str, float]:
        """The values of the series with one of these words in their names, by name and labels."""
        self.snapshot = snapshot
        text = exposed(self._registry).decode()
        found: dict[str, float] = {}
        for sample in (sample for one in text_string_to_metric_families(text) for sample in one.samples):
            if any(word in sample.name for word in family.split("|")):
                key = " ".join((sample.name, *(sample.labels[name] for name in LABELS if name in sample.labels)))
                assert key not in found
                found[key] = sample.value
        return found


def scraped(snapshot: Snapshot) -> dict[str, float]:
    return Scraped().values(snapshot)


def test_each_kind_of_exit_is_a_series() -> None:
    assert scraped(SNAPSHOT) == {
        f"{EXITS} IA32_SPEC_CTRL write slow ok l1": 12_400,
        f"{EXITS} IA32_SPEC_CTRL read slow ok l1": 7,
        f"{EXITS} IA32_TSC_DEADLINE write fast ok l1": 1_009,
        f"{EXITS} IA32_SPEC_CTRL write slow ok l2": 3,
        f"{EXITS} IA32_SPEC_CTRL write slow reflected l2": 2,
        f"{EXITS} FS_BASE read slow filtered l1": 404,
        f"{EXITS} FS_BASE write slow invalid l1": 1,
        f"{EXITS} 0x12345678 read slow unknown l1": 5,
        "msrtrace_open_exits": 2,
        "msrtrace_unpaired_refusals_total": 6,
    }


def test_a_series_has_the_number_of_its_msr() -> None:
    registry = CollectorRegistry()
    registry.register(SnapshotCollector(lambda: SNAPSHOT, "0.1.0", "6.1"))
    assert (
        f'{EXITS}{{access="read",guest="l1",msr="0xc0000100",name="FS_BASE",path="slow",result="filtered"}} 404.0\n'
        in exposed(registry).decode()
    )


def test_exits_that_are_not_counted_are_absent_and_not_zero() -> None:
    assert scraped(replace(SNAPSHOT, exits=None)) == {}
    assert scraped(replace(BY_VM, exits=None)) == {}
    assert scraped(Snapshot("toggle", exits={})) == {"msrtrace_open_exits": 0, "msrtrace_unpaired_refusals_total": 0}


def test_by_vm_each_vm_has_series_and_the_host_the_sum() -> None:
    assert scraped(BY_VM) == {
        f"{EXITS} IA32_SPEC_CTRL write slow ok l1 web 100": 11,
        f"{EXITS} IA32_SPEC_CTRL write slow ok l1 db 200": 13,
        f"{EXITS} FS_BASE read slow filtered l1 db 200": 17,
        f"{OF_HOST} IA32_SPEC_CTRL write slow ok l1": 46,
        f"{OF_HOST} FS_BASE read slow filtered l1": 17,
        "msrtrace_open_exits": 2,
        "msrtrace_unpaired_refusals_total": 6,
    }


def test_a_vm_that_is_gone_has_no_series_and_stays_in_the_sum() -> None:
    collector = Scraped()
    before = collector.values(BY_VM, OF_HOST)
    after = collector.values(BY_VM.without_vms({200}), EXITS)
    assert after == {f"{EXITS} IA32_SPEC_CTRL write slow ok l1 web 100": 11}
    assert collector.values(BY_VM.without_vms({200}), OF_HOST) == before


def many(msrs: range, count: int, pid: int = 0) -> dict[Exit, int]:
    return {Exit(index, "read", SLOW, UNKNOWN, L1, pid): count for index in msrs}


def numbers(values: Mapping[str, float]) -> set[str]:
    return {key.split()[1] for key in values}


def test_a_guest_that_reads_every_msr_makes_few_series() -> None:
    guest = many(range(1 << 20, (1 << 20) + 4 * MSRS), 3)
    found = Scraped().values(replace(SNAPSHOT, exits={**guest, **COUNTED}), EXITS)
    assert len(numbers(found)) == MSRS + 1
    assert found[f"{EXITS} other read slow unknown l1"] == 3 * (len(guest) - MSRS + 4)  # four MSRs have more exits
    assert sum(found.values()) == sum(guest.values()) + sum(COUNTED.values())
    assert found[f"{EXITS} 0x12345678 read slow unknown l1"] == 5


def test_series_of_other_vms_are_not_taken() -> None:
    guest = many(range(1 << 20, (1 << 20) + 2 * MSRS), 3, pid=100)
    found = Scraped().values(replace(BY_VM, exits={**guest, **(BY_VM.exits or {})}), EXITS)
    assert found[f"{EXITS} FS_BASE read slow filtered l1 db 200"] == 17
    assert found[f"{EXITS} other read slow unknown l1 web 100"] == 3 * (MSRS + 1)
    assert len([key for key in found if key.endswith("web 100")]) == MSRS + 1


def test_an_msr_has_series_from_its_first_exit_or_never() -> None:
    first, second = range(MSRS - 1), range(1 << 20, (1 << 20) + 3)
    collector = Scraped()
    collector.values(Snapshot("toggle", exits=many(first, 1)))
    then = collector.values(Snapshot("toggle", exits=many(first, 1) | many(second, 5)), EXITS)
    assert then[f"{EXITS} 0x100000 read slow unknown l1"] == 5
    assert then[f"{EXITS} other read slow unknown l1"] == 10
    # 0x100002 has more than all others now, and still none of its own.
    third = many(first, 1) | many(second, 5) | many(range(0x100002, 0x100003), 10**6)
    assert collector.values(Snapshot("toggle", exits=third), EXITS)[f"{EXITS} other read slow unknown l1"] == 10**6 + 5


def test_a_new_vm_has_series_of_its_own_where_one_was_before() -> None:
    collector = Scraped()
    collector.values(replace(BY_VM, exits=many(range(MSRS), 1, pid=100)))
    gone = replace(BY_VM, exits=many(range(MSRS), 1), vms={})
    assert collector.values(gone, EXITS) == {}
    again = replace(BY_VM, exits=many(range(MSRS), 1) | many(range(1 << 20, 1 + (1 << 20)), 4, pid=100))
    assert collector.values(again, EXITS) == {f"{EXITS} 0x100000 read slow unknown l1 web 100": 4}


@given(st.lists(st.dictionaries(st.integers(0, 12), st.integers(1, 9)), min_size=2, max_size=6))
def test_no_series_falls_or_ends(grown: list[dict[int, int]]) -> None:
    collector, counts, before = Scraped(), Counter[int](), dict[str, float]()
    for more in grown:
        counts.update(more)
        exits = {Exit(index, "read", SLOW, OK, L1): count for index, count in counts.items()}
        with patch.object(exit_metrics, "MSRS", 4):
            found = collector.values(Snapshot("toggle", exits=exits), EXITS)
        assert all(found[key] >= value for key, value in before.items())
        assert sum(found.values()) == counts.total()
        assert len(found) == min(len(counts), 4 + 1)
        before = found
