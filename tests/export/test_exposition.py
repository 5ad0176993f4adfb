# SPDX-License-Identifier: GPL-2.0-or-later
"""The text of metrics: the same bytes as from prometheus_client, with less work."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import crowd, recalc, toggle
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from tracer.export.exposition import Labels, exposed
from tracer.export.metrics import SnapshotCollector
from tracer.model.snapshot import Map, Probe, Snapshot, VmInfo


class Made(Collector):
    """Families that do not change."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self.families


def same(made: Collector) -> None:
    """Check the text of a collector in both formats."""
    assert exposed(made) == generate_latest(made)
    assert exposed(made, as_openmetrics=True) == openmetrics.generate_latest(made)  # type: ignore[no-untyped-call]


def of(snapshot: Snapshot) -> Made:
    return Made(SnapshotCollector(lambda: snapshot, "0.1.0").collect())


PROBES = (Probe("vmx_msr_filter_changed", None, True, "", 3), Probe('a"b\\', None, False, "", 2**60))
SNAPSHOTS = {
    "of a host": toggle(probes=PROBES, maps=(Map("calls", 7, 8192, 1),), unpaired_returns=10**7),
    "by VM": crowd(3),
    "without VMs": replace(crowd(3), vms={}),
    "of unknown redundancy": toggle(exact=False),
    "of a filter-only kernel": toggle(calls_observable=False),
    "without updates": toggle(updates_observable=False),
    "with recalculations": recalc(recalcs=toggle(7).updates),
    "empty": Snapshot("toggle"),
}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_all_families_have_the_same_text(name: str) -> None:
    same(of(SNAPSHOTS[name]))


def test_the_families_of_the_process_have_the_same_text() -> None:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    same(made := Made(registry.collect()))
    assert len(made.families) > 4


def test_the_text_before_the_first_snapshot_is_the_same() -> None:
    def take() -> Snapshot:
        raise OSError

    same(Made(SnapshotCollector(take, "0.1.0").collect()))


VMS = st.builds(VmInfo, st.text(min_size=1), st.text(), st.text())


@given(st.dictionaries(st.integers(1, 2**22), VMS, min_size=1, max_size=3), st.integers(0, 2**63))
def test_any_name_of_a_vm_and_any_count_has_the_same_text(vms: dict[int, VmInfo], updates: int) -> None:
    one = toggle(updates, pid=next(iter(vms)))
    same(of(replace(one, vms=vms)))


NUMBERS = st.one_of(st.floats(), st.integers(-(2**70), 2**70), st.booleans())
NAMES = st.sampled_from(["a", "b_", "le2", "_x", "Z9"])
FAMILIES = st.builds(
    lambda kind, text, names: kind("x", text, labels=names),
    st.sampled_from([CounterMetricFamily, GaugeMetricFamily, UnknownMetricFamily]),
    st.text(),
    st.sampled_from([(), ("a",), ("b", "a")]),
)


@given(FAMILIES, st.lists(st.tuples(st.text(), st.text(), NUMBERS), max_size=3))
def test_any_family_has_the_same_text(
    family: CounterMetricFamily | GaugeMetricFamily | UnknownMetricFamily, rows: list[tuple[str, str, float]]
) -> None:
    for one, other, number in rows:
        family.add_metric([one, other], number)
    same(Made([family]))


@given(st.text(), st.dictionaries(NAMES, st.text(), max_size=4), st.lists(NUMBERS, min_size=1, max_size=3), NUMBERS)
def test_any_info_and_any_histogram_has_the_same_text(
    text: str, labels: dict[str, str], counts: list[float], total: float
) -> None:
    info, histogram = InfoMetricFamily("i", text), HistogramMetricFamily("h", text, labels=list(labels))
    info.add_metric([], labels)
    histogram.add_metric(list(labels.values()), [*((f"{i}.0", n) for i, n in enumerate(counts)), ("+Inf", 9)], total)
    same(Made([info, histogram]))


def test_units_have_the_same_text() -> None:
    same(Made([GaugeMetricFamily("x_seconds", "", value=1, unit="seconds")]))


# --- cost ---


def test_labels_are_formatted_once_and_dropped_with_their_vm() -> None:
    taken = [crowd(3), crowd(3), crowd(2), crowd(2)]
    collector = SnapshotCollector(lambda: taken.pop(0), "0.1.0")

    def labels() -> dict[int, Labels]:
        samples = [sample for family in collector.collect() for sample in family.samples]
        return {id(sample.labels): sample.labels for sample in samples if isinstance(sample.labels, Labels)}

    first, second = labels(), labels()
    assert {key for key, one in first.items() if one} == {key for key, one in second.items() if one}
    assert len(labels()) < len(first)
    assert len(collector._known) == len(labels())


def calls_of(work: Callable[[], object]) -> int:
    """How many function calls, including those of C functions, the work makes: the same each time."""
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("as_openmetrics", [False, True])
def test_a_series_takes_few_function_calls(as_openmetrics: bool) -> None:
    """This is deterministic. prometheus_client makes 81 calls, and 194 for OpenMetrics."""

    def cost(vms: int) -> tuple[int, int]:
        snapshot, registry = crowd(vms), CollectorRegistry()
        registry.register(SnapshotCollector(lambda: snapshot, "0.1.0"))
        series = exposed(registry).count(b"\n")
        return calls_of(lambda: exposed(registry, as_openmetrics)), series

    (few, few_series), (many, many_series) = cost(10), cost(30)
    assert many_series - few_series == 20 * 69
    assert (many - few) / (many_series - few_series) < 13


def test_a_scrape_takes_little_time() -> None:
    """The goal is 100 ms on an idle core for 10,000 series; the limit is three times that, for busy machines."""
    snapshot, registry = crowd(146), CollectorRegistry()
    registry.register(SnapshotCollector(lambda: snapshot, "0.1.0"))
    assert exposed(registry).count(b"\nmsrtrace_") > 9900

    def took() -> float:
        before = time.process_time()
        exposed(registry)
        return time.process_time() - before

    assert min(took() for _ in range(5)) < 0.3
