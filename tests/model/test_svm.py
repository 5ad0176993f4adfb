# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of AMD's SVM: causes of calls, by the functions that make them in Linux 5.10 to 7.3."""

from __future__ import annotations

import pytest

from tracer.model.svm import SVM


@pytest.mark.parametrize(
    ("cause", "callers"),
    [
        ("filter_change", ["svm_msr_filter_changed"]),
        ("recalc", ["svm_recalc_msr_intercepts", "svm_recalc_intercepts", "svm_recalc_pmu_msr_intercepts"]),
        ("recalc", ["sev_es_recalc_msr_intercepts"]),
        ("vcpu_create", ["svm_vcpu_create", "svm_create_vcpu"]),
        ("nested", ["svm_vcpu_init_msrpm"]),
        ("vcpu_reset", ["svm_vcpu_reset", "init_vmcb", "sev_init_vmcb", "sev_es_init_vmcb"]),
        (
            "cpuid_update",
            ["svm_vcpu_after_set_cpuid", "sev_vcpu_after_set_cpuid", "sev_es_vcpu_after_set_cpuid", "kvm_set_cpuid"],
        ),
        ("x2apic", ["svm_set_x2apic_msr_interception", "avic_set_x2apic_msr_interception", "avic_activate_vmcb"]),
        ("lbr", ["svm_update_lbrv", "svm_enable_lbrv", "svm_recalc_lbr_msr_intercepts"]),
        ("msr_write", ["svm_set_msr", "svm_set_efer"]),
        # near misses, and callers that no pattern is for
        ("other", ["svm_msr_filter_changed_late", "not_svm_vcpu_create", "svm_recalc_intercepts_all", "svm_vcpu_run"]),
        ("other", ["set_msr_interception", "set_msr_interception_bitmap", "svm_set_intercept_for_msr", ""]),
    ],
)
def test_the_cause_of_a_caller(cause: str, callers: list[str]) -> None:
    assert {caller: SVM.cause_of(caller) for caller in callers} == dict.fromkeys(callers, cause)
