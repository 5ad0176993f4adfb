# SPDX-License-Identifier: GPL-2.0-or-later
"""AMD's SVM: arch/x86/kvm/svm/ of Linux 5.10 to 7.3."""

from __future__ import annotations

from tracer.model.bitmap import Geometry
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
from tracer.model.msr_filter import READ, WRITE
from tracer.model.nested import NestedBitmap
from tracer.model.vendor import NO_MSR, Layout, Passable, Shadow, Vendor

_SET, _FILTER_SET = "svm_set_intercept_for_msr", "kvm_vm_ioctl_set_msr_filter"

#: svm_recalc_intercepts() and what it calls, 6.18 to 7.3; 6.17: svm_recalc_msr_intercepts(). What is not `always`
#: depends on the CPU, the guest's CPUID, the options of the module, SEV, or what the guest did. `merged` is read in
#: nested_svm_vmrun_msrpm() (svm/nested.c) of 6.1 and 6.12, which merges what init_msrpm_offsets() lists, and in
#: nested_svm_init_msrpm_merge_offsets() of 7.2.
_PASSABLE = (
    Passable(range(0x174, 0x175), READ | WRITE, always=True, merged=True),  # SYSENTER_CS
    Passable(range(0xC0000081, 0xC0000085), READ | WRITE, always=True, merged=True),  # STAR, LSTAR, CSTAR, SYSCALL_MASK
    Passable(range(0xC0000100, 0xC0000103), READ | WRITE, always=True, merged=True),  # FS_BASE, GS_BASE, KERNEL_GS_BASE
    Passable(range(0x48, 0x49), READ | WRITE, merged=True),  # SPEC_CTRL
    Passable(range(0x49, 0x4A), WRITE, merged=True),  # PRED_CMD
    Passable(range(0x10B, 0x10C), WRITE, merged=True),  # FLUSH_CMD
    Passable(range(0xE7, 0xE9), READ, merged=True),  # MPERF, APERF
    Passable(range(0x175, 0x177), READ | WRITE, merged=True),  # SYSENTER_ESP, _EIP
    Passable(range(0x1D9, 0x1DA), READ | WRITE, merged=True),  # DEBUGCTL, and LBR
    Passable(range(0x1DB, 0x1DF), READ | WRITE, merged=True),
    Passable(range(0x6A0, 0x6A1), READ | WRITE),  # CET: U_CET, S_CET, PL0_SSP to PL3_SSP
    Passable(range(0x6A2, 0x6A3), READ | WRITE),
    Passable(range(0x6A4, 0x6A8), READ | WRITE),
    Passable(range(0x277, 0x278), READ | WRITE),  # SEV-ES: PAT, XSS, EFER, TSC_AUX, the GHCB
    Passable(range(0xDA0, 0xDA1), READ | WRITE),
    Passable(range(0xC0000080, 0xC0000081), READ | WRITE),
    Passable(range(0xC0000103, 0xC0000104), READ | WRITE),
    Passable(range(0xC0010130, 0xC0010131), READ | WRITE),
    Passable(range(0xC0010134, 0xC0010135), READ),  # SEV-SNP: GUEST_TSC_FREQ (6.18)
    Passable(range(0xC0000300, 0xC0000304), READ | WRITE),  # PMU (7.0+): global registers, and counters
    Passable(range(0xC0010004, 0xC0010008), READ | WRITE),
    Passable(range(0xC0010201, 0xC001020C, 2), READ | WRITE),
    Passable(range(0x800, 0x900), READ | WRITE),  # x2APIC
)

_NESTED = (("vcpu_svm", "nested"),)

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
    bitmap_geometry=Geometry(0x1800, ((0, 0), (0xC0000000, 0x800), (0xC0010000, 0x1000)), stride=2, to_write=1),
    # svm.h. nested_vmcb02_prepare_control() (nested.c) takes over the vCPU's own bitmap, and nested_svm_vmrun_msrpm(),
    # since 6.17 nested_svm_merge_msrpm(), replaces it unless L1 has no INTERCEPT_MSR_PROT.
    nested=NestedBitmap(
        made=(*_NESTED, ("svm_nested_state", "msrpm")),
        bitmap=(*_NESTED, ("svm_nested_state", "msrpm")),
        changed=(*_NESTED, ("svm_nested_state", "force_msr_bitmap_recalc")),
        in_use=(*_NESTED, ("svm_nested_state", "vmcb02"), ("kvm_vmcb_info", "ptr")),
        own=(("vcpu_svm", "vmcb01"), ("kvm_vmcb_info", "ptr")),
        inside=(("vmcb", "control"), ("vmcb_control_area", "msrpm_base_pa")),
    ),
    # svm.h, 5.10 to 6.16. The list has {u32 index; bool always}.
    shadow=Shadow(("vcpu_svm", "shadow_msr_intercept"), "direct_access_msrs", 8, NO_MSR, passes=True),
    passable=_PASSABLE,
    nested_exit=("nested_svm_vmexit",),
    control_block=("vcpu_svm", "vmcb"),
    control_block_values={"exit_code_offset": 0x70, "exit_info_offset": 0x78},  # AMD APM vol. 2, appendix B
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
