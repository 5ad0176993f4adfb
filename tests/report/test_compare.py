# SPDX-License-Identifier: GPL-2.0-or-later
"""Comparisons: the sentence, what is refused, how repeats and times are judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import product
from random import Random
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import (
    AMD_HOST,
    FS_BASE,
    HOST,
    XFD_ERR,
    amd,
    any_reports,
    created,
    patched,
    recalc,
    report,
    svm_pass,
    svm_recalc,
    times,
    toggle,
    unpatched,
    views,
)

from tracer.model.snapshot import Map, Probe, Snapshot
from tracer.report.changelog import changelog
from tracer.report.compare import (
    Comparison,
    Incomparable,
    PerUpdate,
    Side,
    compare,
    format_command,
    lost,
)
from tracer.report.comparison_json import comparison_json
from tracer.report.comparison_view import comparison_document, comparison_table, sentence
from tracer.report.computer import Difference
from tracer.report.creation import PerCreation
from tracer.report.interval import timed
from tracer.report.report import Bit, Report, by_bit

SENTENCE = (
    "unpatched makes 30 calls a filter update, 28 of them redundant; patched 13, 11 redundant: 17 fewer calls, -56.7%"
)
SWAPPED = (
    "patched makes 13 calls a filter update, 11 of them redundant; unpatched 30, 28 redundant: 17 more calls, +130.8%"
)


def side_by_side(base: Report, new: Report, **options: Any) -> Comparison:
    return compare([base], [new], **options)


# --- what is said ---


def test_a_patch_shows_as_fewer_calls_per_update() -> None:
    comparison = side_by_side(unpatched(), patched())
    assert sentence(comparison) == SENTENCE
    assert comparison_document(comparison).text().startswith(SENTENCE + "\n\n")
    assert comparison.unit == "call"
    assert (comparison.warnings, comparison.forced, comparison.differences) == ((), (), ())


def test_swapping_the_sides_swaps_the_signs() -> None:
    comparison = side_by_side(patched(), unpatched())
    assert sentence(comparison) == SWAPPED
    there = comparison_table(side_by_side(unpatched(), patched())).rows
    back = comparison_table(comparison).rows
    assert there[-1] == ("all calls", "", "", "30 (28)", "13 (11)", "-17 (-17)")
    assert back[-1] == ("all calls", "", "", "13 (11)", "30 (28)", "+17 (+17)")
    assert [row[:3] for row in there] == [row[:3] for row in back]
    assert [(row[4], row[3]) for row in there] == [row[3:5] for row in back]


@pytest.mark.parametrize("other", [101, 7, 1])
def test_equal_sides_have_no_change(other: int) -> None:
    """However many updates either side had."""
    comparison = side_by_side(patched(), report(toggle(other), label="again"))
    said_ = "patched makes 13 calls a filter update, 11 of them redundant; again 13, 11 redundant: as many calls"
    assert sentence(comparison) == said_
    assert {row.base == row.new for row in comparison.rows} == {True}
    assert {row[-1] for row in comparison_table(comparison).rows} == {"0 (0)"}


def test_different_layouts_are_compared_per_bit() -> None:
    """6.1 updates reads and writes in separate calls, 7.x both in one: the bits are the same, the calls are not."""
    newest = report(recalc(), label="7.2")
    comparison = side_by_side(patched(), newest)
    assert comparison.unit == "bit"
    assert sentence(comparison) == (
        "patched names 13 bits a filter update, 11 of them redundant; 7.2 14, 12 redundant: 1 more bit, +7.7%"
    )
    assert "Compared per bit of the MSR bitmap" in comparison_document(comparison).text()
    assert "Bits that MSR-intercept calls name, per filter update" in changelog(comparison).replace("\n", " ")
    differ = [row for row in comparison.rows if row.base != row.new]
    assert [row.bit for row in differ] == [Bit(XFD_ERR, "read")]
    assert (differ[0].base, differ[0].new) == (PerUpdate(Fraction(0), Fraction(0)), PerUpdate(Fraction(1), Fraction(1)))
    fs_base = next(row for row in comparison.rows if row.bit == Bit(FS_BASE, "write"))
    assert fs_base.base == fs_base.new == PerUpdate(Fraction(1), Fraction(0))
    assert side_by_side(newest, report(recalc(), label="7.3")).unit == "call"


# --- creations of vCPUs ---


def creation_lines(comparison: Comparison) -> list[str]:
    """Of the text."""
    text = comparison_document(comparison).text()
    _, found, rest = text.partition("Calls per vCPU created (of them redundant)\n")
    return [" ".join(line.split()) for line in rest.partition("\n\n")[0].splitlines()] if found else []


def test_creations_are_compared() -> None:
    old, new = report(created(3), label="6.17"), report(created(1, recalculations=1), label="7.2")
    comparison = side_by_side(old, new)
    assert creation_lines(comparison) == [
        "6.17: 3 vCPUs created",
        "7.2: 1 vCPU created",
        "6.17 7.2 change",
        "-------------- ------ ----- --------",
        "calls 16 (9) 8 (1) -8 (-8)",
        "recalculations 2 1 -1",
    ]
    assert (
        "The same per vCPU created:\n\n"
        "                     6.17  7.2  change\n"
        "  -----------------  ----  ---  ------\n"
        "  calls                16    8  -50.0%\n"
        "  of them redundant     9    1  -88.9%\n"
        "  recalculations        2    1  -50.0%\n"
    ) in changelog(comparison)
    sides = [json.loads(comparison_json(comparison))[side] for side in ("base", "new")]
    assert [side["vcpus_created"] for side in sides] == [3, 1]
    assert [side["per_vcpu_creation"] for side in sides] == [
        {"calls": 16, "redundant": 9, "recalculations": 2},
        {"calls": 8, "redundant": 1, "recalculations": 1},
    ]


def test_creations_of_different_layouts_are_compared_per_bit() -> None:
    """Kernels before 6.17 recalculate for nothing but filters."""
    comparison = side_by_side(patched(), report(created(5, recalculations=1), label="7.2"))
    assert creation_lines(comparison)[-2:] == ["bits 13 (0) 15 (2) +2 (+2)", "recalculations none 1"]
    assert "recalculations" not in changelog(comparison)
    assert "\n  bits                    13   15  +15.4%\n" in changelog(comparison).partition("per vCPU created")[2]
    assert json.loads(comparison_json(comparison))["base"]["per_vcpu_creation"]["recalculations"] is None


def test_creations_that_are_the_same_are_not_in_a_commit_message() -> None:
    comparison = side_by_side(unpatched(), patched())
    assert creation_lines(comparison)[-1] == "calls 7 (0) 7 (0) 0 (0)"
    assert "vCPU created" not in changelog(comparison)


@pytest.mark.parametrize("change", [{"vcpus_created": 0}, {"creations_observable": False}])
def test_creations_that_are_unknown_stay_unknown(change: dict[str, Any]) -> None:
    """Also if one report of several does not have them, as older ones."""
    known, unknown = created(3), created(3, **change)
    assert creation_lines(side_by_side(report(unknown, label="a"), report(unknown, label="b"))) == []
    comparison = side_by_side(report(unknown, label="old"), report(known, label="new"))
    assert creation_lines(comparison)[-2:] == ["calls ? (?) 16 (9) ? (?)", "recalculations ? 2 ?"]
    assert "vCPU created" not in changelog(comparison)
    found = json.loads(comparison_json(comparison))["base"]["per_vcpu_creation"]
    assert found == {"calls": None, "redundant": None, "recalculations": None}
    if "creations_observable" in change:
        mixed = compare([report(known), report(unknown)], [report(known)])
        assert "? vCPUs created" in creation_lines(mixed)[0]
        assert mixed.per_creation(mixed.base) == PerCreation()


def test_creations_of_repeats_are_added_and_must_agree() -> None:
    same = compare([report(created(3)), report(created(4))], [report(created(1))])
    assert (
        same.per_creation(same.base)
        == same.per_creation(same.new)
        == PerCreation(Fraction(16), Fraction(9), Fraction(2))
    )
    assert same.warnings == ()
    differ = compare([report(created(3), label="a"), report(created(1, recalculations=1))], [report(created(1))])
    assert differ.per_creation(differ.base).calls == Fraction(3 * 16 + 8, 4)
    assert differ.warnings == (
        "a: calls per vCPU created differ between its reports, 8 to 16; the table has their mean",
        "a: redundant per vCPU created differ between its reports, 1 to 9; the table has their mean",
        "a: recalculations per vCPU created differ between its reports, 1 to 2; the table has their mean",
    )


def test_bits_are_in_order() -> None:
    bits = [(row.bit.msr, row.bit.direction) for row in side_by_side(patched(), unpatched()).rows]
    assert bits == sorted(bits)
    assert len(bits) == 30


def test_sides_are_titled_by_label_or_kernel() -> None:
    assert sentence(side_by_side(patched(), patched())).startswith("base makes 13 calls a filter update, 11 of them")
    other = report(host=replace(HOST, kernel="6.2"))
    comparison = side_by_side(report(), other)
    assert (comparison.base.title, comparison.new.title) == ("6.1.0-53-amd64", "6.2")


def test_counts_that_do_not_divide_evenly_have_a_warning() -> None:
    uneven = report(replace(toggle(3), updates={0: times(4)}), label="uneven")
    comparison = side_by_side(uneven, patched())
    assert sentence(comparison).startswith(
        "uneven makes 9.75 calls a filter update, 8.25 of them redundant; patched 13"
    )
    assert [w for w in comparison.warnings if "is not an integer" in w and w.startswith("uneven: ")]


def test_unknown_redundancy_stays_unknown() -> None:
    comparison = side_by_side(report(toggle(exact=False), label="blind"), patched())
    assert sentence(comparison).startswith("blind makes 13 calls a filter update, ? of them redundant; patched 13, 11")
    assert comparison.warnings == ("blind: which calls are redundant is unknown",)
    assert comparison_table(comparison).rows[-1] == ("all calls", "", "", "13 (?)", "13 (11)", "0 (?)")


def test_differences_of_the_hosts() -> None:
    host = replace(
        HOST, kernel="6.12", version="#2", cpu="Xeon", module_parameters={"ept": "Y", "nested": "N", "pml": "Y"}
    )
    comparison = side_by_side(patched(), report(toggle(vcpus=3, backend="fentry"), host, label="other", version="0.2"))
    assert {d.what: (d.base, d.new) for d in comparison.differences} == {
        "kernel": ("6.1.0-53-amd64", "6.12"),
        "version": ("#1 SMP Debian 6.1.192-1", "#2"),
        "CPU": ("Intel(R) Core(TM) i7", "Xeon"),
        "backend": ("kprobe", "fentry"),
        "msrtrace": ("0.1.0", "0.2"),
        "vCPUs seen": ("1", "3"),
        "kvm_intel.nested": ("Y", "N"),
        "kvm_intel.pml": ("-", "Y"),
    }
    assert comparison.warnings == ("the CPUs differ, so the times cannot be compared",)
    assert "The hosts differ in" in comparison_document(comparison).text()


def test_what_may_distort_a_comparison_has_a_warning() -> None:
    alone = side_by_side(patched(command=None), unpatched(command=None))
    assert alone.warnings == ("neither report ran a command, so whether the workloads were the same is unknown",)
    failed = side_by_side(patched(exit_status=7), unpatched())
    assert failed.warnings == ("patched: the command ended with status 7",)


# --- another vendor ---


def test_hosts_of_different_vendors_are_compared_per_bit() -> None:
    comparison = side_by_side(patched(), amd(label="amd"))
    assert comparison.unit == "bit"
    assert sentence(comparison) == (
        "patched names 13 bits a filter update, 11 of them redundant; amd 94, 92 redundant: 81 more bits, +623.1%"
    )
    fs_base = next(row for row in comparison.rows if row.bit == Bit(FS_BASE, "write"))
    assert fs_base.base == fs_base.new == PerUpdate(Fraction(1), Fraction(0))
    text = comparison_document(comparison).text()
    assert "functions differ (layouts toggle of Intel VMX and pass of AMD SVM): a call" in text
    assert "  amd: patch not applicable: KVM never had this patch for AMD SVM; 101 filter updates made" in text


def test_different_vendors_are_the_first_difference() -> None:
    comparison = side_by_side(patched(), amd(label="amd"))
    first, *others = comparison.differences
    assert first == Difference("hardware", "Intel VMX", "AMD SVM")
    assert not [other.what for other in others if "." in other.what], "parameters of different modules"
    assert comparison.warnings == (
        "not the same kind of hardware (Intel VMX and AMD SVM), so the times cannot be compared",
    )


def test_a_layout_of_the_same_name_is_another_vendors() -> None:
    comparison = side_by_side(report(recalc(), label="intel"), amd(svm_recalc(), label="amd"))
    assert comparison.unit == "bit"
    assert "(layouts recalc of Intel VMX and recalc of AMD SVM)" in comparison_document(comparison).text()


def test_hosts_of_one_vendor_differ_in_parameters_of_its_module() -> None:
    other = report(svm_pass(), replace(AMD_HOST, module_parameters={"avic": "Y"}), label="avic")
    comparison = side_by_side(amd(label="amd"), other)
    assert comparison.unit == "call"
    assert sentence(comparison).endswith("; avic 47, 46 redundant: as many calls")
    assert comparison.differences == (
        Difference("kvm_amd.avic", "N", "Y"),
        Difference("kvm_amd.nested", "1", "-"),
    )


def test_what_6_17_saves_on_amd() -> None:
    comparison = side_by_side(amd(label="6.12"), amd(svm_recalc(), label="6.18"))
    assert sentence(comparison).startswith("6.12 names 94 bits a filter update, 92 of them redundant; 6.18 22, 20")
    assert "hardware" not in {difference.what for difference in comparison.differences}


def test_a_side_must_be_of_one_vendor() -> None:
    mixed = [report(recalc(), label="intel"), amd(svm_recalc(), label="amd")]
    with pytest.raises(Incomparable, match=r"^all has reports of hosts that are not the same kind of hardware \("):
        compare(mixed, [report(recalc())], titles=("all", "new"))
    comparison = compare(mixed, [report(recalc())], titles=("all", "new"), force=True)
    said_of_all = "its reports disagree: patch not applicable in 1 (amd), patch undecided in 1 (intel)"
    assert f"all: patch undecided: {said_of_all}" in comparison_document(comparison).text()


# --- what is refused ---

LOST: list[tuple[dict[str, Any], str]] = [
    ({"maps": (Map("calls", 9, 9, 1234),)}, "1,234 updates of map calls dropped"),
    ({"probes": (Probe("f", "f", True, "", 2), Probe("g", None, False, ""))}, "2 runs of f missed, g not probed"),
    ({"unpaired_returns": 3, "read_failures": 4}, "3 unpaired returns, 4 bitmaps not read"),
    ({"blind_seconds": 5.25}, "5.2 s with the kernel's probes switched off"),
    ({"module_unloads": 1}, "kvm_intel reloaded once"),
]
REFUSED: dict[str, tuple[Callable[[], Report], str]] = {
    **{
        why: (lambda change=change: report(replace(toggle(), **change), label="bad"), f"bad is a lower bound: {why}")  # type: ignore[misc]
        for change, why in LOST
    },
    "no update": (
        lambda: report(replace(toggle(), updates={}), label="bad"),
        "bad: no filter update was seen, so there is nothing to divide by",
    ),
    "updates unseen": (
        lambda: report(replace(toggle(), updates={}, updates_observable=False), label="bad"),
        "bad: no filter update was seen, so there is nothing to divide by",
    ),
    "calls unseen": (
        lambda: report(Snapshot("filter-only", updates=toggle().updates, calls_observable=False), label="bad"),
        "bad: calls cannot be observed on that kernel (layout filter-only)",
    ),
    "workload": (
        lambda: report(command=["sh", "-c", "a b"], label="bad"),
        "sh -c 'a b'",
    ),
    "no workload": (lambda: report(command=None, label="bad"), "no command"),
    "outcomes of another layout": (
        lambda: report(replace(toggle(exact=False), layout="set"), label="bad"),
        "so outcomes per bit are needed, and those of bad are unknown",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("swap", [False, True])
def test_what_cannot_be_compared_is_refused_unless_forced(name: str, swap: bool) -> None:
    make, why = REFUSED[name]
    sides = [[make()], [patched()]]
    if swap:
        sides.reverse()
    with pytest.raises(Incomparable) as error:
        compare(*sides)
    assert error.value.status == 3
    text = str(error.value)
    assert text.endswith(" (--force compares them anyway)")
    assert "\n" not in text
    assert why in text
    comparison = compare(*sides, force=True)
    assert "; ".join(comparison.forced) + " (--force compares them anyway)" == text
    for form, shown in views(sides[0][0], sides[1][0]).items():
        if form.startswith("base"):
            assert "FORCED despite" in shown or form in ("base json", "base changelog")
    forced = comparison.forced[0]
    assert forced in comparison_document(comparison).text()
    assert forced.replace(" ", "") in changelog(comparison).replace("\n", "").replace(" ", "")


def test_every_reason_is_given() -> None:
    bad = report(Snapshot("filter-only", calls_observable=False, read_failures=1), label="bad", command=["x"])
    with pytest.raises(Incomparable) as error:
        compare([bad], [patched()])
    assert str(error.value).count("; ") == 2


def test_repeats_must_be_of_one_kernel_and_workload() -> None:
    for other, why in (
        (report(replace(toggle(), layout="recalc")), "6.1.0-53-amd64 has reports of kernels with different layouts"),
        (report(command=["x"]), "6.1.0-53-amd64 has reports of different workloads"),
    ):
        with pytest.raises(Incomparable, match=why):
            compare([report(), other], [patched()])


def test_losses_in_words() -> None:
    assert lost(patched()) == "nothing"
    assert [lost(report(replace(toggle(), **change))) for change, _ in LOST] == [why for _, why in LOST]
    assert lost(amd(svm_pass(module_unloads=2))) == "kvm_amd reloaded 2 times"


def test_commands_are_quoted_for_a_shell() -> None:
    assert format_command(["sh", "-c", "a 'b'"]) == """sh -c 'a '"'"'b'"'"''"""
    assert (format_command(None), format_command([])) == ("no command", "no command")
    assert len(format_command(["x" * 4096] * 100)) == 500


# --- repeats ---


def test_repeats_that_agree_have_no_warning() -> None:
    comparison = compare([unpatched(), report(toggle(7, patched=False))], [patched()] * 3)
    assert sentence(comparison) == SENTENCE
    assert (comparison.base.updates, comparison.new.updates) == (108, 303)
    assert comparison.warnings == ()
    assert "patched: workload --updates 101 (303 filter updates, 3 reports)" in comparison_document(comparison).text()


def test_repeats_that_disagree_have_a_warning() -> None:
    comparison = compare([patched(), report(toggle(101, patched=False))], [patched()])
    assert comparison.warnings == (
        "base: calls per filter update differ between its reports, 13 to 30; the table has their mean",
        "base: redundant per filter update differ between its reports, 11 to 28; the table has their mean",
    )
    assert sentence(comparison).startswith("base makes 21.50 calls a filter update, 19.50 of them redundant; ")


def test_repeats_that_agree_only_in_sum_have_a_warning() -> None:
    """Equally many calls, but for other MSRs."""
    first = toggle()
    moved = {replace(call, msr=0x1A4) if call.msr == 0x10 else call: outcome for call, outcome in first.calls.items()}
    comparison = compare([report(first), report(replace(first, calls=moved))], [patched()])
    assert comparison.warnings == (
        "6.1.0-53-amd64: its reports differ in which MSRs a filter update touches; the table has their mean",
    )


# --- times ---


@pytest.mark.parametrize("count", range(1, 13))
def test_the_interval_covers_the_median_as_often_as_it_says(count: int) -> None:
    """Each mean lies below or above the true median with equal chance: all cases, counted."""
    time = timed([float(value) for value in range(count)])
    assert (time.median, time.reports) == (median(range(count)), count)
    if count == 1:
        assert (time.low, time.high, time.coverage) == (None, None, None)
        return
    assert time.low is not None
    assert time.high == count - 1 - time.low
    low = int(time.low)

    def covered(low: int) -> float:
        """The share of cases in which the median, with `below` means below it, lies within the interval."""
        cases = [sum(case) for case in product((0, 1), repeat=count)]
        return sum(low < below < count - low for below in cases) / len(cases)

    assert time.coverage == pytest.approx(covered(low))
    assert covered(low) >= 0.95 or low == 0
    assert low == (count - 1) // 2 or covered(low + 1) < 0.95, "a narrower interval would do"


def test_the_interval_covers_the_median_of_a_skewed_distribution() -> None:
    random = Random(1)
    truth, runs, hits = 0.6931471805599453, 4000, 0
    for _ in range(runs):
        time = timed([random.expovariate(1) for _ in range(9)])
        hits += (time.low or 0) <= truth <= (time.high or 0)
    assert hits / runs == pytest.approx(timed([float(n) for n in range(9)]).coverage, abs=0.012)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.randoms())
def test_the_order_of_times_does_not_matter(means: list[float], random: Random) -> None:
    shuffled = list(means)
    random.shuffle(shuffled)
    assert timed(means) == timed(shuffled)
    assert min(means) <= timed(means).median <= max(means)


def test_the_interval_of_many_times_is_narrow() -> None:
    assert timed([1.0] * 3000).coverage == pytest.approx(0.95, abs=0.01)


def test_the_time_of_a_side_is_the_median_of_its_means() -> None:
    slow = replace(toggle(), updates={0: replace(times(101), seconds=101 * 8e-6)})
    time = Side("", (patched(), report(slow))).time()
    assert time
    assert time.median == pytest.approx(7e-6)
    assert [time.low, time.high] == [pytest.approx(6e-6), pytest.approx(8e-6)]
    assert time.coverage == 0.5
    unseen = report(replace(toggle(), updates={}))
    assert Side("", (unseen,)).time() is None
    assert "patched: 6 µs on average in one report" in comparison_document(side_by_side(patched(), unpatched())).text()


# --- any reports ---


@given(st.lists(any_reports, min_size=1, max_size=3), st.lists(any_reports, min_size=1, max_size=3))
def test_any_reports_can_be_compared(base: list[Report], new: list[Report]) -> None:
    comparison = compare(base, new, force=True)
    assert sentence(comparison).isprintable()
    assert "; ".join(comparison.forced).isprintable()
    for row in comparison.rows:
        assert row.bit in by_bit([*comparison.base.rows, *comparison.new.rows])


def test_a_side_whose_reports_disagree_on_the_patch_has_no_verdict() -> None:
    """It must not be that of the first report."""
    mixed = [report(toggle(), label="a"), *(report(toggle(patched=False), label=name) for name in "bcdefg")]
    for base in (mixed, mixed[::-1]):
        comparison = compare(base, [patched()], force=True, titles=("old", "new"))
        assert comparison.base.verdict.patched is None
        assert comparison.new.verdict.patched is True
        said_of_base = "its reports disagree: patch missing in 6 (b, c, d, e, f, ...), patch present in 1 (a)"
        assert comparison.base.verdict.why == said_of_base
        assert f"old: patch undecided: {said_of_base}" in comparison_document(comparison).text()
