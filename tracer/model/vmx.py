# SPDX-License-Identifier: GPL-2.0-or-later
"""Intel's VMX: arch/x86/kvm/vmx/ of Linux 5.10 to 7.3."""

from __future__ import annotations

from tracer.model.bitmap import Geometry
from tracer.model.cause import CPUID_UPDATE, FILTER_CHANGE, LBR, MSR_WRITE, PT, RECALC, VCPU_CREATE, X2APIC
from tracer.model.msr_filter import READ, WRITE
from tracer.model.nested import NestedBitmap
from tracer.model.vendor import FilterLoop, Layout, Passable, Shadow, Vendor

_ENABLE, _DISABLE = "vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr"
_SET, _FILTER_SET = "vmx_set_intercept_for_msr", "kvm_vm_ioctl_set_msr_filter"
_WRITERS = ("vmx_update_msr_bitmap_x2apic",)
_INLINED_INTO = ("vmx_set_virtual_apic_mode", "vmx_refresh_apicv_exec_ctrl")

#: Every vmx_possible_passthrough_msrs[] there has been, arch/x86/kvm/vmx/vmx.c. Read: 5.10.13, 5.12.9, 5.14.2, 5.15.16,
#: 5.17, 5.19, 6.0, 6.3.8, 6.4.6, 6.8.1, 6.14, 6.16.1, Debian's 6.1 and 6.12, a Rocky Linux vendor's with KVM of about
#: 6.13. A kernel with a longer list has the TSC, too; and an enable of one of these proves the old loop in any kernel.
_LOOP = (
    range(0x10, 0x11),  # TSC
    range(0x48, 0x4A),  # SPEC_CTRL, PRED_CMD
    range(0x10B, 0x10C),  # FLUSH_CMD: since 6.4
    range(0x174, 0x177),  # SYSENTER_CS, _ESP, _EIP
    range(0x1C4, 0x1C6),  # XFD, XFD_ERR: since 5.17
    range(0x3FC, 0x3FF),  # CORE_C3_, C6_, C7_RESIDENCY
    range(0x660, 0x661),  # CORE_C1_RES
    range(0xC0000100, 0xC0000103),  # FS_BASE, GS_BASE, KERNEL_GS_BASE
)
#: What else vmx_msr_filter_changed() of the same kernels enables, with the patch and without. There is nothing more:
#: only vmx_vcpu_run() updates the intercepts of LBR MSRs (vmx_update_intercept_for_lbr_msrs() in vmx/pmu_intel.c).
_ALSO_ENABLED = (
    # Intel PT, by pt_update_intercept_for_msr(): STATUS, OUTPUT_BASE, OUTPUT_MASK, CR3_MATCH, ADDRn_A and ADDRn_B of
    # each address range that the guest's CPUID has. That field has three bits (num_address_ranges in
    # arch/x86/events/intel/pt.c): seven ranges, though struct pt_ctx in vmx.h has room for four. Until 5.19 that is
    # done for every vCPU, since 6.0 where guests may have PT. CTL is in the range, too; no kernel read enables it.
    range(0x560, 0x562),
    range(0x570, 0x573),
    range(0x580, 0x58E),
    # x2APIC: until 5.14 it called vmx_update_msr_bitmap_x2apic(), which rewrites whole words and then enables TMCCT,
    # which may change a bit. kvm_msr_allowed() in arch/x86/kvm/x86.c has the whole range.
    range(0x800, 0x900),
)


#: vmx_recalc_intercepts() and what it calls, 6.18 to 7.3; 6.17: vmx_recalc_msr_intercepts(). What is not `always`
#: depends on the CPU, the guest's CPUID, the options of the module or what the guest did. `merged` is read in
#: nested_vmx_prepare_msr_bitmap() (vmx/nested.c) of 6.1, 6.12 and 7.2.
_PASSABLE = (
    Passable(range(0x10, 0x11), READ, always=True, merged=False),  # TSC
    Passable(range(0x174, 0x177), READ | WRITE, always=True, merged=False),  # SYSENTER_CS, _ESP, _EIP
    Passable(range(0xC0000100, 0xC0000103), READ | WRITE, always=True, merged=True),  # FS_BASE, GS_BASE, KERNEL_GS_BASE
    # SPEC_CTRL: vmx_get_passthrough_msr_slot() of 6.9 to 6.16 takes it for an LBR (MSR_LBR_CORE_FROM + 8), so it is
    # recorded as intercepted for ever. Where it is recorded as passed through, it is.
    Passable(range(0x48, 0x49), READ | WRITE, unlisted=True, merged=True),
    Passable(range(0x49, 0x4A), WRITE, merged=True),  # PRED_CMD
    Passable(range(0x10B, 0x10C), WRITE),  # FLUSH_CMD
    Passable(range(0xE7, 0xE9), READ),  # MPERF, APERF
    Passable(range(0x1C4, 0x1C5), READ | WRITE, merged=False),  # XFD
    Passable(range(0x1C5, 0x1C6), READ, merged=False),  # XFD_ERR
    Passable(range(0x3FC, 0x3FF), READ, merged=False),  # CORE_C3_, C6_, C7_RESIDENCY
    Passable(range(0x660, 0x661), READ, merged=False),  # CORE_C1_RES
    # Intel PT, as above: OUTPUT_BASE, OUTPUT_MASK, STATUS, CR3_MATCH, address ranges
    Passable(range(0x560, 0x562), READ | WRITE, unlisted=True, merged=False),
    Passable(range(0x571, 0x573), READ | WRITE, unlisted=True, merged=False),
    Passable(range(0x580, 0x58E), READ | WRITE, unlisted=True, merged=False),
    # LBR: LBR_SELECT, LASTBRANCH_TOS; FROM, TO and INFO of up to 32 branches, FROM and TO of old CPUs
    # (vmx_update_intercept_for_lbr_msrs() in vmx/pmu_intel.c, 5.12; vmx_get_passthrough_msr_slot() has the numbers)
    Passable(range(0x1C8, 0x1CA), READ | WRITE, unlisted=True, merged=False),
    Passable(range(0x680, 0x6A0), READ | WRITE, unlisted=True, merged=False),
    Passable(range(0x6C0, 0x6E0), READ | WRITE, unlisted=True, merged=False),
    Passable(range(0xDC0, 0xDE0), READ | WRITE, unlisted=True, merged=False),
    Passable(range(0x40, 0x48), READ | WRITE, unlisted=True, merged=False),
    Passable(range(0x60, 0x68), READ | WRITE, unlisted=True, merged=False),
    Passable(range(0x6A0, 0x6A1), READ | WRITE),  # CET: U_CET, S_CET, PL0_SSP to PL3_SSP
    Passable(range(0x6A2, 0x6A3), READ | WRITE),
    Passable(range(0x6A4, 0x6A8), READ | WRITE),
    Passable(range(0xC1, 0xC9), READ | WRITE),  # PMU (7.0+): counters, by both their numbers, and global registers
    Passable(range(0x309, 0x30D), READ | WRITE),
    Passable(range(0x38E, 0x391), READ | WRITE),
    Passable(range(0x4C1, 0x4C9), READ | WRITE),
    Passable(range(0x800, 0x900), READ | WRITE, unlisted=True),  # x2APIC
)


_VMCS02 = (("vcpu_vmx", "nested"), ("nested_vmx", "vmcs02"))


def _layout(name: str, kernels: str, update: str, **calls: str) -> Layout:
    return Layout(name, kernels, update, **calls, writers=_WRITERS, inlined_into=_INLINED_INTO)


VMX = Vendor(
    name="vmx",
    title="Intel VMX",
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
    bitmap_geometry=Geometry(0x1000, ((0, 0), (0xC0000000, 0x400)), stride=1, to_write=0x800 * 8),
    # vmx.h. alloc_loaded_vmcs() and free_loaded_vmcs() (vmx.c) leave the bitmap's address behind, and set no control:
    # prepare_vmcs02_early() (nested.c) does, and CPU_BASED_USE_MSR_BITMAPS is 1 << 28 (asm/vmx.h).
    nested=NestedBitmap(
        made=(*_VMCS02, ("loaded_vmcs", "vmcs")),
        bitmap=(*_VMCS02, ("loaded_vmcs", "msr_bitmap")),
        changed=(("vcpu_vmx", "nested"), ("nested_vmx", "force_msr_bitmap_recalc")),
        in_use=(*_VMCS02, ("loaded_vmcs", "controls_shadow"), ("vmcs_controls_shadow", "exec")),
        flag=1 << 28,
    ),
    # vmx.h, 5.10 to 6.16; bits beyond the end of the list are set, too. Every list ends with CORE_C7_RESIDENCY.
    shadow=Shadow(("vcpu_vmx", "shadow_msr_intercept"), "vmx_possible_passthrough_msrs", 4, 0x3FE, passes=False),
    passable=_PASSABLE,
    # The first since 6.17: the other is inline there, and a copy of it that is not cannot be probed.
    nested_exit=("__nested_vmx_vmexit", "nested_vmx_vmexit"),
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
    filter_loop=FilterLoop(_LOOP, _ALSO_ENABLED),
    # KVM_X86_TDX_VM, arch/x86/include/uapi/asm/kvm.h: struct vcpu_tdx has no bitmap (vmx/main.c: "TDX doesn't allow VMM
    # to configure interception of MSR accesses").
    no_bitmap=(5, "TDX"),
)
