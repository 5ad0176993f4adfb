# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports: the numbers in them, from snapshots whose numbers are known."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import (
    FS_BASE,
    HOOK,
    PRED_CMD,
    TSC,
    WORKLOAD,
    amd,
    any_reports,
    created,
    outcome,
    patched,
    recalc,
    report,
    rows,
    svm_pass,
    svm_recalc,
    times,
    toggle,
)

from tracer.model.snapshot import DURATION_BOUNDS, Call, Durations, Map, Outcome, Probe, Snapshot, VmInfo
from tracer.report.file import decode, encode
from tracer.report.making import HostInfo, call_rows
from tracer.report.report import Bit, BitCounts, CallRow, PerCreation, PerUpdate, Vm, by_bit, redundant_sum, whole


def as_json(counted: Snapshot, **circumstances: Any) -> Any:
    return json.loads(encode(report(counted, **circumstances)))


def test_calls_per_filter_update() -> None:
    """KERNEL.md 3."""
    expected = {
        "calls": 13,
        "redundant": 11,
        "enable": 0,
        "enable_redundant": 0,
        "disable": 13,
        "disable_redundant": 11,
    }
    assert as_json(toggle())["per_filter_update"] == expected
    expected |= {"calls": 30, "redundant": 28, "enable": 17, "enable_redundant": 17}
    assert as_json(toggle(patched=False))["per_filter_update"] == expected


def test_integers_have_no_decimals_in_the_file() -> None:
    assert all(type(value) is int for value in as_json(toggle())["per_filter_update"].values())
    uneven = replace(toggle(3), updates={0: times(4)})
    assert as_json(uneven)["per_filter_update"]["calls"] == 9.75
    assert [type(whole(value)) for value in (13.0, 0.0, 13.5)] == [int, int, float]


def test_redundant_calls_per_filter_update_are_null_where_unknown() -> None:
    each = report(toggle(exact=False)).per_filter_update
    assert each == PerUpdate(
        calls=13, redundant=None, enable=0, enable_redundant=None, disable=13, disable_redundant=None
    )
    assert json.loads(encode(report(toggle(exact=False))))["per_filter_update"]["redundant"] is None


@pytest.mark.parametrize("change", [{"updates": {}}, {"calls_observable": False}, {"updates_observable": False}])
def test_calls_per_filter_update_need_calls_and_updates(change: dict[str, Any]) -> None:
    assert report(replace(toggle(), **change)).per_filter_update is None


def test_totals_are_sums_over_the_rows() -> None:
    totals = as_json(toggle(patched=False, vcpus=2))["totals"]
    counts = {"calls": 30 * 101 + 14, "redundant": 28 * 101, "filter_updates": 101, "recalculations": None}
    creations = {"creation_recalculations": None, "vcpus_created": 2, "exits": None, "exits_by_filter": None}
    creations["exits_perhaps_by_filter"] = None
    assert totals == counts | creations | {"vcpus_seen": 2}
    assert as_json(toggle(exact=False))["totals"]["redundant"] is None
    unseen = as_json(Snapshot("filter-only", updates={0: times(7)}, calls_observable=False))
    counts = {"calls": None, "redundant": None, "filter_updates": 7, "recalculations": None}
    assert unseen["totals"] == counts | creations | {"vcpus_seen": 0, "vcpus_created": 0}
    assert (unseen["calls"], unseen["per_filter_update"]) == ([], None)
    no_updates = as_json(replace(toggle(), updates={}, updates_observable=False))
    assert (no_updates["totals"]["filter_updates"], no_updates["filter_update_seconds"]) == (None, None)


@pytest.mark.parametrize("layout", ["recalc", "set"])
def test_recalculations_are_counted_apart_from_updates(layout: str) -> None:
    made = as_json(recalc(3, layout=layout, recalcs={0: times(7), 300: times(4)}))
    assert made["schema"] == "msrtrace-report/1"
    assert (made["totals"]["recalculations"], made["totals"]["filter_updates"]) == (11, 3)
    seconds = made["recalculation_seconds"]
    assert (seconds["count"], seconds["sum"]) == (11, pytest.approx(11 * 6e-6))
    assert [bucket["count"] for bucket in seconds["buckets"]] == [2, *[0] * 5, 7, *[0] * 17, 2]
    assert [bucket["le"] for bucket in seconds["buckets"]] == [
        bucket["le"] for bucket in made["filter_update_seconds"]["buckets"]
    ]
    none = as_json(recalc(layout=layout))
    assert (none["totals"]["recalculations"], none["recalculation_seconds"]["count"]) == (0, 0)


@pytest.mark.parametrize(
    "counted",
    [
        toggle(recalcs={0: times(7)}),
        toggle(layout="filter-only", calls={}, calls_observable=False),
        replace(recalc(), updates={}, recalcs={0: times(7)}, updates_observable=False),
    ],
    ids=["toggle", "filter-only", "updates not observable"],
)
def test_recalculations_that_cannot_be_observed_are_null(counted: Snapshot) -> None:
    made = as_json(counted)
    assert (made["totals"]["recalculations"], made["recalculation_seconds"]) == (None, None)


def test_what_a_vcpus_creation_takes() -> None:
    made = report(created(3))
    assert (made.totals.vcpus_created, made.totals.creation_recalculations, made.totals.recalculations) == (3, 6, 7)
    assert made.per_vcpu_creation == PerCreation(calls=16, redundant=9, recalculations=2)
    assert json.loads(encode(made))["per_vcpu_creation"] == {"calls": 16, "redundant": 9, "recalculations": 2}
    assert report(toggle(vcpus=2)).per_vcpu_creation == PerCreation(calls=7, redundant=0, recalculations=None)
    blind = report(toggle(vcpus=2, exact=False)).per_vcpu_creation
    assert blind == PerCreation(calls=7, redundant=None, recalculations=None)
    idle = report(created(3, vcpus_created=4)).per_vcpu_creation  # one has not run yet
    assert idle == PerCreation(calls=12, redundant=6.75, recalculations=1.5)


@pytest.mark.parametrize(
    "change",
    [{"vcpus_created": 0}, {"calls_observable": False, "calls": {}}, {"creations_observable": False}],
    ids=["none", "calls not observable", "creations not followed"],
)
def test_what_a_creation_takes_is_null_where_it_is_unknown(change: dict[str, Any]) -> None:
    made = report(created(3, **change))
    assert made.per_vcpu_creation is None
    followed = change.get("creations_observable", True)
    assert made.totals.vcpus_created == (change.get("vcpus_created", 3) if followed else None)
    assert made.totals.creation_recalculations == (6 if followed else None)


def test_rows_are_kinds_of_calls_in_order() -> None:
    row = next(
        row for row in report().calls if row.index == FS_BASE and row.cause == "filter_change" and row.access == "read"
    )
    assert row == CallRow(
        msr="0xc0000100",
        name="FS_BASE",
        access="read",
        action="disable",
        cause="filter_change",
        caller=HOOK,
        calls=101,
        redundant=0,
        changed_read=101,
        changed_write=0,
        refused=50,
    )
    keys = [(row.index, row.access, row.action, row.cause, row.caller) for row in report().calls]
    assert keys == sorted(keys)


def test_rows_are_sums_over_vms() -> None:
    one, other = toggle(5, pid=100), toggle(7, pid=200)
    assert report(one.after(other)).calls == report(toggle(5).after(toggle(7))).calls
    mixed = report(one.after(toggle(7, pid=200, exact=False))).calls
    assert {row.redundant for row in mixed} == {None}


def test_more_outcomes_than_calls_are_refused() -> None:
    data = encode(patched()).replace(b'"redundant": 101', b'"redundant": 102')
    with pytest.raises(Exception, match="more outcomes than calls"):
        decode(data)


def test_the_histogram_has_counts_per_bucket() -> None:
    seconds = report(toggle(101)).filter_update_seconds
    assert seconds
    assert seconds.count == 101
    assert seconds.sum == pytest.approx(101 * 6e-6)
    assert [bucket.le for bucket in seconds.buckets] == [*(pytest.approx(b) for b in DURATION_BOUNDS), None]
    assert [bucket.count for bucket in seconds.buckets] == [1, *[0] * 5, 99, *[0] * 17, 1]
    assert json.loads(encode(report()))["filter_update_seconds"]["buckets"][0] == {"le": 1.28e-07, "count": 1}


def test_a_report_has_the_host_and_the_command() -> None:
    started = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2)))
    made = report(toggle(vcpus=3), started=started, label="l", notes=["n"], exit_status=7)
    assert (made.started, made.label, made.title, made.exit_status) == ("2026-01-02T01:04:05Z", "l", "l", 7)
    assert (made.command, made.notes, made.duration_seconds, made.msrtrace) == ([*WORKLOAD], ["n"], 2.5, "0.1.0")
    host = made.host
    assert (host.kernel, host.version, host.cpu) == (
        "6.1.0-53-amd64",
        "#1 SMP Debian 6.1.192-1",
        "Intel(R) Core(TM) i7",
    )
    assert (host.vcpus_seen, host.vmms_seen, host.module_parameters) == (3, 1, {"ept": "Y", "nested": "Y"})
    assert (host.vendor, host.layout, host.backend, host.redundancy) == ("vmx", "toggle", "kprobe", "exact")
    assert report(recalc(), command=()).command is None
    assert report().title == "6.1.0-53-amd64"


def test_a_report_has_the_parameters_of_its_vendors_module() -> None:
    intel, made = as_json(toggle())["host"], json.loads(encode(amd()))["host"]
    assert (intel["vendor"], intel["kvm_intel"]) == ("vmx", {"ept": "Y", "nested": "Y"})
    assert (made["vendor"], made["kvm_amd"]) == ("svm", {"avic": "N", "nested": "1"})
    assert "kvm_amd" not in intel
    assert "kvm_intel" not in made
    assert (amd().host.module, amd().host.module_parameters) == ("kvm_amd", {"avic": "N", "nested": "1"})


def test_calls_per_filter_update_of_amd() -> None:
    """A call that passes one direction through disables."""
    each = as_json(svm_pass(404))["per_filter_update"]
    assert each == {
        **{"calls": 47, "redundant": 46, "enable": 37, "enable_redundant": 37},
        **{"disable": 10, "disable_redundant": 9},
    }
    each = as_json(svm_recalc())["per_filter_update"]
    assert (each["calls"], each["redundant"], each["disable"]) == (11, 10, 10)
    written = replace(
        svm_pass(3), calls={Call(PRED_CMD, "read_write", "disable_read", "filter_change", HOOK): Outcome(3)}
    )
    assert as_json(written)["per_filter_update"]["disable"] == 1
    row = next(row for row in amd().calls if row.index == PRED_CMD and row.cause == "filter_change")
    assert (row.name, row.access, row.action) == ("IA32_PRED_CMD", "read_write", "disable_write")


def test_host_info_of_a_machine(tmp_path: Path) -> None:
    parameters = tmp_path / "sys/module/kvm_intel/parameters"
    parameters.mkdir(parents=True)
    (parameters / "nested").write_text("Y\n")
    (parameters / "ept").write_bytes(b"\xff\n")
    (parameters / "gone").symlink_to("nowhere")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nmodel name\t: A: b\nmodel name\t: C\n")
    found = HostInfo.here("kvm_intel", tmp_path)
    assert (found.cpu, found.module_parameters) == ("A: b", {"ept": "\N{REPLACEMENT CHARACTER}", "nested": "Y"})
    assert (found.kernel, found.version) == (os.uname().release, os.uname().version)
    assert (
        HostInfo.here("kvm_intel", tmp_path / "none").cpu,
        HostInfo.here("kvm_intel", tmp_path / "none").module_parameters,
    ) == ("", {})


# --- VMs ---

UUID = "6f1d7d5e-0c1b-4b6e-9a58-2d0a6f4f0001"


def test_a_report_by_vm_has_a_row_for_each() -> None:
    both = replace(
        toggle(5, pid=100).after(toggle(7, pid=200, patched=False)),
        by_vm=True,
        vms={100: VmInfo("web", UUID, "qemu"), 200: VmInfo("")},
    )
    web, db = report(both).vms or []
    expected = Vm(
        pid=100,
        name="web",
        uuid=UUID,
        vmm="qemu",
        calls=72,
        redundant=55,
        filter_updates=5,
        filter_update_seconds_sum=5 * 6e-6,
    )
    assert web == expected
    assert (db.pid, db.name, db.uuid, db.vmm, db.calls, db.redundant, db.filter_updates) == (
        200,
        "",
        "",
        "",
        217,
        196,
        7,
    )


def test_rows_of_vms_have_recalculations() -> None:
    counted = replace(recalc(), updates={100: times(3)}, recalcs={0: times(1), 200: times(2)}, by_vm=True)
    assert [(vm.pid, vm.recalculations) for vm in report(counted).vms or []] == [(0, 1), (100, 0), (200, 2)]
    assert [vm.recalculations for vm in report(toggle(5, pid=100)).vms or []] == [None]


def test_unknown_counts_of_vms_are_null() -> None:
    (vm,) = report(toggle(5, pid=100, exact=False)).vms or []
    assert (vm.calls, vm.redundant) == (72, None)
    (vm,) = report(replace(toggle(5, pid=100), calls_observable=False, calls={})).vms or []
    assert (vm.calls, vm.redundant, vm.filter_updates) == (None, None, 5)
    (vm,) = report(replace(toggle(5, pid=100), updates={}, updates_observable=False)).vms or []
    assert (vm.calls, vm.filter_updates, vm.filter_update_seconds_sum) == (72, None, 0.0)


def test_idle_vms_are_left_out() -> None:
    """They are in the snapshot if they were active before."""
    assert report(Snapshot("toggle", by_vm=True, vms={300: VmInfo("idle")})).vms == []
    assert report(Snapshot("toggle", vms={300: VmInfo("idle")})).vms is None


# --- losses ---


@pytest.mark.parametrize(
    ("change", "loss"),
    [
        ({"maps": (Map("calls", 9, 9, 3), Map("vcpus", 1, 9))}, {"dropped_updates": {"calls": 3}}),
        ({"probes": (Probe("f", "f", True, "", 2), Probe("g", "g", True, ""))}, {"probe_missed": {"f": 2}}),
        ({"probes": (Probe(HOOK, None, False, "none"),)}, {"not_probed": [HOOK]}),
        ({"unpaired_returns": 4}, {"unpaired_returns": 4}),
        ({"read_failures": 5}, {"read_failures": 5}),
        ({"blind_seconds": 2.50004}, {"blind_seconds": 2.5}),
        ({"open_calls": 2}, {"open_calls": 2}),
        ({"unpaired_refusals": 6}, {"unpaired_refusals": 6}),
        ({"open_exits": 3}, {"open_exits": 3}),
        ({"module_unloads": 1}, {"module_unloads": 1}),
        ({"uncounted": ("calls of a livepatch",)}, {"uncounted": ["calls of a livepatch"]}),
    ],
)
def test_every_loss_makes_a_lower_bound(change: dict[str, Any], loss: dict[str, Any]) -> None:
    made = as_json(replace(toggle(), **change))
    nothing = {"dropped_updates": {}, "probe_missed": {}, "unpaired_returns": 0, "read_failures": 0}
    nothing |= {"unpaired_refusals": 0, "open_exits": 0, "blind_seconds": 0.0}
    nothing |= {"open_calls": 0, "module_unloads": 0, "not_probed": [], "uncounted": []}
    assert (made["loss"], made["lower_bound"]) == (nothing | loss, True)
    whole = as_json(toggle())
    assert (whole["loss"], whole["lower_bound"]) == (nothing, False)


def test_a_probe_that_no_count_depends_on_may_be_missing() -> None:
    made = as_json(replace(toggle(), probes=(Probe("vmx_vcpu_create", None, False, "none"),)))
    assert (made["loss"]["not_probed"], made["lower_bound"]) == (["vmx_vcpu_create"], False)


# --- per bit ---


def row(access: str, **counts: int | None) -> CallRow:
    call = Call(FS_BASE, access, "disable", "filter_change", HOOK)
    return call_rows([(call, Outcome(**counts))])[0]  # type: ignore[arg-type]


def test_a_call_that_names_both_bits_counts_for_each() -> None:
    both = row("read_write", calls=9, redundant=4, changed_read=5, changed_write=2, refused=0)
    read, write = Bit(FS_BASE, "read"), Bit(FS_BASE, "write")
    assert by_bit([both]) == {read: BitCounts(9, 4), write: BitCounts(9, 7)}
    alone = row("write", calls=3, redundant=1, changed_read=0, changed_write=2, refused=0)
    assert by_bit([both, alone]) == {read: BitCounts(9, 4), write: BitCounts(12, 8)}
    unknown = row("write", calls=3)
    for order in ([both, unknown], [unknown, both]):
        assert by_bit(order) == {read: BitCounts(9, 4), write: BitCounts(12, None)}
    assert str(read) == "FS_BASE read"


@given(st.lists(rows(), max_size=12))
def test_sums_over_bits_agree_with_rows(found: list[CallRow]) -> None:
    sums: Counter[tuple[int, str]] = Counter()
    unchanged: Counter[tuple[int, str]] = Counter()
    unknown = set()
    for one in found:
        for direction in ("read", "write") if one.access == "read_write" else (one.access,):
            changed = {"read": one.changed_read, "write": one.changed_write}[direction]
            sums[one.index, direction] += one.calls
            if changed is None:
                unknown.add((one.index, direction))
            else:
                unchanged[one.index, direction] += one.calls - changed
    result = {(bit.msr, bit.direction): counts for bit, counts in by_bit(found).items()}
    assert result.keys() == sums.keys()
    assert list(result) == sorted(result)
    for key, counts in result.items():
        assert counts == BitCounts(sums[key], None if key in unknown else unchanged[key])


@st.composite
def single(draw: st.DrawFn) -> tuple[Call, Outcome]:
    """A call that names one bit, and its outcome."""
    access, calls = draw(st.sampled_from(["read", "write"])), draw(st.integers(0, 10**6))
    index, action = draw(st.sampled_from([TSC, FS_BASE])), draw(st.sampled_from(["enable", "disable"]))
    return Call(index, access, action, "filter_change", HOOK), outcome(calls, draw(st.integers(0, calls)), access)


@given(st.lists(single()))
def test_where_a_call_names_one_bit_bits_and_calls_are_the_same(calls: list[tuple[Call, Outcome]]) -> None:
    found = call_rows(calls)
    assert sum(row.calls for row in found) == sum(one.calls for _, one in calls)
    assert sum(counts.calls for counts in by_bit(found).values()) == sum(row.calls for row in found)
    assert sum(counts.redundant or 0 for counts in by_bit(found).values()) == redundant_sum(found)


# --- what cannot be written down ---


def test_text_from_elsewhere_is_made_printable() -> None:
    made = report(label="a\nb\x1b[31m", command=["sh", "-c", "\udcff\u202e", "z" * 9999], notes=["\x9b"] * 300)
    assert (made.label, made.command) == ("a\\nb\\x1b[31m", ["sh", "-c", "\\udcff\\u202e", "z" * 4093 + "..."])
    assert made.notes == ["\\x9b"] * 256
    assert decode(encode(made)) == made


def test_a_long_command_is_cut() -> None:
    made = report(command=["x"] * 10_000)
    assert decode(encode(made)) == made


@given(any_reports)
def test_all_reports_can_be_read(made: Any) -> None:
    assert decode(encode(made)) == made


def test_no_updates_took_no_time() -> None:
    made = report(Snapshot("toggle", updates={0: Durations()})).filter_update_seconds
    assert made is not None
    assert (made.count, made.sum, {bucket.count for bucket in made.buckets}) == (0, 0.0, {0})
