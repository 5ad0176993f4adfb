# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks of the CPU, the kernel and its KVM, on machines made of files."""

from __future__ import annotations

import json

import pytest
from machines import (
    BPF_AND_PERFMON,
    FAILED,
    KVM,
    MODPROBE,
    OK,
    RELEASE,
    TOGGLE,
    UNKNOWN,
    VMLINUX,
    WARNING,
    Host,
    btf,
    cpuinfo,
    kallsyms,
    status,
)

from tracer.doctor.check import Check
from tracer.doctor.examination import examine, obstacle
from tracer.doctor.output import as_json
from tracer.model.vmx import VMX

BOOT_KVM = "boot a kernel that has CONFIG_KVM_INTEL"


RECALC = ("vmx_set_intercept_for_msr", "vmx_recalc_intercepts", "kvm_vm_ioctl_set_msr_filter")


@pytest.mark.parametrize("vendor", ["CentaurHauls", "  Shanghai  "])
def test_zhaoxin_has_vmx(host: Host, vendor: str) -> None:
    host.write("proc/cpuinfo", cpuinfo(vendor))
    assert host.found("cpu") == (OK, None)


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "HygonGenuine"])
def test_amd(host: Host, vendor: str) -> None:
    host.write("proc/cpuinfo", cpuinfo(vendor, "fpu svm npt hypervisor", "AMD EPYC 7543"))
    assert host.check("cpu") == Check(
        "cpu",
        FAILED,
        "AMD EPYC 7543 has AMD's SVM, for which KVM has other code; msrtrace traces Intel VMX",
        "run msrtrace on a host with an Intel CPU",
    )
    assert str(obstacle(host.machine)).endswith("msrtrace traces Intel VMX: run msrtrace on a host with an Intel CPU")


@pytest.mark.parametrize(
    ("flags", "fix"),
    [
        ("fpu", "enable VT-x (Intel Virtualization Technology) in the firmware setup, then power off and on"),
        (
            "fpu hypervisor",
            "on its host, sudo modprobe kvm_intel nested=1, and give the VM a CPU with vmx (QEMU: -cpu host)",
        ),
    ],
)
def test_intel_without_vmx(host: Host, flags: str, fix: str) -> None:
    host.write("proc/cpuinfo", cpuinfo(flags=flags))
    assert host.found("cpu") == (FAILED, fix)


def test_arm(host: Host) -> None:
    host.write("proc/cpuinfo", "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\n")
    check = host.check("cpu")
    assert (check.state, check.detail) == (FAILED, "this CPU is not an x86 CPU; msrtrace traces Intel VMX")


def test_module_not_loaded(host: Host) -> None:
    host.unload()
    assert host.found("kvm-intel") == (FAILED, MODPROBE)
    assert host.found("symbols") == (UNKNOWN, "fix kvm-intel first")
    assert host.found("btf") == (UNKNOWN, "fix symbols first")
    assert obstacle(host.machine) == f"kvm_intel is not loaded: {MODPROBE}"
    assert obstacle(host.machine, ignore=["module"]) is None


def test_module_not_loaded_and_no_module_tree_in_a_container(host: Host) -> None:
    host.unload()
    host.remove(f"lib/modules/{RELEASE}")
    assert host.found("kvm-intel") == (FAILED, MODPROBE)


def test_kernel_without_kvm_intel(host: Host) -> None:
    host.unload()
    host.write(f"lib/modules/{RELEASE}/modules.dep", "kernel/arch/x86/kvm/kvm-amd.ko: kernel/arch/x86/kvm/kvm.ko\n")
    assert host.found("kvm-intel") == (FAILED, BOOT_KVM)


def test_kernel_without_modules(host: Host) -> None:
    host.unload()
    host.remove("proc/modules")
    host.remove(f"lib/modules/{RELEASE}")
    assert host.found("kvm-intel") == (FAILED, BOOT_KVM)


def test_built_in_but_not_started(host: Host) -> None:
    host.unload()
    host.write(f"lib/modules/{RELEASE}/modules.dep")
    host.write(f"lib/modules/{RELEASE}/modules.builtin", "kernel/arch/x86/kvm/kvm-intel.ko\n")
    assert host.found("kvm-intel") == (FAILED, "see why: sudo dmesg | grep -i -e kvm -e vmx")


def test_compressed_module(host: Host) -> None:
    host.unload()
    host.write(
        f"lib/modules/{RELEASE}/modules.dep", "kernel/arch/x86/kvm/kvm-intel.ko.xz: kernel/arch/x86/kvm/kvm.ko.xz\n"
    )
    assert host.found("kvm-intel") == (FAILED, MODPROBE)


def test_recalc_layout(host: Host) -> None:
    host.write("proc/kallsyms", kallsyms(*RECALC))
    check = host.check("symbols")
    assert (check.state, check.detail) == (OK, f"layout recalc (kernels 6.18+): {', '.join(RECALC)}")


def test_clone_that_no_probe_sits_on_is_shown(host: Host) -> None:
    clone = "vmx_recalc_msr_intercepts.part.0"
    functions = ["vmx_set_intercept_for_msr", "vmx_recalc_msr_intercepts", "kvm_vm_ioctl_set_msr_filter"]
    host.write("proc/kallsyms", kallsyms(*functions, clone, "vmx_recalc_msr_intercepts.cold"))
    check = host.check("symbols")
    assert check.state is OK
    assert check.detail == f"layout set (kernels 6.17): {', '.join(functions)}; not probed: {clone}"


def test_clone_that_is_probed_is_shown(host: Host) -> None:
    host.write("proc/kallsyms", kallsyms(TOGGLE[0], TOGGLE[1], "vmx_msr_filter_changed.isra.0"))
    check = host.check("symbols")
    assert check.state is OK
    assert check.detail.endswith("vmx_disable_intercept_for_msr, vmx_msr_filter_changed.isra.0")


def test_of_several_clones_one_is_probed(host: Host) -> None:
    clones = ["vmx_msr_filter_changed.part.0", "vmx_msr_filter_changed.llvm.343397932692919829"]
    host.write("proc/kallsyms", kallsyms(*TOGGLE[:2], *clones, "vmx_msr_filter_changed.llvm.343397932692919829.cold"))
    check = host.check("symbols")
    assert check.state is OK
    assert check.detail.endswith(f"vmx_disable_intercept_for_msr, {clones[1]}; not probed: {clones[0]}")


def test_filter_only_layout(host: Host) -> None:
    host.write("proc/kallsyms", kallsyms("vmx_msr_filter_changed"))
    host.remove("sys/kernel/btf/kvm_intel")
    check = host.check("symbols")
    assert (check.state, check.fix) == (WARNING, "boot Linux 5.13 or newer to count calls")
    assert check.detail == (
        "layout filter-only (kernels 5.10-5.12): vmx_msr_filter_changed; calls per MSR are not observable in this "
        "kernel, only filter updates and their time"
    )
    assert host.found("btf") == (OK, None)
    assert obstacle(host.machine) is None


def test_one_function_of_a_layout_missing(host: Host) -> None:
    host.write("proc/kallsyms", kallsyms(*TOGGLE[:2]))
    check = host.check("symbols")
    assert check.detail.endswith("; not found, so what they do is not counted: vmx_msr_filter_changed")
    assert (check.state, check.fix) == (
        WARNING,
        "report the output of: grep -E 'vmx_msr_filter_changed' /proc/kallsyms",
    )


def test_no_known_symbol(host: Host) -> None:
    host.write("proc/kallsyms", kallsyms("vmx_vcpu_run", "vmx_set_msr"))
    check = host.check("symbols")
    assert check.state is FAILED
    known = check.detail.removeprefix(f"kernel {RELEASE} has none of ").removesuffix(" in /proc/kallsyms").split(", ")
    assert known[0] == VMX.layouts[0].functions[0]  # the newest first
    assert sorted(known) == sorted({function for layout in VMX.layouts for function in layout.functions})
    fix = "boot Linux 5.10 or newer; if this is one, report the output of: grep -i intercept /proc/kallsyms"
    assert check.fix == fix
    assert obstacle(host.machine) == f"{check.detail}: {fix}"


def test_addresses_hidden_from_a_user(host: Host) -> None:
    host.write("proc/kallsyms", kallsyms(*TOGGLE, address=0))
    host.write("proc/self/status", status(0))
    host.be(euid=1000)
    check = host.check("symbols")
    assert check.state is OK
    assert check.detail.endswith("; their addresses are hidden from this user")


@pytest.mark.parametrize(
    ("kptr_restrict", "fix"),
    [("2", "sudo sysctl -w kernel.kptr_restrict=1"), ("1", "grant CAP_SYSLOG (--cap-add SYSLOG)")],
)
def test_addresses_hidden_from_who_may_trace(host: Host, kptr_restrict: str, fix: str) -> None:
    host.write("proc/kallsyms", kallsyms(*TOGGLE, address=0))
    host.write("proc/sys/kernel/kptr_restrict", kptr_restrict)
    host.write("proc/self/status", status(BPF_AND_PERFMON))
    assert host.found("symbols") == (WARNING, fix)


def test_built_into_the_kernel(host: Host) -> None:
    image = "\n".join(f"ffffffff8106{n}f30 t {f}" for n, f in enumerate(("vmx_vcpu_run", *TOGGLE)))
    host.write("proc/kallsyms", image + "\n")
    host.remove("sys/kernel/btf/kvm_intel")
    assert host.found("symbols") == (OK, None)
    assert host.check("btf").detail.startswith("the BTF has no struct vcpu_vmx: calls are counted")
    host.write("sys/kernel/btf/vmlinux", btf(KVM))
    assert host.found("btf") == (OK, None)


def test_built_into_a_kernel_whose_functions_have_suffixes(host: Host) -> None:
    names = [f"{name}.llvm.3433979326929198294" for name in ("vmx_vcpu_run", *TOGGLE)]
    host.write("proc/kallsyms", "".join(f"ffffffff8106{n}f30 t {name}\n" for n, name in enumerate(names)))
    check = host.check("symbols")
    assert (check.state, check.detail) == (OK, f"layout toggle (kernels 5.13-6.16): {', '.join(names[1:])}")


COPY = "ffffffffc0d00000 t vmx_msr_filter_changed\t[kpatch_x]\n"


TAKES_OVER = "msrtrace probes kvm_intel:vmx_msr_filter_changed, at whose entry a livepatch takes over"


def livepatch(host: Host, *functions: str, enabled: bool = True) -> None:
    for function in functions:
        (host.root / f"sys/kernel/livepatch/kpatch_x/kvm_intel/{function},1").mkdir(parents=True)
    host.write("sys/kernel/livepatch/kpatch_x/enabled", f"{enabled:d}\n")


def test_a_module_with_a_function_of_the_same_name(host: Host) -> None:
    host.write("proc/kallsyms", kallsyms(*TOGGLE) + COPY)
    detail = f"the module kpatch_x has a copy of vmx_msr_filter_changed; {TAKES_OVER}, so every call is counted"
    assert host.check("livepatch") == Check("livepatch", OK, detail)
    assert host.check("symbols").detail == f"layout toggle (kernels 5.13-6.16): {', '.join(TOGGLE)}"
    assert obstacle(host.machine) is None
    checks = json.loads(as_json(examine(host.machine), host.machine))["checks"]
    assert {"name": "livepatch", "state": "ok", "detail": detail, "fix": None} in checks


@pytest.mark.parametrize(("enabled", "state"), [(True, ""), (False, " (not enabled)")])
def test_a_livepatch_that_replaces_what_is_probed(host: Host, enabled: bool, state: str) -> None:
    host.write("proc/kallsyms", kallsyms(*TOGGLE) + COPY)
    livepatch(host, "vmx_msr_filter_changed", enabled=enabled)
    assert host.check("livepatch").detail == (
        f"the livepatch kpatch_x{state} replaces, and has a copy of, vmx_msr_filter_changed; {TAKES_OVER}, so every "
        "call is counted"
    )
    assert host.found("livepatch") == (OK, None)


def test_a_livepatch_whose_functions_have_other_names(host: Host) -> None:
    host.write("proc/kallsyms", kallsyms(*TOGGLE) + "ffffffffc0d00000 t livepatch_hook\t[kpatch_x]\n")
    livepatch(host, "vmx_msr_filter_changed")
    assert host.check("livepatch").detail == (
        f"the livepatch kpatch_x replaces vmx_msr_filter_changed; {TAKES_OVER}, so every call is counted"
    )


def test_a_livepatch_that_replaces_something_else(host: Host) -> None:
    livepatch(host, "vmx_set_cr4")
    assert host.check("livepatch").detail == "no livepatch or other module has a function that msrtrace probes"


def test_a_livepatch_whose_own_calls_are_not_seen(host: Host) -> None:
    copies = COPY + "ffffffffc0d00100 t vmx_disable_intercept_for_msr\t[kpatch_x]\n"
    host.write("proc/kallsyms", kallsyms(*TOGGLE) + copies)
    livepatch(host, "vmx_msr_filter_changed", "vmx_disable_intercept_for_msr")
    check = host.check("livepatch")
    assert (check.state, check.fix) == (WARNING, "to count these too, trace a host without kpatch_x")
    assert check.detail.endswith(
        ", at whose entry a livepatch takes over; calls that kpatch_x may make to its own "
        "vmx_disable_intercept_for_msr are not counted (it has vmx_msr_filter_changed, too)"
    )
    assert obstacle(host.machine) is None
    livepatch(host, enabled=False)
    assert host.found("livepatch") == (OK, None)


@pytest.mark.parametrize("lost", ["vmlinux", "kvm_intel"])
def test_no_btf(host: Host, lost: str) -> None:
    host.remove(f"sys/kernel/btf/{lost}")
    check = host.check("btf")
    assert (check.state, check.fix) == (
        WARNING,
        "boot a kernel with CONFIG_DEBUG_INFO_BTF=y and CONFIG_DEBUG_INFO_BTF_MODULES=y (Debian: 6.1 and newer)",
    )
    assert check.detail.endswith("No such file or directory: calls are counted, but which were redundant is unknown")
    assert obstacle(host.machine) is None


def test_btf_without_the_member(host: Host) -> None:
    host.write("sys/kernel/btf/kvm_intel", btf({"vcpu_vmx": ("vmcs02", 8)}, VMLINUX))
    check = host.check("btf")
    assert check.state is WARNING
    assert check.detail.startswith("the BTF has no member vmcs01 in struct vcpu_vmx: calls are counted")
