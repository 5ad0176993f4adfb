# SPDX-License-Identifier: GPL-2.0-or-later
"""Intel's VMX: arch/x86/kvm/vmx/ of Linux 5.10 to 7.3."""

from __future__ import annotations

from tracer.model.cause import CPUID_UPDATE, FILTER_CHANGE, LBR, MSR_WRITE, PT, RECALC, VCPU_CREATE, X2APIC
from tracer.model.vendor import Layout, Vendor

_ENABLE, _DISABLE = "vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr"
_SET, _FILTER_SET = "vmx_set_intercept_for_msr", "kvm_vm_ioctl_set_msr_filter"
_WRITERS = ("vmx_update_msr_bitmap_x2apic",)
_INLINED_INTO = ("vmx_set_virtual_apic_mode", "vmx_refresh_apicv_exec_ctrl")


def _layout(name: str, kernels: str, update: str, **calls: str) -> Layout:
    return Layout(name, kernels, update, **calls, writers=_WRITERS, inlined_into=_INLINED_INTO)


VMX = Vendor(
    name="vmx",
    cpu_flag="vmx",
    cpu_feature="VMX",
    makers=("GenuineIntel", "CentaurHauls", "Shanghai"),
    # Where it is disabled, arch/x86/kernel/cpu/feat_ctl.c clears the flag; for Zhaoxin's CPUs, too.
    firmware_fix="enable VT-x (Intel Virtualization Technology) in the firmware setup, then power off and on",
    flag_if_disabled=False,
    module="kvm_intel",
    module_file="kvm-intel.ko",
    config_option="CONFIG_KVM_INTEL",
    parameters=("nested", "enable_apicv", "enable_ipiv", "pt_mode", "enable_mediated_pmu"),
    prefix="vmx_",
    marker="vmx_vcpu_run",
    layouts=(
        _layout("recalc", "6.18+", "vmx_recalc_intercepts", set_=_SET, filter_set=_FILTER_SET),
        _layout("set", "6.17", "vmx_recalc_msr_intercepts", set_=_SET, filter_set=_FILTER_SET),
        _layout("toggle", "5.13-6.16", "vmx_msr_filter_changed", enable=_ENABLE, disable=_DISABLE),
        Layout("filter-only", "5.10-5.12", "vmx_msr_filter_changed"),
    ),
    # The second names are those of kernels before 5.19.
    vcpu_create=("vmx_vcpu_create", "vmx_create_vcpu"),
    vcpu_free=("vmx_vcpu_free", "vmx_free_vcpu"),
    # vmx.h and vmcs.h. vmcs01 is the one that the traced functions write, also while a nested guest runs.
    bitmap=(("vcpu_vmx", "vmcs01"), ("loaded_vmcs", "msr_bitmap")),
    geometry={},
    # 5.13 to 7.3. Functions between these and the call are inlined in some builds and not in others, and a tail call
    # hides the function that makes it, so its caller is seen instead: __kvm_apic_set_base() for
    # vmx_set_virtual_apic_mode() in Debian's 6.12.
    callers=(
        (r"vmx_msr_filter_changed", FILTER_CHANGE),
        (r"vmx_recalc_.*intercepts", RECALC),
        (r"vmx_vcpu_create|vmx_create_vcpu", VCPU_CREATE),
        (r".*(after_set_cpuid|cpuid_update)", CPUID_UPDATE),
        (r".*apic.*", X2APIC),
        (r".*lbr.*|vmx_vcpu_run", LBR),
        (r"pt_.*", PT),
        (r".*_set_msr.*", MSR_WRITE),
    ),
)
