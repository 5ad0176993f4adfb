# SPDX-License-Identifier: GPL-2.0-or-later
"""Metrics of synthetic snapshots, as a Prometheus server parses them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from made import svm_pass
from needs import tool
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tracer.export.metrics import SnapshotCollector, UnattachedCollector
from tracer.model.exits import L1, OK, SLOW, Exit
from tracer.model.snapshot import Call, Durations, Map, Outcome, Probe, Snapshot, VmInfo
from tracer.model.state import State

Samples = dict[str, float]

# A vCPU was created, and the filter changed once: two callers make one series.
TSC = Call(0x10, "read", "disable", "vcpu_create", "vmx_vcpu_create")
CLONE = replace(TSC, caller="vmx_vcpu_create.constprop.0")
FS_BASE = Call(0xC0000100, "read_write", "enable", "filter_change", "vmx_msr_filter_changed")
NAMELESS = Call(0x1FFF, "write", "disable", "other", "0xffffffffc0b00010")
SNAPSHOT = Snapshot(
    layout="toggle",
    calls={
        TSC: Outcome(7, 1, 6, 0, 0),
        CLONE: Outcome(4, 2, 2, 0, 0),
        FS_BASE: Outcome(17, 17, 0, 0, 0),
        NAMELESS: Outcome(1, 0, 0, 1, 1),
    },
    updates={0: Durations(3, 0.001953125, (0, 1, *[0] * 22, 2))},
    recalcs={0: Durations(9, 0.5, (9, *[0] * 24))},
    probes=(
        Probe("vmx_msr_filter_changed", "vmx_msr_filter_changed", True, "vmx_msr_filter_changed [kvm_intel]", 2),
        Probe("vmx_vcpu_create", None, False, "no such function in this kernel"),
    ),
    maps=(Map("calls", 4, 8192, 5), Map("vcpus", 0, 16384)),
    unpaired_returns=6,
    read_failures=8,
    blind_seconds=8.5,
    open_calls=9,
    vcpus_seen=1,
    vcpus_created=13,
    creation_recalcs=4,
    module_unloads=2,
)

CALLS, REDUNDANT = "msrtrace_intercept_calls_total", "msrtrace_intercept_redundant_calls_total"
UPDATES, DURATION = "msrtrace_filter_updates_total", "msrtrace_filter_update_duration_seconds"
BUILD = "backend=kprobe,kernel=6.1.0-56-amd64,layout=toggle,redundancy=exact,vendor=vmx,version=0.1.0"
OF_TSC = "access=read,action=disable,cause=vcpu_create,msr=0x10,name=IA32_TSC"
OF_FS_BASE = "access=read_write,action=enable,cause=filter_change,msr=0xc0000100,name=FS_BASE"
OF_NAMELESS = "access=write,action=disable,cause=other,msr=0x1fff,name=0x1fff"
# 64 << i nanoseconds
BOUNDS = ["1.28e-07", "2.56e-07", "5.12e-07", "1.024e-06", "2.048e-06", "4.096e-06", "8.192e-06", "1.6384e-05"]
BOUNDS += ["3.2768e-05", "6.5536e-05", "0.000131072", "0.000262144", "0.000524288", "0.001048576", "0.002097152"]
BOUNDS += ["0.004194304", "0.008388608", "0.016777216", "0.033554432", "0.067108864", "0.134217728", "0.268435456"]
BOUNDS += ["0.536870912", "1.07374182", "+Inf"]


def text(take: Callable[[], Snapshot]) -> str:
    registry = CollectorRegistry()
    registry.register(SnapshotCollector(take, "0.1.0", "6.1.0-56-amd64"))
    return generate_latest(registry).decode()


def parsed(exposition: str) -> Samples:
    """Every sample by `name{label=value,...}`, except the duration of the scrape."""
    samples: Samples = {}
    for family in text_string_to_metric_families(exposition):
        assert family.documentation.endswith(".")
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            key = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert key not in samples
            samples[key] = sample.value
    assert 0 <= samples.pop("msrtrace_scrape_duration_seconds") < 5
    return samples


def samples_of(snapshot: Snapshot) -> Samples:
    return parsed(text(lambda: snapshot))


def of(samples: Samples, name: str) -> Samples:
    """The samples of one metric, without its name."""
    return {key.removeprefix(name): value for key, value in samples.items() if key.partition("{")[0] == name}


def families(snapshot: Snapshot) -> dict[str, str]:
    return {family.name: family.type for family in text_string_to_metric_families(text(lambda: snapshot))}


def test_every_count_is_a_sample() -> None:
    assert samples_of(SNAPSHOT) == {
        f"msrtrace_build_info{{{BUILD}}}": 1,
        f"{CALLS}{{{OF_TSC}}}": 11,
        f"{CALLS}{{{OF_FS_BASE}}}": 17,
        f"{CALLS}{{{OF_NAMELESS}}}": 1,
        f"{REDUNDANT}{{{OF_TSC}}}": 3,
        f"{REDUNDANT}{{{OF_FS_BASE}}}": 17,
        f"{REDUNDANT}{{{OF_NAMELESS}}}": 0,
        UPDATES: 3,
        f"{DURATION}_count": 3,
        f"{DURATION}_sum": 0.001953125,
        f"{DURATION}_bucket{{le=1.28e-07}}": 0,
        **{f"{DURATION}_bucket{{le={bound}}}": 1 for bound in BOUNDS[1:-1]},
        f"{DURATION}_bucket{{le=+Inf}}": 3,
        "msrtrace_probe_attached{function=vmx_msr_filter_changed}": 1,
        "msrtrace_probe_attached{function=vmx_vcpu_create}": 0,
        "msrtrace_probe_missed_total{function=vmx_msr_filter_changed}": 2,
        "msrtrace_probe_missed_total{function=vmx_vcpu_create}": 0,
        "msrtrace_map_entries{map=calls}": 4,
        "msrtrace_map_entries{map=vcpus}": 0,
        "msrtrace_map_capacity{map=calls}": 8192,
        "msrtrace_map_capacity{map=vcpus}": 16384,
        "msrtrace_dropped_updates_total{map=calls}": 5,
        "msrtrace_dropped_updates_total{map=vcpus}": 0,
        "msrtrace_unpaired_returns_total": 6,
        "msrtrace_read_failures_total": 8,
        "msrtrace_probes_off_seconds_total": 8.5,
        "msrtrace_vcpus_created_total": 13,
        "msrtrace_open_calls": 9,
        "msrtrace_module_unloads_total": 2,
        "msrtrace_scrape_failures_total": 0,
    }


def test_families_have_these_names_and_types() -> None:
    """The names and types that dashboards depend on: DESIGN.md, Metrics."""
    assert families(SNAPSHOT) == {
        "msrtrace_build_info": "gauge",
        "msrtrace_intercept_calls": "counter",
        "msrtrace_intercept_redundant_calls": "counter",
        "msrtrace_filter_updates": "counter",
        "msrtrace_filter_update_duration_seconds": "histogram",
        "msrtrace_vcpus_created": "counter",
        "msrtrace_probe_attached": "gauge",
        "msrtrace_probe_missed": "counter",
        "msrtrace_map_entries": "gauge",
        "msrtrace_map_capacity": "gauge",
        "msrtrace_dropped_updates": "counter",
        "msrtrace_unpaired_returns": "counter",
        "msrtrace_read_failures": "counter",
        "msrtrace_probes_off_seconds": "counter",
        "msrtrace_open_calls": "gauge",
        "msrtrace_module_unloads": "counter",
        "msrtrace_scrape_failures": "counter",
        "msrtrace_scrape_duration_seconds": "gauge",
    }


def test_an_amd_host_has_its_vendor_and_its_actions() -> None:
    samples = samples_of(svm_pass(404))
    [info] = of(samples, "msrtrace_build_info")
    assert "layout=pass,redundancy=exact,vendor=svm," in info
    written = "access=read_write,action=disable_write,cause=filter_change,msr=0x49,name=IA32_PRED_CMD"
    assert of(samples, CALLS)[f"{{{written}}}"] == of(samples, REDUNDANT)[f"{{{written}}}"] == 404
    reset = "access=read_write,action=enable,cause=vcpu_reset,msr=0xc0000080,name=EFER"
    assert of(samples, CALLS)[f"{{{reset}}}"] == 1


def test_an_empty_snapshot_has_no_calls() -> None:
    samples = samples_of(Snapshot("toggle"))
    assert of(samples, CALLS) == of(samples, REDUNDANT) == {}
    assert of(samples, UPDATES) == {"": 0}
    assert of(samples, f"{DURATION}_bucket") == {f"{{le={bound}}}": 0 for bound in BOUNDS}
    assert families(Snapshot("toggle")) == families(SNAPSHOT)


def test_redundancy_that_is_unknown_is_absent_and_not_zero() -> None:
    calls = {TSC: Outcome(7), CLONE: Outcome(4), FS_BASE: Outcome(17)}
    unknown = replace(SNAPSHOT, redundancy="unknown", calls=calls)
    assert families(SNAPSHOT).keys() - families(unknown).keys() == {"msrtrace_intercept_redundant_calls"}
    samples = samples_of(unknown)
    assert of(samples, CALLS) == {f"{{{OF_TSC}}}": 11, f"{{{OF_FS_BASE}}}": 17}
    assert samples[f"msrtrace_build_info{{{BUILD.replace('exact', 'unknown')}}}"] == 1


def test_redundancy_that_was_unknown_for_a_while_stays_unknown() -> None:
    # As after a reload that brought BTF: what is not known of all calls of a series is not claimed.
    samples = samples_of(
        replace(SNAPSHOT, calls={TSC: Outcome(7), CLONE: Outcome(4, 2, 2, 0, 0), FS_BASE: Outcome(3, 1)})
    )
    assert of(samples, REDUNDANT) == {f"{{{OF_FS_BASE}}}": 1}


def test_calls_that_cannot_be_observed_are_absent_and_not_zero() -> None:
    filter_only = replace(SNAPSHOT, layout="filter-only", calls={}, calls_observable=False)
    absent = {"msrtrace_intercept_calls", "msrtrace_intercept_redundant_calls"}
    assert families(SNAPSHOT).keys() - families(filter_only).keys() == absent
    assert of(samples_of(filter_only), UPDATES) == {"": 3}


def test_updates_that_cannot_be_observed_are_absent_and_not_zero() -> None:
    blind = replace(SNAPSHOT, updates={}, updates_observable=False)
    absent = {"msrtrace_filter_updates", "msrtrace_filter_update_duration_seconds"}
    assert families(SNAPSHOT).keys() - families(blind).keys() == absent


# Two VMs run; 300 is gone, and what was its was moved to pid 0, but for a call counted since.
BY_VM = replace(
    SNAPSHOT,
    by_vm=True,
    calls={
        replace(TSC, pid=100): Outcome(7, 0, 7, 0, 0),
        replace(CLONE, pid=100): Outcome(1, 1, 0, 0, 0),
        replace(TSC, pid=200): Outcome(14, 0, 14, 0, 0),
        replace(TSC, pid=300): Outcome(1, 0, 1, 0, 0),
        replace(TSC, pid=0): Outcome(21, 0, 21, 0, 0),
    },
    updates={
        0: Durations(5, 0.5, (5, *[0] * 24)),
        100: Durations(2, 0.25, (2, *[0] * 24)),
        300: Durations(1, 0.5, (1, *[0] * 24)),
    },
    vms={100: VmInfo('we"b\\,\n', "6f1d7d5e-0c1b-4b6e-9a58-2d0a6f4f0001", "qemu"), 200: VmInfo("db")},
)


def test_by_vm_adds_labels_and_sums() -> None:
    samples = samples_of(BY_VM)
    web, db = 'pid=100,vm=we"b\\,\n', "pid=200,vm=db"
    assert of(samples, CALLS) == {f"{{{OF_TSC},{web}}}": 8, f"{{{OF_TSC},{db}}}": 14}
    assert of(samples, REDUNDANT) == {f"{{{OF_TSC},{web}}}": 1, f"{{{OF_TSC},{db}}}": 0}
    assert of(samples, UPDATES) == {f"{{{web}}}": 2}
    assert of(samples, f"{DURATION}_count") == {f"{{{web}}}": 2}
    assert of(samples, f"{DURATION}_sum") == {f"{{{web}}}": 0.25}
    assert of(samples, f"{DURATION}_bucket") == {f"{{le={bound},{web}}}": 2 for bound in BOUNDS}


def test_what_vms_are_called_is_a_series_for_each_that_lives() -> None:
    uuid = "6f1d7d5e-0c1b-4b6e-9a58-2d0a6f4f0001"
    web, db = f'{{pid=100,uuid={uuid},vm=we"b\\,\n,vmm=qemu}}', "{pid=200,uuid=,vm=db,vmm=}"
    assert of(samples_of(BY_VM), "msrtrace_vm_info") == {web: 1, db: 1}
    assert of(samples_of(BY_VM.without_vms({100})), "msrtrace_vm_info") == {db: 1}
    assert families(BY_VM)["msrtrace_vm_info"] == "gauge"
    assert "msrtrace_vm_info" not in families(SNAPSHOT)


def test_by_vm_without_a_vm() -> None:
    samples = samples_of(replace(BY_VM, vms={}))
    assert of(samples, CALLS) == of(samples, REDUNDANT) == of(samples, UPDATES) == {}
    assert of(samples, f"{DURATION}_bucket") == {}
    assert families(replace(BY_VM, vms={})).items() >= families(SNAPSHOT).items()


def test_sums_over_vms_keep_the_counts_of_ended_vms() -> None:
    for vms in (BY_VM.vms, {}):
        samples = samples_of(replace(BY_VM, vms=vms))
        together = samples_of(replace(BY_VM.without_vms(BY_VM.pids), by_vm=False))
        for family in (CALLS, REDUNDANT, UPDATES, f"{DURATION}_bucket", f"{DURATION}_sum", f"{DURATION}_count"):
            assert of(samples, family.replace("msrtrace_", "msrtrace_host_")) == of(together, family)
    assert not [name for name in families(SNAPSHOT) if name.startswith("msrtrace_host_")]


RECALCS, RECALC_DURATION = "msrtrace_recalculations_total", "msrtrace_recalculation_duration_seconds"
OF_RECALCS = {"msrtrace_recalculations": "counter", "msrtrace_recalculation_duration_seconds": "histogram"}
#: As of 6.17 and newer.
RECALC = replace(SNAPSHOT, layout="recalc")
RECALC_BY_VM = replace(
    BY_VM,
    layout="recalc",
    recalcs={
        0: Durations(9, 0.5, (9, *[0] * 24)),
        100: Durations(2, 0.25, (0, 2, *[0] * 23)),
        300: Durations(1, 2.0, (*[0] * 24, 1)),
    },
)


@pytest.mark.parametrize("layout", ["recalc", "set"])
def test_recalculations_are_shown_where_they_can_be_observed(layout: str) -> None:
    samples = samples_of(replace(RECALC, layout=layout))
    assert of(samples, RECALCS) == {"{cause=vcpu_create}": 4, "{cause=recalc}": 5}
    assert of(samples, f"{RECALC_DURATION}_bucket") == {f"{{le={bound}}}": 9 for bound in BOUNDS}
    assert (samples[f"{RECALC_DURATION}_count"], samples[f"{RECALC_DURATION}_sum"]) == (9, 0.5)
    assert families(RECALC) == families(SNAPSHOT) | OF_RECALCS
    before = samples_of(Snapshot(layout))
    none = {"{cause=vcpu_create}": 0, "{cause=recalc}": 0}
    assert (of(before, RECALCS), of(before, f"{RECALC_DURATION}_sum")) == (none, {"": 0})


@pytest.mark.parametrize("layout", ["toggle", "filter-only", "?"])
def test_recalculations_are_absent_where_they_cannot_be_observed(layout: str) -> None:
    assert not families(replace(RECALC, layout=layout)).keys() & OF_RECALCS.keys()
    blind = replace(RECALC, updates={}, updates_observable=False)  # without a probe that tells them from updates
    assert not families(blind).keys() & OF_RECALCS.keys()
    assert not families(replace(RECALC_BY_VM, layout=layout)).keys() & OF_RECALCS.keys()


def test_recalculations_are_those_of_the_host_also_by_vm() -> None:
    for vms in (RECALC_BY_VM.vms, {}):
        samples = samples_of(replace(RECALC_BY_VM, vms=vms))
        assert of(samples, RECALCS) == {"{cause=vcpu_create}": 4, "{cause=recalc}": 8}
        assert of(samples, f"{RECALC_DURATION}_sum") == {"": 2.75}
        buckets = {f"{{le={bound}}}": 11 for bound in BOUNDS} | {"{le=1.28e-07}": 9, "{le=+Inf}": 12}
        assert of(samples, f"{RECALC_DURATION}_bucket") == buckets
        assert not [name for name in samples if name.startswith("msrtrace_host_recalc")]


def test_creations_that_cannot_be_followed_are_absent() -> None:
    samples = samples_of(replace(RECALC, creations_observable=False))
    assert of(samples, RECALCS) == {"{cause=recalc}": 9}
    assert "msrtrace_vcpus_created_total" not in samples


def test_a_failed_read_shows_older_counts() -> None:
    answers: list[Snapshot | Exception] = [OSError("no"), SNAPSHOT, OSError("no"), ValueError("no"), BY_VM]

    def take() -> Snapshot:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    registry = CollectorRegistry()
    registry.register(SnapshotCollector(take, "0.1.0", "6.1.0-56-amd64"))
    assert len(answers) == 5  # a registration reads nothing
    scrapes = [parsed(generate_latest(registry).decode()) for _ in range(5)]
    failures = [scrape.pop("msrtrace_scrape_failures_total") for scrape in scrapes]
    assert failures == [1, 1, 2, 3, 3]
    assert scrapes[0] == {}
    good, by_vm = samples_of(SNAPSHOT), samples_of(BY_VM)
    del good["msrtrace_scrape_failures_total"], by_vm["msrtrace_scrape_failures_total"]
    assert scrapes[1:] == [good, good, good, by_vm]


def test_the_kernel_is_this_one() -> None:
    registry = CollectorRegistry()
    registry.register(SnapshotCollector(lambda: SNAPSHOT, "0.1.0"))
    release = subprocess.run(["uname", "-r"], capture_output=True, text=True, check=True).stdout.strip()
    assert f'kernel="{release}"' in generate_latest(registry).decode()


def check(exposition: str) -> tuple[int, str]:
    """The status of promtool, and what it says."""
    command = [tool("promtool"), "check", "metrics"]
    done = subprocess.run(command, input=exposition, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "snapshot",
    [
        *(SNAPSHOT, BY_VM, replace(SNAPSHOT, redundancy="unknown"), Snapshot("toggle"), RECALC, RECALC_BY_VM),
        replace(BY_VM, exits={Exit(0x48, "write", SLOW, OK, L1, pid): 7 for pid in (0, 100)}),
    ],
)
def test_promtool_finds_nothing_wrong(snapshot: Snapshot) -> None:
    exposition = text(lambda: snapshot)
    assert check(exposition) == (0, "")
    assert check(exposition.replace("msrtrace_filter_updates_total", "msrtrace_filter_updates"))[0] != 0


def test_every_metric_is_in_the_docs_and_no_other() -> None:
    """Of the families `msrtrace_host_*` the docs have one row."""
    page = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    table = page.partition("\n## The metrics\n")[2].partition("\n\n`access` is")[0]
    registry = CollectorRegistry()
    everything = replace(RECALC_BY_VM, exits={})
    registry.register(SnapshotCollector(lambda: everything, "0.1.0", state=State))
    found = text_string_to_metric_families(generate_latest(registry).decode())
    exported = {f"{family.name}_total" if family.type == "counter" else family.name for family in found}
    assert set(re.findall(r"`(msrtrace_\w+)`", table)) == {
        name for name in exported if not name.startswith("msrtrace_host_")
    }


def test_before_there_are_counts_the_functions_are_not_probed() -> None:
    """The series that MsrtraceTracesNothing looks for, and none of what is not known."""
    registry = CollectorRegistry()
    registry.register(UnattachedCollector(["vmx_vcpu_create", "svm_vcpu_create"]))
    exposition = generate_latest(registry).decode()
    assert exposition.splitlines()[2:] == [
        'msrtrace_probe_attached{function="vmx_vcpu_create"} 0.0',
        'msrtrace_probe_attached{function="svm_vcpu_create"} 0.0',
    ]
    assert check(exposition) == (0, "")
