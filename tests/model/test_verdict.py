# SPDX-License-Identifier: GPL-2.0-or-later
"""Verdicts, from what vmx_msr_filter_changed() of 5.13 to 6.16 does with and without the patch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from made import (
    FS_BASE,
    HOOK,
    PASSED,
    POSSIBLE,
    RTIT_STATUS,
    SPEC_CTRL,
    SVM_HOOK,
    TSC,
    outcome,
    recalc,
    report,
    svm_pass,
    svm_recalc,
    toggle,
)

from tracer.model.snapshot import Call, Map, Probe, Snapshot
from tracer.model.vendors import VENDORS
from tracer.model.verdict import (
    ALSO_ENABLED,
    JUDGED,
    LOOP,
    NEVER_PATCHED,
    RULES,
    SUPERSEDED,
    Fact,
    Row,
    Verdict,
    headline,
    judge,
)
from tracer.model.vmx import VMX
from tracer.report.making import call_rows
from tracer.report.report import CallRow

PRESENT = (
    "101 filter updates disabled intercepts of MSRs that KVM passes through and left those that it intercepts alone"
)
MISSING = "1,717 calls in 101 filter updates enabled the interception of MSRs that were intercepted already"


def verdict(counted: Snapshot) -> Verdict:
    return report(counted).verdict


def also(
    counted: Snapshot, calls: Iterable[tuple[int, str, str]], changed: int = 0, cause: str = "filter_change"
) -> Snapshot:
    """The snapshot plus `calls` (MSR, access, action), each once per update; `changed` of each changed something."""
    updates = sum(durations.count for durations in counted.updates.values())
    more = {Call(*call, cause, HOOK): outcome(updates, changed, call[1]) for call in calls}
    return replace(counted, calls={**counted.calls, **more})


#: Of Intel PT: IA32_RTIT_OUTPUT_BASE, _OUTPUT_MASK, _CTL, _STATUS, _CR3_MATCH, and ADDR0_A to ADDR6_B.
PT = (0x560, 0x561, 0x570, 0x571, 0x572, *range(0x580, 0x58E))


def pt(action: str) -> list[tuple[int, str, str]]:
    """pt_update_intercept_for_msr(), with or without the patch: all RW, and all one way."""
    return [(index, "read_write", action) for index in PT]


def test_a_patched_kernel_enables_nothing() -> None:
    assert verdict(toggle()) == Verdict(patched=True, why=PRESENT)
    assert verdict(toggle(1)).why.startswith("1 filter update disabled ")


def test_an_unpatched_kernel_enables_what_is_intercepted_already() -> None:
    assert verdict(toggle(patched=False)) == Verdict(patched=False, why=MISSING)


@pytest.mark.parametrize("patched", [True, False])
def test_a_filter_that_denies_everything_does_not_change_the_verdict(patched: bool) -> None:
    """The calls that disable interception then set the bits, but the same calls are made."""
    assert verdict(toggle(patched=patched, denied=POSSIBLE)).patched is patched


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("action", ["enable", "disable"])
@pytest.mark.parametrize("changed", [0, 1])
def test_calls_for_intel_pt_do_not_change_the_verdict(patched: bool, action: str, changed: int) -> None:
    assert verdict(also(toggle(patched=patched), pt(action), changed)).patched is patched


@pytest.mark.parametrize("changed", [0, 101])
@pytest.mark.parametrize("patched", [True, False])
def test_calls_for_the_x2apic_do_not_change_the_verdict(patched: bool, changed: int) -> None:
    """5.13 and 5.14 rewrite the words of the x2APIC MSRs in an update, and then enable the interception of TMCCT."""
    calls = [(0x808, "read_write", "disable"), (0x839, "read_write", "enable"), (0x80B, "write", "disable")]
    assert verdict(also(toggle(patched=patched), calls, changed)).patched is patched


@pytest.mark.parametrize("patched", [True, False])
def test_the_verdict_holds_where_everything_is_passed_through(patched: bool) -> None:
    """Writes of the TSC are intercepted even then (KERNEL.md 5)."""
    rest = [(index, access, "disable") for index in POSSIBLE for access in ("read", "write") if index != TSC]
    assert verdict(also(toggle(patched=patched), rest)).patched is patched


@pytest.mark.parametrize("patched", [True, False])
def test_enables_elsewhere_prove_nothing(patched: bool) -> None:
    calls = [(SPEC_CTRL, "read_write", "enable"), (0x839, "read_write", "enable")]
    assert verdict(also(toggle(patched=patched), calls, cause="msr_write")).patched is patched


@pytest.mark.parametrize("patched", [True, False])
def test_calls_of_several_vms_are_judged_as_one(patched: bool) -> None:
    one, other = toggle(patched=patched, pid=100, vcpus=2), toggle(7, patched=patched, pid=200, denied=POSSIBLE)
    assert verdict(one.after(other)).patched is patched


@pytest.mark.parametrize("patched", [True, False])
def test_the_verdict_needs_no_outcomes(patched: bool) -> None:
    seen = verdict(toggle(patched=patched, exact=False))
    assert seen.patched is patched
    assert patched or seen.why.endswith("(whether they changed anything could not be seen)")


def test_too_little_seen_is_undecided() -> None:
    nothing = Verdict(patched=None, why="too little seen: no vCPU applied a changed MSR filter")
    assert verdict(Snapshot("toggle")) == nothing
    created = toggle()
    created = replace(created, updates={}, calls={c: o for c, o in created.calls.items() if c.cause == "vcpu_create"})
    assert verdict(created) == nothing
    both = replace(
        toggle(),
        calls={Call(FS_BASE, a, "disable", "filter_change", HOOK): outcome(9, 0, a) for a in ("read", "write")},
    )
    assert verdict(both).why.startswith("too little seen: no MSR that")
    assert verdict(replace(toggle(), calls={})).why.startswith("too little seen: no MSR that")
    assert verdict(also(replace(toggle(), calls={}), [*pt("disable"), (0x80B, "write", "disable")])).patched is None


LOSSES = {
    "unpaired": {"unpaired_returns": 1},
    "unread": {"read_failures": 1},
    "dropped": {"maps": (Map("calls", 9, 9, 1),)},
    "missed": {"probes": (Probe(HOOK, HOOK, True, HOOK, 1),)},
    "not probed": {"probes": (Probe("vmx_enable_intercept_for_msr", None, False, "none"),)},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_what_was_lost_can_hide_enables_but_not_make_them(loss: str) -> None:
    assert verdict(replace(toggle(patched=False), **LOSSES[loss])).patched is False  # type: ignore[arg-type]
    seen = verdict(replace(toggle(), **LOSSES[loss]))  # type: ignore[arg-type]
    assert seen == Verdict(patched=None, why="calls may have been missed, so that no enable was counted proves nothing")


@pytest.mark.parametrize("patched", [True, False])
def test_a_reload_leaves_the_verdict_undecided(patched: bool) -> None:
    seen = verdict(toggle(patched=patched, module_unloads=1))
    assert seen.patched is None
    assert "reloaded" in seen.why


def test_the_question_is_superseded_since_6_17() -> None:
    assert verdict(recalc()).patched is None
    assert verdict(recalc()).why.startswith("superseded: since 6.17 (8a056ece45d2)")
    assert {layout.name for layout in VMX.layouts if layout.set_} == set(SUPERSEDED)
    assert verdict(replace(toggle(patched=False), layout="set")).patched is None


def test_a_kernel_whose_calls_cannot_be_observed_is_undecided() -> None:
    seen = verdict(Snapshot("filter-only", updates=toggle().updates, calls_observable=False))
    assert seen == Verdict(patched=None, why="calls cannot be observed on this kernel (layout filter-only)")


def test_without_counted_updates_only_an_enable_is_proof() -> None:
    """An enable is proof by itself; its absence needs a finished update."""
    seen = verdict(replace(toggle(), updates={}, updates_observable=False))
    assert seen == Verdict(patched=None, why="filter updates could not be observed")
    proof = MISSING.replace("101 filter updates", "filter updates")
    for observable in (True, False):
        seen = verdict(replace(toggle(patched=False), updates={}, updates_observable=observable))
        assert seen == Verdict(patched=False, why=proof)


@pytest.mark.parametrize("index", [0xC1, 0x123, 0x1C9, 0x38F, 0x562, 0x58E, 0x7FF, 0x900])
def test_enables_of_msrs_outside_the_loop_are_undecided(index: int) -> None:
    """No kernel that was read does that; a backport of the mediated PMU would, and must not look like the old loop."""
    calls = [(index, "read_write", "enable")]
    assert verdict(also(toggle(patched=False), calls)) == Verdict(patched=False, why=MISSING)
    assert verdict(also(toggle(), calls)) == Verdict(
        patched=None,
        why="101 calls in 101 filter updates enabled the interception of MSRs for which no known kernel does so",
    )


def test_an_enable_that_changes_a_bit_is_undecided() -> None:
    """An enable that changes a bit in the loop over the possible passthrough MSRs."""
    seen = verdict(also(toggle(patched=False), [(0x123, "read", "enable")], changed=2))
    assert seen == Verdict(
        patched=None, why="2 of 1,818 enables in filter updates changed a bit: neither kernel does that"
    )


@dataclass(frozen=True)
class Other:
    """A row that is not a report's CallRow."""

    index: int = TSC
    access: str = "read"
    action: str = "disable"
    cause: str = "filter_change"
    calls: int = 5
    redundant: int | None = 5


def test_rows_need_only_the_attributes_of_the_protocol() -> None:
    rows: list[Row] = [Other()]
    whole: dict[str, Any] = {"vendor": "vmx", "calls_observable": True, "incomplete": False, "reloaded": False}
    assert judge(layout="toggle", updates=5, rows=rows, **whole).patched is True
    assert (
        judge(layout="toggle", updates=5, rows=[*rows, Other(access="write", action="enable")], **whole).patched
        is False
    )
    assert judge(layout="toggle", updates=5, rows=[Other(access="read_write")], **whole).patched is None


def test_every_fact_has_one_rule() -> None:
    assert [rule.fact for rule in RULES] == list(dict.fromkeys(rule.fact for rule in RULES))
    assert {rule.fact for rule in RULES} == set(Fact)
    assert RULES[-1].fact is Fact.ANYTHING
    assert JUDGED == ("toggle",)


# --- AMD, where KVM never had the patch ---

NEVER = "KVM never had this patch for AMD SVM; "


@pytest.mark.parametrize(
    ("counted", "why"),
    [
        (svm_pass(404), "404 filter updates made 18,988 calls, 47 each, of which 46 changed nothing"),
        (svm_pass(1), "1 filter update made 47 calls, of which 46 changed nothing"),
        (svm_pass(404, denied=[FS_BASE]), "404 filter updates made 18,988 calls, 47 each, of which 47 changed nothing"),
        (
            svm_pass(404, exact=False),
            "404 filter updates made 18,988 calls, 47 each; how many of them changed nothing is unknown",
        ),
        (
            svm_pass(pid=100).after(svm_pass(303, pid=200)),
            "404 filter updates made 18,988 calls, 47 each, of which 46 changed nothing",
        ),
        (
            svm_recalc(404),
            "since 6.17 every update recomputes all intercepts: 404 filter updates made 4,444 calls, 11 each, "
            "of which 10 changed nothing",
        ),
        (
            replace(svm_recalc(404), layout="set"),
            "since 6.17 every update recomputes all intercepts: 404 filter updates made 4,444 calls, 11 each, "
            "of which 10 changed nothing",
        ),
        (replace(svm_pass(), updates={}), "no vCPU applied a changed MSR filter"),
        (
            replace(svm_recalc(), updates={}),
            "since 6.17 every update recomputes all intercepts: no vCPU applied a changed MSR filter",
        ),
        (replace(svm_pass(), updates={}, updates_observable=False), "filter updates could not be observed"),
        (replace(svm_pass(), calls={}), "no calls were seen in filter updates"),
        (
            replace(svm_pass(), calls={}, calls_observable=False),
            "calls cannot be observed on this kernel (layout pass)",
        ),
        (
            svm_pass(404, read_failures=1),
            "404 filter updates made 18,988 calls, 47 each, of which 46 changed nothing; calls may have been missed",
        ),
        (
            svm_pass(404, module_unloads=1),
            "404 filter updates made 18,988 calls, 47 each, of which 46 changed nothing; calls may have been missed",
        ),
        # what proves the patch missing or present on VMX
        (
            also(replace(svm_pass(), calls={}), [(TSC, "write", "enable")]),
            "101 filter updates made 101 calls, 1 each, of which 1 changed nothing",
        ),
        (
            replace(toggle(), vendor="svm", layout="pass"),
            "101 filter updates made 1,313 calls, 13 each, of which 11 changed nothing",
        ),
    ],
)
def test_on_amd_the_verdict_is_what_an_update_costs(counted: Snapshot, why: str) -> None:
    assert verdict(counted) == Verdict(patched=None, why=NEVER + why)


def test_calls_outside_of_filter_updates_do_not_count_there() -> None:
    writes = Call(SPEC_CTRL, "read_write", "disable", "msr_write", SVM_HOOK)
    counted = svm_pass(404)
    more = replace(counted, calls={**counted.calls, writes: outcome(1000, 0, "read_write")})
    assert verdict(more) == verdict(counted)


def test_on_amd_nothing_is_undecided_or_missing() -> None:
    assert headline(None, "svm") == "patch not applicable"
    assert headline(None, "vmx") == "patch undecided"
    assert [headline(patched, "vmx") for patched in (True, False)] == ["patch present", "patch missing"]
    assert NEVER_PATCHED == ("svm",)


def test_the_rule_for_other_vendors_comes_before_all_others() -> None:
    assert RULES[0].fact is Fact.NEVER_PATCHED
    assert [vendor.name for vendor in VENDORS if vendor.filter_loop] == ["vmx"]


# --- the kernel's loops, played through for every state of the shadow bitmaps ---

#: vmx_possible_passthrough_msrs[], arch/x86/kvm/vmx/vmx.c, in its order.
OF_5_10 = (0x48, 0x49, TSC, 0xC0000100, 0xC0000101, 0xC0000102, 0x174, 0x175, 0x176, 0x660, 0x3FC, 0x3FD, 0x3FE)
OF_5_17 = (*OF_5_10[:6], 0x1C4, 0x1C5, *OF_5_10[6:])
OF_6_4 = (0x48, 0x49, 0x10B, *OF_5_17[2:])
KERNELS = {
    "5.10 to 5.16": OF_5_10,
    "5.17 to 6.3": OF_5_17,
    "6.4 to 6.16": OF_6_4,
    "a backport": (0x6A0, *OF_6_4, 0x1D9),
}
#: Halves that KVM passes through by and by: to guests that write SPEC_CTRL or have XFD, and where C-states are exposed.
MORE = {(SPEC_CTRL, "read"), (SPEC_CTRL, "write"), (0x49, "write"), (0x10B, "write"), (0x1C5, "read"), (0x3FC, "read")}


def loop(passed: set[tuple[int, str]], patched: bool, possible: tuple[int, ...] = POSSIBLE) -> list[CallRow]:
    """The rows of one filter update of a vCPU for which the halves of MSRs in `passed` are passed through."""
    calls = {}
    for index in possible:
        for access in ("read", "write"):
            if (index, access) in passed:
                calls[Call(index, access, "disable", "filter_change", HOOK)] = outcome(1, 0, access)
            elif not patched:  # vmx_set_intercept_for_msr(vcpu, msr, type, true)
                calls[Call(index, access, "enable", "filter_change", HOOK)] = outcome(1, 0, access)
    return call_rows(calls.items())


def judged(rows: list[CallRow]) -> bool | None:
    whole: dict[str, Any] = {"vendor": "vmx", "calls_observable": True, "incomplete": False, "reloaded": False}
    return judge(layout="toggle", updates=1, rows=rows, **whole).patched


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("others", [set(), MORE, {(RTIT_STATUS, "read")}, PASSED])
def test_every_known_loop_gives_a_verdict(kernel: str, others: set[tuple[int, str]]) -> None:
    passed = {(TSC, "read"), *others}
    assert judged(loop(passed, True, KERNELS[kernel])) is True
    assert judged(loop(passed, False, KERNELS[kernel])) is False


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_enable_of_any_loop_is_enough(kernel: str) -> None:
    """Whatever else was missed."""
    listed = {index for msrs in LOOP for index in msrs}
    for index in listed.intersection(KERNELS[kernel]):
        assert judged(loop({(index, "read")}, False, (index,))) is False
    assert listed == set(OF_6_4)
    assert not listed & {index for msrs in ALSO_ENABLED for index in msrs}
