# SPDX-License-Identifier: GPL-2.0-or-later
"""What is said of accesses by nested guests, by the bits for L2 beside those for L1."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import pytest
from filters import denying
from vcpus import (
    APERF,
    FS_BASE,
    GS_BASE,
    NEW,
    NEW_AMD,
    OLD,
    PLATFORM_INFO,
    SPEC_CTRL,
    STAR,
    TSC,
    Access,
    bitmap,
    merged,
    rw,
    vcpu,
)

from tracer.model.msr_filter import NO_FILTER, READ, WRITE, X2APIC, MsrFilter
from tracer.model.nested import (
    L1,
    L1_OR_UNMERGED,
    MERGED,
    NESTED_SAID,
    NONE,
    OWN,
    PENDING_KVM,
    UNMERGED,
    UNREADABLE,
    UNUSED,
    USES,
    Nested,
)
from tracer.model.state import (
    BOTH,
    FILTER,
    KVM,
    PASSED,
    PENDING_ALLOWED,
    PENDING_DENIED,
    SAID,
    UNKNOWN,
    State,
    Vcpu,
    Verdict,
    Vm,
    alike,
    nested_interception,
)
from tracer.model.svm import SVM
from tracer.model.vendor import Vendor
from tracer.model.vmx import VMX

INTERCEPTS = (KVM, FILTER, BOTH, PENDING_ALLOWED, "unrecorded", UNKNOWN)
XFD, SYSENTER_CS, CET = 0x1C4, 0x174, 0x6A0
USUAL = rw(FS_BASE, GS_BASE, SYSENTER_CS) | {(TSC, READ)}


def said(host: State, one: Vcpu, msr: int) -> tuple[str, str]:
    nested = host.verdict(one, msr).nested
    assert nested
    return nested.read, nested.write


# --- the table ---


@pytest.mark.parametrize("merging", [True, False, None])
@pytest.mark.parametrize("settled", [True, False])
def test_what_exits_for_l1_exits_for_l2_for_the_same_reason(merging: bool | None, settled: bool) -> None:
    for own, allowed in product(INTERCEPTS, (True, False)):
        found = nested_interception(
            intercepted=True, own=own, own_intercepted=True, allowed=allowed, merged=merging, settled=settled
        )
        assert found == own


@pytest.mark.parametrize(
    ("merging", "settled", "right"),
    [
        (True, True, L1),
        (True, False, L1_OR_UNMERGED),  # it may be from before L1's own bit was cleared
        (False, True, UNMERGED),
        (False, False, UNMERGED),
        (None, True, L1_OR_UNMERGED),
        (None, False, L1_OR_UNMERGED),
    ],
)
def test_what_passes_for_l1_alone(merging: bool | None, settled: bool, right: str) -> None:
    for own, allowed in ((PASSED, True), (PENDING_DENIED, False)):
        found = nested_interception(
            intercepted=True, own=own, own_intercepted=False, allowed=allowed, merged=merging, settled=settled
        )
        assert found == right


@pytest.mark.parametrize(
    ("own", "allowed", "right"),
    [
        (PASSED, True, PASSED),
        (PENDING_DENIED, False, PENDING_DENIED),
        (FILTER, False, PENDING_DENIED),  # applied to L1 while L2 runs
        (BOTH, False, PENDING_DENIED),
        ("unrecorded", False, PENDING_DENIED),
        (KVM, True, PENDING_KVM),
        (PENDING_ALLOWED, True, PASSED),
        ("unrecorded", True, PASSED),
        (UNKNOWN, True, PASSED),
    ],
)
@pytest.mark.parametrize("merging", [True, False, None])
def test_what_passes_for_l2(own: str, allowed: bool, right: str, merging: bool | None) -> None:
    own_intercepted = own not in (PASSED, PENDING_DENIED)
    found = nested_interception(
        intercepted=False, own=own, own_intercepted=own_intercepted, allowed=allowed, merged=merging, settled=True
    )
    assert found == right


def test_all_that_is_said_is_explained() -> None:
    bools = (True, False)
    found = {
        nested_interception(
            intercepted=one, own=own, own_intercepted=own in INTERCEPTS, allowed=two, merged=merging, settled=three
        )
        for one, own, two, merging, three in product(bools, SAID, bools, (*bools, None), bools)
    }
    assert found == {*SAID, *NESTED_SAID}
    assert not SAID.keys() & NESTED_SAID.keys()


# --- which bitmap is in use ---


def test_vmx_says_it_in_a_control() -> None:
    """Beside the word are others; its other bits are never all 0 once it was set."""
    more = 0xABCD << 32
    assert VMX.nested.use(more, 0) == UNUSED
    assert VMX.nested.use(more | 0xB5186DFA, 0) == MERGED
    assert VMX.nested.use(more | 0xB5186DFA & ~(1 << 28), 0) == NONE


def test_svm_says_it_by_the_address() -> None:
    assert SVM.nested.use(0, 0x1000) == UNUSED
    assert SVM.nested.use(0x1000, 0x1000) == OWN
    assert SVM.nested.use(0x2000, 0x1000) == MERGED


# --- what is said of MSRs ---


@pytest.mark.parametrize(
    ("msr", "right"),
    [
        (FS_BASE, (L1, L1)),
        (SPEC_CTRL, (L1, L1)),
        (TSC, (UNMERGED, KVM)),
        (SYSENTER_CS, (UNMERGED, UNMERGED)),
        (XFD, (UNMERGED, UNMERGED)),
        (APERF, (L1_OR_UNMERGED, KVM)),
        (CET, (L1_OR_UNMERGED, L1_OR_UNMERGED)),
        (PLATFORM_INFO, (KVM, KVM)),
    ],
)
def test_msrs_of_vmx(msr: int, right: tuple[str, str]) -> None:
    """vmcs02's bitmap begins with ones, and KVM merges few MSRs; what only some kernels merge cannot be told apart."""
    passed = USUAL | rw(SPEC_CTRL, XFD, CET) | {(APERF, READ)}
    assert said(NEW, vcpu(passed, nested=merged(VMX)), msr) == right


@pytest.mark.parametrize(
    ("msr", "right"),
    [
        (STAR, (L1, L1)),
        (SYSENTER_CS, (L1, L1)),
        (FS_BASE, (PASSED, L1)),
        (SPEC_CTRL, (KVM, KVM)),
        (CET, (L1_OR_UNMERGED, L1_OR_UNMERGED)),
    ],
)
def test_msrs_of_svm(msr: int, right: tuple[str, str]) -> None:
    own = vcpu(rw(STAR, SYSENTER_CS, FS_BASE, CET), vendor=SVM, nested=merged(SVM, {(FS_BASE, READ)}))
    assert said(NEW_AMD, own, msr) == right


def test_a_filter_that_is_applied_to_l1_alone() -> None:
    """While L2 runs, vmcs01 follows a new filter, vmcs02 not; and the other way round where it is lifted again."""
    running = merged(VMX, rw(FS_BASE, GS_BASE), running=True)
    denied = vcpu(USUAL - rw(FS_BASE), denying(FS_BASE), wished=USUAL, nested=running)
    assert OLD.verdict(denied, FS_BASE) == Verdict(FILTER, FILTER, Verdict(PENDING_DENIED, PENDING_DENIED))
    assert OLD.verdict(denied, GS_BASE).nested == Verdict(PASSED, PASSED)
    stale = replace(merged(VMX, rw(GS_BASE)), settled=False)
    lifted = vcpu(USUAL, wished=USUAL, nested=stale)
    assert OLD.verdict(lifted, FS_BASE) == Verdict(PASSED, PASSED, Verdict(L1_OR_UNMERGED, L1_OR_UNMERGED))


def test_l1_is_to_blame_only_if_nothing_changes() -> None:
    own = vcpu(USUAL, nested=merged(VMX))
    assert said(NEW, own, FS_BASE) == (L1, L1)
    assert said(NEW, replace(own, settled=False), FS_BASE) == (L1_OR_UNMERGED, L1_OR_UNMERGED)
    assert said(NEW, replace(own, settled=False), TSC)[0] == UNMERGED


def test_the_x2apic_of_l2_is_not_that_of_l1() -> None:
    """vmcs02's bits are L1's own where L1 lets L2 have a virtual APIC: nothing is pending."""
    own = vcpu(USUAL, denying(0x808), nested=merged(VMX, {(0x802, READ), (0x808, WRITE)}))
    assert said(NEW, own, 0x802) == (PASSED, KVM)
    assert said(NEW, own, 0x808) == (KVM, PASSED)
    assert said(NEW, replace(own, bitmap=bitmap(VMX, {(0x802, READ)}), nested=merged(VMX)), 0x802)[0] == L1_OR_UNMERGED


def test_a_guest_that_gives_its_guests_no_bitmap() -> None:
    own = vcpu(USUAL - rw(FS_BASE), denying(FS_BASE), wished=USUAL, nested=Nested(NONE))
    assert said(OLD, own, GS_BASE) == (L1, L1)
    assert said(OLD, own, TSC) == (L1, KVM)
    assert said(OLD, own, FS_BASE) == (FILTER, FILTER)


def test_nested_guests_with_the_bitmap_of_their_guest() -> None:
    own = vcpu(rw(STAR), denying(FS_BASE), vendor=SVM, nested=Nested(OWN))
    for msr in (STAR, FS_BASE, SPEC_CTRL, 0x4B564D00):
        verdict = NEW_AMD.verdict(own, msr)
        assert verdict.nested == Verdict(verdict.read, verdict.write)


@pytest.mark.parametrize("use", [UNUSED, UNREADABLE])
def test_where_nothing_can_be_said(use: str) -> None:
    assert NEW.verdict(vcpu(USUAL, nested=Nested(use)), FS_BASE).nested is None
    assert use in USES


def test_a_filter_that_cannot_be_read() -> None:
    own = vcpu(USUAL, None, nested=merged(VMX, rw(FS_BASE)))
    assert said(NEW, own, FS_BASE) == (PASSED, PASSED)
    assert said(NEW, own, GS_BASE) == (L1, L1)
    assert said(NEW, own, SPEC_CTRL) == (UNKNOWN, UNKNOWN)


# --- ranges ---


@pytest.mark.parametrize(("host", "vendor"), [(NEW, VMX), (NEW_AMD, SVM)])
@pytest.mark.parametrize("vmm_filter", [NO_FILTER, denying(FS_BASE, 0x175), MsrFilter(default_allow=False)])
def test_of_all_msrs_of_a_range_the_same_is_said(host: State, vendor: Vendor, vmm_filter: MsrFilter) -> None:
    """Also where only the bitmap for L2 lets something pass: it is older than the other."""
    theirs: set[Access] = rw(FS_BASE, 0x176, 0xC0000080) | {(0x300, READ), (0x301, READ), (0x302, READ)}
    own = vcpu(rw(FS_BASE, GS_BASE, 0x174, 0x175), vmm_filter, vendor=vendor, nested=merged(vendor, theirs))
    rows = host.verdicts(own)
    listed = {msr for run, _ in rows for msr in run}
    assert {msr for msr, _ in theirs} <= listed
    for run, verdict in rows:
        assert all(host.verdict(own, msr) == verdict for msr in run), run
    for (one, _), (other, _) in pairwise(rows):
        assert one.stop <= other.start
    # What is in no row exits for both.
    for msr in {*range(0x2000), *range(0xC0000000, 0xC0002000)} - listed - {*X2APIC}:
        verdict = host.verdict(own, msr)
        assert verdict.nested == Verdict(verdict.read, verdict.write)
        assert {verdict.read, verdict.write} <= {KVM, BOTH}


def test_vcpus_are_alike_whether_they_are_in_l2_or_not() -> None:
    one, other = (vcpu(USUAL, id=number, nested=merged(VMX, running=number == 1)) for number in (0, 1))
    third = vcpu(USUAL, id=2, nested=merged(VMX, rw(FS_BASE)))
    assert [[each.id for each in group] for group in alike(Vm(1, 1, (one, other, third)))] == [[0, 1], [2]]
