# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports and comparisons of real hosts: the figures that a kernel developer would put into a commit message."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from answers import AMD, LAYOUTS, PER_UPDATE, PER_VCPU, RECALCULATING, RECALCULATIONS, expected
from conftest import Collected
from jsonschema import Draft202012Validator
from reporting import BRIEF, REPEATS, UPDATES, VCPUS

from tracer.report.compare import compare
from tracer.report.comparison_view import comparison_document, sentence
from tracer.report.file import read, schema
from tracer.report.report import Report

APPLIED = UPDATES * VCPUS
WHY = {
    **dict.fromkeys(("backports", "sid"), "superseded"),
    "filter-only": "calls cannot be observed on this kernel (layout filter-only)",
    **dict.fromkeys(AMD, "KVM never had this patch"),
}


def report(collected: Collected, variant: str, case: str) -> Report:
    """A report that the host left."""
    collected.scenario("reports")
    return read(collected.folder / "reports" / f"{variant}-{case}.json")


def msrtrace(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line, on this machine."""
    command = [sys.executable, "-m", "tracer.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_report_fits_the_schema_and_lost_nothing(collected: Collected) -> None:
    found = collected.scenario("reports")
    validator = Draft202012Validator(schema())
    for variant in found["variants"]:
        for case in found["cases"]:
            file = collected.folder / "reports" / f"{variant}-{case}.json"
            validator.validate(json.loads(file.read_text()))
            assert not read(file).lower_bound, file


def test_what_was_seen_is_what_the_workload_did(collected: Collected) -> None:
    for variant in collected.variants:
        main = report(collected, variant, "main")
        assert main.totals.filter_updates == APPLIED
        assert (main.host.vcpus_seen, main.host.vmms_seen) == (VCPUS, 1)
        assert main.exit_status == 0


def test_recalculations_are_reported_where_there_are_any(collected: Collected) -> None:
    for variant in collected.variants:
        main = report(collected, variant, "main")
        seconds = main.recalculation_seconds
        if collected.host not in RECALCULATING:
            assert (main.totals.recalculations, seconds) == (None, None)
            continue
        assert main.totals.recalculations
        assert seconds
        assert sum(bucket.count for bucket in seconds.buckets) == seconds.count == main.totals.recalculations
        calls, _ = PER_UPDATE[collected.host][variant]
        assert sum(row.calls for row in main.rows("vcpu_create")) == calls * main.totals.recalculations


def test_what_the_creation_of_a_vcpu_takes(collected: Collected) -> None:
    for variant in collected.variants:
        main = report(collected, variant, "main")
        recalculations = RECALCULATIONS.get(collected.host)
        assert main.totals.vcpus_created == VCPUS
        assert main.totals.creation_recalculations == (recalculations and recalculations * VCPUS)
        each = main.per_vcpu_creation
        if collected.host == "filter-only":
            assert each is None
            continue
        assert each
        assert (each.calls, each.redundant, each.recalculations) == (*PER_VCPU[collected.host], recalculations)


def test_calls_per_filter_update_are_whole_and_right(observed: Collected) -> None:
    for variant in observed.variants:
        each = report(observed, variant, "main").per_filter_update
        assert each
        calls, redundant = PER_UPDATE[observed.host][variant]
        assert (each.calls, each.redundant) == (calls, redundant)
        of_one = expected(observed.host, variant, 0, 1)
        enables = tuple(sum(count for key, count in kind.items() if key[2] == "enable") for kind in of_one)
        assert (each.enable, each.enable_redundant) == enables
        assert (each.disable, each.disable_redundant) == (calls - enables[0], redundant - enables[1])


def test_the_verdict_is_right_whatever_the_filter_does(both: Collected) -> None:
    for variant, patched in {"patched": True, "unpatched": False}.items():
        for case in ("main", "repeat-0", "deny-all", "several", "spec-ctrl"):
            assert report(both, variant, case).verdict.patched is patched, case


def test_without_filter_updates_too_little_was_seen(both: Collected) -> None:
    for variant in both.variants:
        idle = report(both, variant, "idle")
        assert (idle.verdict.patched, idle.verdict.why[:15]) == (None, "too little seen")
        calls, redundant = PER_VCPU[both.host]
        assert (idle.totals.calls, idle.totals.redundant) == (2 * calls, 2 * redundant)
        assert idle.per_filter_update is None


def test_other_kernels_have_no_verdict_and_say_why(other: Collected) -> None:
    for variant in other.variants:
        verdict = report(other, variant, "main").verdict
        assert verdict.patched is None
        assert WHY[other.host] in verdict.why


def test_what_the_patch_saves(both: Collected) -> None:
    calls, redundant = PER_UPDATE[both.host]["unpatched"]
    unpatched, patched = (report(both, variant, "main") for variant in ("unpatched", "patched"))
    change = f"{calls - 13} fewer calls, {(13 - calls) / calls:+.1%}"
    assert sentence(compare([unpatched], [patched])) == (
        f"unpatched makes {calls} calls a filter update, {redundant} of them redundant; "
        f"patched 13, 11 redundant: {change}"
    )
    back = sentence(compare([patched], [unpatched]))
    assert back.endswith(f"{calls - 13} more calls, {(calls - 13) / 13:+.1%}")


def test_repeats_count_the_same(both: Collected) -> None:
    both.scenario("reports")
    folder = both.folder / "reports"
    sides = [[folder / f"{variant}-repeat-{n}.json" for n in range(REPEATS)] for variant in ("unpatched", "patched")]
    done = msrtrace("compare", "--base", *sides[0], "--new", *sides[1], "--format", "json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["warnings"] == []
    assert found["base"]["filter_update_seconds"]["reports"] == REPEATS
    assert found["base"]["per_filter_update"]["calls"] == PER_UPDATE[both.host]["unpatched"][0]


def test_vms_are_told_apart_though_they_are_gone(collected: Collected) -> None:
    several = report(collected, collected.variants[0], "several")
    assert several.vms
    assert len({vm.pid for vm in several.vms if vm.name == "workload"}) == 3
    assert sum(vm.filter_updates or 0 for vm in several.vms) == several.totals.filter_updates
    assert sum(vm.calls or 0 for vm in several.vms) == (several.totals.calls or 0)
    assert sum(vm.recalculations or 0 for vm in several.vms) == (several.totals.recalculations or 0)
    assert several.host.vmms_seen == 3


def test_vms_that_end_at_once_have_the_name_of_their_command(collected: Collected) -> None:
    brief = report(collected, collected.variants[0], "brief")
    assert brief.vms
    assert [vm.name for vm in brief.vms if vm.pid] == ["workload"] * BRIEF
    assert brief.host.vmms_seen == BRIEF


def test_a_host_whose_calls_cannot_be_observed_is_refused_with_the_reason(filter_only: Collected) -> None:
    filter_only.scenario("reports")
    file = filter_only.folder / "reports/patched-main.json"
    done = msrtrace("compare", file, file)
    assert (done.returncode, done.stdout) == (3, "")
    assert len(done.stderr.splitlines()) == 1
    assert "calls cannot be observed on that kernel (layout filter-only)" in done.stderr
    assert msrtrace("compare", "--force", file, file).returncode == 0


def test_kernels_of_different_layouts_are_compared_per_bit(superseded: Collected, toggled: Collected) -> None:
    old, new = report(toggled, "patched", "main"), report(superseded, "patched", "main")
    comparison = compare([old], [new])
    assert comparison.unit == "bit"
    # 6.1: reads of the TSC, and both bits of six MSRs. 7.x: SPEC_CTRL's two as well.
    assert sentence(comparison).endswith(
        "13 bits a filter update, 11 of them redundant; new 15, 13 redundant: 2 more bits, +15.4%"
    )
    text = comparison_document(comparison).text()
    assert "Compared per bit" in text
    # A creation, too: 13 bits, and SPEC_CTRL's two, which were set already.
    assert re.search(r"^  bits +13 \(0\) +15 \(2\) +\+2 \(\+2\)\n  recalculations +none +1$", text, re.MULTILINE)


def test_the_command_keeps_its_status_and_an_interrupted_trace_reports(whole: Collected) -> None:
    found = whole.scenario("report_command")
    assert found["around"]["status"] == 7
    assert found["around"]["stdout"].startswith("workload: ")
    around = read(whole.folder / "reports/cli.json")
    assert (around.exit_status, around.label, around.totals.filter_updates) == (7, "cli", 5)
    assert around.command == ["sh", "-c", "workload --updates 5; exit 7"]
    assert "<svg" in (whole.folder / "reports/cli.html").read_text()
    interrupted = json.loads(found["interrupted"]["stdout"])
    assert any("SIGINT" in note for note in interrupted["notes"])
    assert interrupted["totals"]["filter_updates"] > 0
    assert WHY[whole.host] in interrupted["verdict"]["why"]


def test_exits_are_joined_with_who_wants_them(whole: Collected) -> None:
    """Also where the VM has ended before the report is made; what the filter does not deny passes, and has no exit."""
    done = whole.scenario("report_command")["exits"]
    assert done["status"] == 0, done
    made = read(whole.folder / "reports/exits.json")
    assert made.exits
    assert [
        (row.name, row.access, row.result, row.exits, row.exits_by_filter, row.interceptors) for row in made.exits
    ] == [
        ("FS_BASE", "write", "filtered", 6 * 13, 6 * 13, "filter"),
        ("EFER", "read", "ok", 6 * 7, 0, "kvm"),
    ]
    totals = made.totals
    assert (totals.exits, totals.exits_by_filter, totals.exits_perhaps_by_filter) == (6 * 20, 6 * 13, 0)
    assert made.vms
    [vm] = made.vms
    assert (vm.name, vm.exits, vm.exits_by_filter) == ("guarded", 6 * 20, 6 * 13)
    assert (made.lower_bound, made.state and made.state.vms) == (False, [])
    text = msrtrace("show", whole.folder / "reports/exits.json").stdout
    assert re.search(r"\d exits/s on FS_BASE \(0xc0000100\), write: the VM's filter alone denies it\n", text)


def test_top_shows_exits(whole: Collected) -> None:
    top = whole.scenario("report_command")["top_exits"]
    assert (top["status"], top["stderr"]) == (0, "")
    lines = top["stdout"].splitlines()
    assert all(len(line) <= 80 and line.isprintable() for line in lines)
    assert [
        line for line in lines if re.match(r"exits [\d.,]+/s, 6\d\.\d% of them since a filter alone denies the", line)
    ]
    assert [line for line in lines if re.match(r"FS_BASE +write +filtered +[\d.,]+ +6\d\.\d%  filter$", line)]
    assert [line for line in lines if re.match(r"EFER +read +ok +[\d.,]+ +3\d\.\d%  kvm$", line)]


def test_top_shows_what_goes_on(whole: Collected) -> None:
    """In a pipe: one interval, plain."""
    top = whole.scenario("report_command")["top"]
    assert (top["status"], top["stderr"]) == (0, "")
    lines = top["stdout"].splitlines()
    assert all(len(line) <= 80 and line.isprintable() for line in lines)
    assert f"layout {LAYOUTS[whole.host]}, redundancy exact" in lines[0]
    [per_update] = [line for line in lines if "calls per filter update" in line]
    # An update may fall between the reading of its calls and that of the updates.
    [calls, _] = PER_UPDATE[whole.host][whole.variants[0]]
    assert re.match(rf"({calls}|about ({calls}|{calls - 1})\.\d) calls per filter update, ", per_update)
    named = r" +both +disable +filter_change +\d[\d.,]*"
    assert [line for line in lines if re.match(rf"FS_BASE{named} +0\.0%$", line)]
    assert [line for line in lines if re.match(rf"GS_BASE{named} +100\.0%$", line)]
