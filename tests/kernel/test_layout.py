# SPDX-License-Identifier: GPL-2.0-or-later
"""The layout that is chosen for the symbols that a kernel has."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.kernel.layout import choose
from tracer.kernel.symbols import Symbol, Symbols
from tracer.model.svm import SVM

ENABLE, DISABLE, SET = "vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr", "vmx_set_intercept_for_msr"
HOOK, RECALC, RECALC_MSR = "vmx_msr_filter_changed", "vmx_recalc_intercepts", "vmx_recalc_msr_intercepts"
FILTER = "kvm_vm_ioctl_set_msr_filter"


@pytest.mark.parametrize(
    ("functions", "layout"),
    [
        # what the kernels have: 5.10, 6.1 and 6.12, 6.17, 7.2
        ([HOOK], "filter-only"),
        ([HOOK, ENABLE, DISABLE], "toggle"),
        ([SET, RECALC_MSR, f"{RECALC_MSR}.part.0", FILTER], "set"),
        ([SET, RECALC, FILTER], "recalc"),
        # the filter's ioctl is inlined
        ([SET, RECALC_MSR], "set"),
        ([SET, RECALC], "recalc"),
        # a compiler made clones of all of them
        ([f"{HOOK}.isra.0", f"{ENABLE}.constprop.0", f"{DISABLE}.part.0"], "toggle"),
        ([f"{HOOK}.llvm.3433979326929198294", f"{ENABLE}.lto_priv.0", f"{DISABLE}.__uniq.1.llvm.2"], "toggle"),
        ([f"{SET}.llvm.1", f"{RECALC}.lto_priv.0.isra.0", f"{FILTER}.llvm.1"], "recalc"),
        ([f"{HOOK}.cold"], None),
        ([f"{HOOK}.llvm.1.cold", f"{ENABLE}.cold.3", f"{DISABLE}.isra.0.cold"], None),
        # the newest that is whole, though a newer one is there in part
        ([HOOK, ENABLE, DISABLE, RECALC], "toggle"),
        ([HOOK, ENABLE, DISABLE, SET], "toggle"),
        ([SET, RECALC_MSR, RECALC], "recalc"),
        # in part: calls count more than updates
        ([HOOK, ENABLE], "toggle"),
        ([HOOK, DISABLE], "toggle"),
        ([ENABLE, DISABLE], "toggle"),
        ([SET], "recalc"),
        ([SET, HOOK], "recalc"),
        ([RECALC], "recalc"),
        ([RECALC_MSR], "set"),
        ([HOOK, RECALC], "filter-only"),
        ([FILTER], None),
        (["vmx_vcpu_run", "vmx_set_msr"], None),
        ([], None),
    ],
)
def test_the_symbols_choose_the_layout(functions: list[str], layout: str | None) -> None:
    chosen = choose(Symbols.of(Symbol(64 * n, name, "kvm_intel") for n, name in enumerate(functions, 1)))
    assert (chosen and chosen.name) == layout


PASS, SVM_HOOK = "set_msr_interception_bitmap", "svm_msr_filter_changed"
SVM_SET, SVM_RECALC, SVM_RECALC_MSR = "svm_set_intercept_for_msr", "svm_recalc_intercepts", "svm_recalc_msr_intercepts"


@pytest.mark.parametrize(
    ("functions", "layout"),
    [
        # what the kernels have: 5.10, 6.1 to 6.16, 6.17, 7.2
        ([PASS, SVM_HOOK, "set_msr_interception"], "pass"),
        ([SVM_SET, SVM_RECALC_MSR, FILTER], "set"),
        ([SVM_SET, SVM_RECALC, FILTER], "recalc"),
        # clones, and in part
        ([f"{PASS}.isra.0", f"{SVM_HOOK}.llvm.77"], "pass"),
        ([PASS], "pass"),
        ([SVM_HOOK], "pass"),
        ([SVM_SET], "recalc"),
        ([SVM_RECALC_MSR], "set"),
        # of the other vendor
        ([HOOK, ENABLE, DISABLE, SET, RECALC], None),
    ],
)
def test_the_symbols_of_kvm_amd_choose_the_layout(functions: list[str], layout: str | None) -> None:
    there = (Symbol(64 * n, name, SVM.module) for n, name in enumerate(functions, 1))
    chosen = choose(Symbols.of(there, SVM.module, vendor=SVM))
    assert (chosen and chosen.name) == layout


@given(st.sets(st.sampled_from([ENABLE, DISABLE, SET, HOOK, RECALC, RECALC_MSR, FILTER])))
def test_a_layout_is_found_whenever_there_is_a_function_to_probe(names: set[str]) -> None:
    chosen = choose(Symbols.of(Symbol(64, name, "kvm_intel") for name in names))
    if chosen is None:
        assert names <= {FILTER}
        return
    assert names & {*chosen.calls, chosen.update}
    assert bool(names & set(chosen.calls)) == bool(names & {ENABLE, DISABLE, SET})  # calls are never given up
