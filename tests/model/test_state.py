# SPDX-License-Identifier: GPL-2.0-or-later
"""Who has an access intercepted: the table of the rule, and what it is applied to."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from filters import allowing, any_filters, denying
from hypothesis import given
from hypothesis import strategies as st
from vcpus import (
    APERF,
    FS_BASE,
    GS_BASE,
    LBR_FROM,
    NEW,
    NEW_AMD,
    OLD,
    OLD_AMD,
    PERFCTR0,
    PLATFORM_INFO,
    RTIT_STATUS,
    SPEC_CTRL,
    STAR,
    SVM_LIST,
    TSC,
    VMX_LIST,
    rw,
    vcpu,
)

from tracer.model.msr_filter import NO_FILTER, READ, WRITE, MsrFilter
from tracer.model.state import (
    BOTH,
    FILTER,
    KVM,
    PASSED,
    PENDING_ALLOWED,
    PENDING_DENIED,
    SAID,
    UNKNOWN,
    UNRECORDED,
    State,
    Vcpu,
    Verdict,
    Vm,
    Wish,
    alike,
    interception,
)
from tracer.model.svm import SVM
from tracer.model.vendor import NO_MSR, Vendor
from tracer.model.vendors import VENDORS
from tracer.model.vmx import VMX

INTERCEPT, PASS, PRESUMED, NOT_RECORDED = Wish.INTERCEPT, Wish.PASS, Wish.PRESUMED_PASS, Wish.UNRECORDED

#: What KVM wants, and what is said of a bit that is set: where the filter denies; where it allows, settled and not.
SET = {
    INTERCEPT: (BOTH, KVM, KVM),
    PASS: (FILTER, PENDING_ALLOWED, PENDING_ALLOWED),
    PRESUMED: (FILTER, KVM, PENDING_ALLOWED),
    NOT_RECORDED: (UNRECORDED, KVM, UNRECORDED),
}


@pytest.mark.parametrize(("wish", "settled"), [*product(Wish, (True, False))])
def test_the_table(wish: Wish, settled: bool) -> None:
    def of(intercepted: bool, allowed: bool) -> str:
        return interception(intercepted=intercepted, wish=wish, allowed=allowed, settled=settled)

    assert of(False, True) == PASSED
    assert of(False, False) == PENDING_DENIED
    denied, if_settled, else_ = SET[wish]
    assert of(True, False) == denied
    assert of(True, True) == (if_settled if settled else else_)


def test_all_that_is_said_is_explained() -> None:
    found = {
        interception(intercepted=one, wish=wish, allowed=two, settled=three)
        for one, wish, two, three in product((True, False), Wish, (True, False), (True, False))
    }
    assert found | {UNKNOWN} == set(SAID)


# --- where the kernel records what KVM wants ---


@pytest.mark.parametrize(("host", "vendor", "listed"), [(OLD, VMX, VMX_LIST), (OLD_AMD, SVM, SVM_LIST)])
def test_what_is_recorded_is_what_kvm_wants(host: State, vendor: Vendor, listed: tuple[int, ...]) -> None:
    for msr, direction in product({*listed} - {SPEC_CTRL}, (READ, WRITE)):
        passing, not_ = ((msr, direction),), [other for other in rw(*listed) if other != (msr, direction)]
        assert host.wish(vcpu(vendor=vendor, wished=passing), msr, direction) is PASS
        assert host.wish(vcpu(vendor=vendor, wished=not_), msr, direction) is INTERCEPT


def test_intel_kernels_may_not_record_that_spec_ctrl_passes() -> None:
    """6.9 to 6.16 take it for an LBR; KVM of older ones has it, but nothing tells them apart."""
    denied = denying(SPEC_CTRL)
    assert OLD.verdict(vcpu((), denied, wished=rw(SPEC_CTRL)), SPEC_CTRL).of(READ) == FILTER
    assert OLD.verdict(vcpu((), denied, wished=()), SPEC_CTRL).of(READ) == UNRECORDED
    assert OLD.verdict(vcpu((), wished=()), SPEC_CTRL).of(READ) == KVM
    amd = vcpu((), denied, vendor=SVM, wished=())
    assert OLD_AMD.verdict(amd, SPEC_CTRL).of(READ) == BOTH


def test_rows_of_a_host_that_records() -> None:
    one = vcpu(rw(GS_BASE, 0x174), denying(FS_BASE, 0x49, 0x174), wished=rw(FS_BASE, GS_BASE, 0x174, 0x175))
    assert OLD.verdict(one, GS_BASE) == Verdict(PASSED, PASSED)
    assert OLD.verdict(one, FS_BASE) == Verdict(FILTER, FILTER)
    assert OLD.verdict(one, 0x49) == Verdict(BOTH, BOTH)
    assert OLD.verdict(one, 0x174) == Verdict(PENDING_DENIED, PENDING_DENIED)
    assert OLD.verdict(one, 0x175) == Verdict(PENDING_ALLOWED, PENDING_ALLOWED)
    assert OLD.verdict(one, 0x176) == Verdict(KVM, KVM)


def test_directions_are_apart() -> None:
    one = vcpu({(TSC, READ)}, denying(TSC, flags=WRITE), wished={(TSC, READ)})
    assert OLD.verdict(one, TSC) == Verdict(PASSED, BOTH)
    assert (OLD.verdict(one, TSC).of(READ), OLD.verdict(one, TSC).of(WRITE)) == (PASSED, BOTH)


@pytest.mark.parametrize("msr", [APERF, PERFCTR0, 0x6A0, PLATFORM_INFO])
def test_a_kernel_that_records_never_passes_what_only_newer_ones_may(msr: int) -> None:
    """vmx_get_passthrough_msr_slot() warns of any other; so a filter that denies counters of the PMU is not alone."""
    assert OLD.verdict(vcpu((), denying(msr), wished=()), msr) == Verdict(BOTH, BOTH)
    assert OLD.verdict(vcpu((), wished=()), msr) == Verdict(KVM, KVM)
    assert msr not in OLD.candidates


@pytest.mark.parametrize("msr", [RTIT_STATUS, LBR_FROM, 0x1C8, 0x1C9, 0x561])
def test_a_kernel_that_records_does_not_of_pt_and_lbr(msr: int) -> None:
    assert OLD.verdict(vcpu((), denying(msr), wished=()), msr) == Verdict(UNRECORDED, UNRECORDED)
    assert msr in OLD.candidates


def test_without_its_list_a_kernel_is_as_one_that_does_not_record() -> None:
    one = vcpu((), denying(SPEC_CTRL, FS_BASE))
    assert NEW.verdict(one, SPEC_CTRL) == Verdict(UNRECORDED, UNRECORDED)
    assert NEW.verdict(one, FS_BASE) == Verdict(FILTER, FILTER)


# --- where it does not (6.17+) ---


@pytest.mark.parametrize(
    ("host", "vendor", "always", "conditional", "never"),
    [
        (NEW, VMX, [(TSC, READ), (FS_BASE, READ), (0x176, WRITE)], [(SPEC_CTRL, WRITE), (APERF, READ)], [(TSC, WRITE)]),
        (
            NEW,
            VMX,
            [],
            [(0x49, WRITE), (PERFCTR0, READ), (RTIT_STATUS, READ)],
            [(0x49, READ), (0x570, READ), (0x3A, READ)],
        ),
        (NEW_AMD, SVM, [(STAR, READ), (0x174, WRITE)], [(0x175, READ), (0xC0010201, WRITE)], [(0xC0010200, READ)]),
        (NEW_AMD, SVM, [(0xC0000084, READ)], [(0xC0010134, READ), (0xDA0, WRITE)], [(0xC0010134, WRITE), (TSC, READ)]),
    ],
)
def test_what_kvm_of_every_kernel_does(
    host: State,
    vendor: Vendor,
    always: list[tuple[int, int]],
    conditional: list[tuple[int, int]],
    never: list[tuple[int, int]],
) -> None:
    """vmx_recalc_msr_intercepts(), svm_recalc_msr_intercepts()."""
    for accesses, wish, denied, allowed, unsettled in (
        (always, PRESUMED, FILTER, KVM, PENDING_ALLOWED),
        (conditional, NOT_RECORDED, UNRECORDED, KVM, UNRECORDED),
        (never, INTERCEPT, BOTH, KVM, KVM),
    ):
        for access in accesses:
            one = vcpu(vendor=vendor)
            assert host.wish(one, *access) is wish
            assert host.verdict(vcpu((), denying(access[0]), vendor=vendor), access[0]).of(access[1]) == denied
            assert host.verdict(one, access[0]).of(access[1]) == allowed
            assert host.verdict(vcpu(vendor=vendor, settled=False), access[0]).of(access[1]) == unsettled


def test_a_vcpu_that_never_ran_on_6_18() -> None:
    """Its bitmap is all ones, and a request to compute it is there: nobody knows what it will be of SPEC_CTRL."""
    one = vcpu((), denying(GS_BASE), settled=False, ran=False)
    assert NEW.verdict(one, FS_BASE) == Verdict(PENDING_ALLOWED, PENDING_ALLOWED)
    assert NEW.verdict(one, GS_BASE) == Verdict(FILTER, FILTER)
    assert NEW.verdict(one, SPEC_CTRL) == Verdict(UNRECORDED, UNRECORDED)
    assert NEW.verdict(one, TSC) == Verdict(PENDING_ALLOWED, KVM)


# --- what cannot be read ---


def test_a_vcpu_whose_bitmap_is_not_known() -> None:
    one = Vcpu(0, None, denying(FS_BASE))
    assert NEW.verdict(one, FS_BASE) == Verdict(UNKNOWN, UNKNOWN)
    assert NEW.verdict(one, PLATFORM_INFO) == Verdict(UNKNOWN, UNKNOWN)
    assert NEW.passed(one, READ) == []


def test_a_vcpu_whose_filter_is_not_known() -> None:
    one = vcpu(rw(FS_BASE), None)
    assert NEW.verdict(one, FS_BASE) == Verdict(PASSED, PASSED)
    assert NEW.verdict(one, GS_BASE) == Verdict(UNKNOWN, UNKNOWN)
    assert (range(FS_BASE, FS_BASE + 1), Verdict(PASSED, PASSED)) in NEW.verdicts(one)


def test_a_cpu_without_bitmaps() -> None:
    """cpu_has_vmx_msr_bitmap(): KVM intercepts all."""
    one = Vcpu(0, b"", denying(FS_BASE))
    assert NEW.verdict(one, FS_BASE) == Verdict(BOTH, BOTH)
    assert NEW.verdict(one, GS_BASE) == Verdict(KVM, KVM)


def test_an_msr_outside_every_area_always_exits() -> None:
    one = vcpu((), denying(0x4B564D00))
    assert NEW.verdict(one, 0x4B564D00) == Verdict(BOTH, BOTH)
    assert NEW.verdict(one, 0x4B564D01) == Verdict(KVM, KVM)
    assert NEW.verdict(one, 0xC0010015) == Verdict(KVM, KVM)


# --- all of a vCPU ---


def of(host: State, one: Vcpu, *also: int) -> dict[int, Verdict]:
    return {msr: verdict for run, verdict in host.verdicts(one, also) for msr in run}


@given(
    any_filters, st.sets(st.sampled_from([(msr, way) for msr in (TSC, 0x48, 0x174, 0x175, FS_BASE) for way in (1, 2)]))
)
def test_verdicts_are_those_of_each_msr(one: MsrFilter, passed: set[tuple[int, int]]) -> None:
    """All that passes, that a range denies or that may pass, once, in order, and joined where the same is said."""
    known = vcpu(passed, one)
    found = NEW.verdicts(known)
    msrs = [msr for run, _ in found for msr in run]
    assert msrs == sorted(set(msrs))
    assert all(verdict == NEW.verdict(known, msr) for run, verdict in found for msr in run)
    wanted = {*NEW.candidates} | {msr for way in (READ, WRITE) for run in NEW.passed(known, way) for msr in run}
    assert {*msrs} == wanted | {msr for way in (READ, WRITE) for run in one.denied(way) for msr in run}
    for (before, verdict), (after, other) in pairwise(found):
        allowed = [[one.allows(run.start, way) for way in (READ, WRITE)] for run in (before, after)]
        assert before.stop < after.start or verdict != other or allowed[0] != allowed[1]


def test_an_msr_that_is_asked_for_is_there() -> None:
    assert of(NEW, vcpu(), PLATFORM_INFO, 0x4B564D00)[PLATFORM_INFO] == Verdict(KVM, KVM)
    assert PLATFORM_INFO not in of(NEW, vcpu())


def test_what_passes_unexpectedly_is_there() -> None:
    """A kernel that is newer than the tables."""
    one = vcpu(rw(0x1CC) | {(0x801, READ)})
    assert of(NEW, one)[0x1CC] == Verdict(PASSED, PASSED)
    assert of(NEW, one)[0x801] == Verdict(PASSED, KVM)
    assert 0x802 not in of(NEW, one)


def test_a_default_that_denies() -> None:
    one = vcpu({(TSC, READ)}, MsrFilter(False, (allowing(TSC, 1, [TSC]),)))
    found = of(NEW, one)
    assert found[TSC] == Verdict(PASSED, KVM)
    assert found[FS_BASE] == Verdict(FILTER, FILTER)
    assert found[SPEC_CTRL] == Verdict(UNRECORDED, UNRECORDED)
    assert found[0xE7] == Verdict(UNRECORDED, BOTH)


def test_vcpus_of_which_the_same_is_said_are_together() -> None:
    plain, other = vcpu(rw(FS_BASE), id=0), vcpu(rw(GS_BASE), id=1)
    same, later = vcpu(rw(FS_BASE), id=2), vcpu(rw(FS_BASE), id=3, settled=False)
    assert alike(Vm(1, 1, (plain, other, same, later))) == [(plain, same), (other,), (later,)]


def test_the_filter_of_a_vm_is_the_one_that_was_read_last() -> None:
    new = denying(FS_BASE)
    assert Vm(1, 1, (vcpu(id=0), vcpu((), new, id=1))).filter is new
    assert Vm(1, 1, (vcpu(),)).filter is NO_FILTER


# --- the tables of the vendors ---


@pytest.mark.parametrize("vendor", VENDORS, ids=lambda vendor: vendor.name)
def test_what_may_pass_has_a_bit(vendor: Vendor) -> None:
    accesses = [(msr, way) for one in vendor.passable for msr in one.msrs for way in (READ, WRITE) if one.flags & way]
    assert len(accesses) == len(set(accesses))
    assert all(vendor.bitmap_geometry.place(*access) is not None for access in accesses)


@pytest.mark.parametrize(("vendor", "listed"), [(VMX, VMX_LIST), (SVM, SVM_LIST)], ids=["vmx", "svm"])
def test_what_older_kernels_pass_newer_ones_may(vendor: Vendor, listed: tuple[int, ...]) -> None:
    passable = {msr for one in vendor.passable for msr in one.msrs}
    assert {*listed} <= passable


def array(vendor: Vendor, msrs: tuple[int, ...], rest: bytes = b"") -> bytes:
    """As it is in the kernel's memory; the rest of an element is not 0."""
    return b"".join(msr.to_bytes(4, "little") + b"\xa5" * (vendor.shadow.stride - 4) for msr in msrs) + rest


def test_kvms_own_list_ends_with_its_last_msr() -> None:
    """What follows it in memory is no part of it, whatever it is."""
    assert VMX.shadow.msrs(array(VMX, VMX_LIST, b"\x11\x22\x33\x44" * 60)) == VMX_LIST
    assert VMX.shadow.msrs(array(VMX, VMX_LIST)) == VMX_LIST
    assert SVM.shadow.msrs(array(SVM, (*SVM_LIST, NO_MSR), b"\x11" * 400)) == SVM_LIST


@pytest.mark.parametrize("vendor", VENDORS, ids=lambda vendor: vendor.name)
def test_a_list_that_does_not_end_is_none(vendor: Vendor) -> None:
    msrs = vendor.shadow.msrs
    assert msrs(array(vendor, (0x48, 0x49))) is None
    assert msrs(array(vendor, (0x48, 0x49, 0x48, vendor.shadow.last))) is None
    assert msrs(array(vendor, (*range(1, 65), vendor.shadow.last))) is None  # more than a word has bits
    assert msrs(array(vendor, (*range(1, 64), vendor.shadow.last))) is not None
    assert msrs(b"") is None
