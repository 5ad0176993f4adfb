# SPDX-License-Identifier: GPL-2.0-or-later
"""AMD's SVM: arch/x86/kvm/svm/ of Linux 5.10 to 7.3."""

from __future__ import annotations

from tracer.model.cause import (
    CPUID_UPDATE,
    FILTER_CHANGE,
    LBR,
    MSR_WRITE,
    NESTED,
    RECALC,
    VCPU_CREATE,
    VCPU_RESET,
    X2APIC,
)
from tracer.model.vendor import Layout, Vendor

_SET, _FILTER_SET = "svm_set_intercept_for_msr", "kvm_vm_ioctl_set_msr_filter"

SVM = Vendor(
    name="svm",
    title="AMD SVM",
    cpu_flag="svm",
    cpu_feature="SVM",
    makers=("AuthenticAMD", "HygonGenuine"),
    # Where it is disabled (SVMDIS in MSR_VM_CR), init_amd() and init_hygon() clear the flag since 6.7, and say "SVM
    # disabled (by BIOS)". Before, kvm_amd refuses to load with EOPNOTSUPP, and says that or "disabled by bios".
    firmware_fix="enable SVM (AMD-V) in the firmware setup, then power off and on",
    flag_if_disabled=True,
    module="kvm_amd",
    module_file="kvm-amd.ko",
    config_option="CONFIG_KVM_AMD",
    parameters=("nested", "avic", "lbrv", "sev_es", "enable_mediated_pmu"),
    prefix="svm_",
    marker="svm_vcpu_run",
    layouts=(
        Layout("recalc", "6.18+", "svm_recalc_intercepts", set_=_SET, filter_set=_FILTER_SET),
        Layout("set", "6.17", "svm_recalc_msr_intercepts", set_=_SET, filter_set=_FILTER_SET),
        # nested.c: the bitmap for nested guests is merged from two others, and freed, without calls.
        Layout(
            "pass",
            "5.10-6.16",
            "svm_msr_filter_changed",
            pass_="set_msr_interception_bitmap",
            writers=("nested_svm_vmrun_msrpm", "svm_free_nested"),
        ),
    ),
    # The second names are those of kernels before 5.19.
    vcpu_create=("svm_vcpu_create", "svm_create_vcpu"),
    vcpu_free=("svm_vcpu_free", "svm_free_vcpu"),
    # svm.h. Since 6.17 no call is for the bitmap of nested guests; before, calls name theirs.
    bitmap=(("vcpu_svm", "msrpm"),),
    geometry={"msrpm": 1},
    # 5.10 to 7.3. set_msr_interception() is inlined but for calls by sev.c, so its callers are seen, or theirs, where
    # it is a tail call: kvm_set_cpuid() for svm_vcpu_after_set_cpuid() in Debian's 6.1 and 6.12. Beside the
    # creation of a vCPU, which is followed, a bitmap is initialised when the vCPU's guest enables SVM itself.
    callers=(
        (r"svm_msr_filter_changed", FILTER_CHANGE),
        (r".*lbr.*", LBR),
        (r".*x2apic.*|avic_.*", X2APIC),
        (r"(svm|sev_es)_recalc_.*intercepts", RECALC),
        (r"svm_vcpu_create|svm_create_vcpu", VCPU_CREATE),
        (r"svm_vcpu_init_msrpm", NESTED),
        (r"svm_vcpu_reset|(init|sev_init|sev_es_init)_vmcb", VCPU_RESET),
        (r".*(set_cpuid|cpuid_update)", CPUID_UPDATE),
        (r"svm_set_(msr|efer)", MSR_WRITE),
    ),
)
