# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of Intel's VMX: causes of calls, by the functions that make them in Linux 5.13 to 7.3."""

from __future__ import annotations

import pytest

from tracer.model.cause import CAUSES
from tracer.model.vendors import VENDORS
from tracer.model.vmx import VMX


@pytest.mark.parametrize(
    ("cause", "callers"),
    [
        ("filter_change", ["vmx_msr_filter_changed"]),
        ("recalc", ["vmx_recalc_msr_intercepts", "vmx_recalc_intercepts", "vmx_recalc_pmu_msr_intercepts"]),
        ("vcpu_create", ["vmx_vcpu_create", "vmx_create_vcpu"]),
        ("cpuid_update", ["vmx_vcpu_after_set_cpuid", "vmx_cpuid_update"]),
        (
            "x2apic",
            ["vmx_update_msr_bitmap_x2apic", "vmx_set_virtual_apic_mode", "__kvm_apic_set_base", "kvm_lapic_reset"],
        ),
        ("msr_write", ["vmx_set_msr", "vt_set_msr", "kvm_set_msr_common", "__kvm_set_msr"]),
        (
            "lbr",
            ["vmx_vcpu_run", "vmx_passthrough_lbr_msrs", "vmx_update_intercept_for_lbr_msrs", "intel_pmu_setup_lbr"],
        ),
        ("pt", ["pt_update_intercept_for_msr", "pt_guest_enter"]),
        # near misses, and callers that no pattern is for
        ("other", ["vmx_msr_filter_changed_late", "not_vmx_vcpu_create", "vmx_recalc_instruction_intercepts_all"]),
        ("other", ["vmx_enable_intercept_for_msr", "vmx_vcpu_reset", "init_vmcs", "set_msr", "adopt_thread", ""]),
    ],
)
def test_the_cause_of_a_caller(cause: str, callers: list[str]) -> None:
    assert {caller: VMX.cause_of(caller) for caller in callers} == dict.fromkeys(callers, cause)


def test_every_cause_of_the_tables_has_words() -> None:
    assert {cause for vendor in VENDORS for _, cause in vendor.callers} | {"other"} == CAUSES.keys()
