# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks of the CPU, the kernel and its KVM, on machines made of files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from machines import (
    BOTH,
    BPF_AND_PERFMON,
    DISABLED,
    EXITS,
    FAILED,
    KVM,
    MODPROBE,
    MODPROBE_AMD,
    OK,
    PASS,
    RELEASE,
    TOGGLE,
    UNKNOWN,
    VMLINUX,
    WARNING,
    Host,
    amd_cpuinfo,
    btf,
    cpuinfo,
    kallsyms,
    status,
)

from tracer.doctor.check import Check
from tracer.doctor.examination import examine, obstacle
from tracer.doctor.output import as_json
from tracer.kernel.machine import Machine
from tracer.model.svm import SVM
from tracer.model.vendor import Vendor
from tracer.model.vmx import VMX

BOOT_KVM = "boot a kernel that has CONFIG_KVM_INTEL"
OTHER_CPU = "run msrtrace on a host whose CPU has VMX or SVM"

RECALC = ("vmx_set_intercept_for_msr", "vmx_recalc_intercepts", "kvm_vm_ioctl_set_msr_filter")


@pytest.mark.parametrize("vendor", ["CentaurHauls", "  Shanghai  "])
def test_zhaoxin_has_vmx(host: Host, vendor: str) -> None:
    host.write("proc/cpuinfo", cpuinfo(vendor))
    assert host.found("cpu") == (OK, None)


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "HygonGenuine"])
def test_amd_and_hygon_have_svm(amd: Host, vendor: str) -> None:
    amd.write("proc/cpuinfo", amd_cpuinfo("fpu svm npt hypervisor", vendor))
    assert amd.check("cpu") == Check("cpu", OK, "AMD EPYC 7543 has SVM")


@pytest.mark.parametrize(
    ("flags", "fix"),
    [
        ("fpu", "enable VT-x (Intel Virtualization Technology) in the firmware setup, then power off and on"),
        (
            "fpu hypervisor",
            "on its host, load kvm_intel with nested=1 (the default), and give the VM a CPU with vmx "
            "(QEMU: -cpu host, or +vmx)",
        ),
    ],
)
def test_intel_without_vmx(host: Host, flags: str, fix: str) -> None:
    host.write("proc/cpuinfo", cpuinfo(flags=flags))
    assert host.found("cpu") == (FAILED, fix)


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "HygonGenuine"])
@pytest.mark.parametrize(
    ("flags", "detail", "fix"),
    [
        (
            "fpu npt",
            "AMD EPYC 7543 has no SVM, or the firmware has disabled it",
            "enable SVM (AMD-V) in the firmware setup, then power off and on",
        ),
        (
            "fpu hypervisor",
            "AMD EPYC 7543 of a virtual machine, without nested SVM",
            "on its host, load kvm_amd with nested=1 (the default), and give the VM a CPU with svm "
            "(QEMU: -cpu host, or +svm)",
        ),
    ],
)
def test_amd_without_svm(amd: Host, vendor: str, flags: str, detail: str, fix: str) -> None:
    amd.unload()
    amd.write("proc/cpuinfo", amd_cpuinfo(flags, vendor))
    assert amd.check("cpu") == Check("cpu", FAILED, detail, fix)
    assert amd.found("kvm-amd") == (FAILED, "fix cpu first")
    assert obstacle(amd.machine) == f"{detail}: {fix}"


WSLCONFIG = (
    "on Windows, put nestedVirtualization=true below [wsl2] in %UserProfile%\\.wslconfig, then wsl --shutdown "
    "(Windows 11 or newer)"
)
HYPER_V = "on its Hyper-V host, with the VM off: Set-VMProcessor -VMName NAME -ExposeVirtualizationExtensions $true"


@pytest.mark.parametrize("flags", [cpuinfo(flags="fpu hypervisor"), amd_cpuinfo("fpu hypervisor")])
@pytest.mark.parametrize(
    ("release", "files", "fix"),
    [
        ("5.15.153.1-microsoft-standard-WSL2", {}, WSLCONFIG),
        ("6.18.44-custom", {"proc/sys/fs/binfmt_misc/WSLInterop": "enabled"}, WSLCONFIG),
        (
            RELEASE,
            {
                "sys/class/dmi/id/sys_vendor": "Microsoft Corporation\n",
                "sys/class/dmi/id/product_name": "Virtual Machine\n",
            },
            HYPER_V,
        ),
        (RELEASE, {"sys/bus/vmbus/uevent": ""}, HYPER_V),
        (
            RELEASE,
            {
                "sys/bus/vmbus/uevent": "",
                "sys/class/dmi/id/chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77\n",
            },
            "take a size of VM that supports nested virtualization",
        ),
        (
            RELEASE,
            {"sys/class/dmi/id/sys_vendor": "VMware, Inc.\n"},
            'with the VM off, expose hardware-assisted virtualization to the guest (vhv.enable = "TRUE" in its .vmx)',
        ),
    ],
)
def test_nested_virtualisation_is_enabled_as_the_hypervisor_has_it(
    host: Host, flags: str, release: str, files: dict[str, str], fix: str
) -> None:
    host.write("proc/cpuinfo", flags)
    host.be(release=release)
    for file, content in files.items():
        host.write(file, content)
    cpu = next(check for check in examine(host.machine) if check.name == "cpu")
    assert (cpu.state, cpu.fix) == (FAILED, fix)


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        (
            "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\n",
            "this CPU is not an x86 CPU",
        ),
        (cpuinfo("Geode by NSC", "fpu de", "Geode(TM)"), "Geode(TM) has neither VMX nor SVM"),
        (cpuinfo("KVMKVMKVM", "fpu de hypervisor", "QEMU"), "QEMU has neither VMX nor SVM"),
    ],
)
def test_cpu_of_another_maker(host: Host, text: str, detail: str) -> None:
    host.unload()
    host.write("proc/cpuinfo", text)
    assert host.check("cpu") == Check("cpu", FAILED, f"{detail}; msrtrace traces VMX and SVM", OTHER_CPU)
    assert host.found("kvm-intel") == (FAILED, "fix cpu first")


@pytest.mark.parametrize(
    ("text", "modules", "vendors"),
    [
        (cpuinfo(), ("kvm_amd",), [VMX]),
        (amd_cpuinfo(), ("kvm_intel",), [SVM]),
        (amd_cpuinfo("fpu"), ("kvm_intel", "kvm_amd"), [SVM]),  # both built in, disabled in the firmware
        (cpuinfo("Shanghai", "fpu"), (), [VMX]),
        ("", ("kvm_amd",), [SVM]),
        ("", (), [VMX, SVM]),
    ],
)
def test_vendors_of_a_machine(tmp_path: Path, text: str, modules: tuple[str, ...], vendors: list[Vendor]) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(text)
    for module in modules:
        (tmp_path / "sys/module" / module).mkdir(parents=True)
    assert list(Machine(tmp_path).vendors) == vendors


def test_module_not_loaded(host: Host) -> None:
    host.unload()
    assert host.found("kvm-intel") == (FAILED, MODPROBE)
    assert host.found("symbols") == (UNKNOWN, "fix kvm-intel first")
    assert host.found("btf") == (UNKNOWN, "fix symbols first")
    assert obstacle(host.machine) == f"kvm_intel is not loaded: {MODPROBE}"
    assert obstacle(host.machine, ignore=["module"]) is None


def test_kvm_amd_not_loaded(amd: Host) -> None:
    """Before 6.7 the CPU has the flag even where the firmware has disabled SVM: only modprobe shows it."""
    amd.unload()
    assert amd.check("kvm-amd") == Check("kvm-amd", FAILED, "kvm_amd is not loaded", MODPROBE_AMD)
    assert amd.found("symbols") == (UNKNOWN, "fix kvm-amd first")
    assert amd.found("btf") == (UNKNOWN, "fix symbols first")
    assert obstacle(amd.machine) == f"kvm_amd is not loaded: {MODPROBE_AMD}"
    assert obstacle(amd.machine, ignore=["module", "symbols"]) is None
    amd.remove(f"lib/modules/{RELEASE}")  # in a container
    assert amd.found("kvm-amd") == (FAILED, MODPROBE_AMD)


def test_kernel_without_kvm_amd(amd: Host) -> None:
    amd.unload()
    amd.write(f"lib/modules/{RELEASE}/modules.dep", BOTH.replace("kvm-amd.ko", "other.ko"))
    assert amd.found("kvm-amd") == (FAILED, "boot a kernel that has CONFIG_KVM_AMD")


def test_parameters_of_kvm_amd(amd: Host) -> None:
    for parameter, value in {"lbrv": "1", "sev_es": "N", "enable_mediated_pmu": "Y"}.items():
        amd.write(f"sys/module/kvm_amd/parameters/{parameter}", f"{value}\n")
    assert amd.check("kvm-amd").detail == "loaded nested=1 avic=N lbrv=1 sev_es=N enable_mediated_pmu=Y"


def test_both_vendors_modules_built_in(host: Host) -> None:
    host.build_in()
    assert host.check("kvm-intel") == Check("kvm-intel", OK, "built in nested=1")
    assert host.check("symbols").detail == f"layout toggle (kernels 5.13-6.16): {', '.join(TOGGLE)}"


def test_both_vendors_modules_built_in_on_amd(amd: Host) -> None:
    amd.build_in()
    assert amd.check("kvm-amd") == Check("kvm-amd", OK, "built in nested=1")
    assert amd.check("symbols").detail == f"layout pass (kernels 5.10-6.16): {', '.join(PASS)}"
    assert obstacle(amd.machine) is None


def test_built_in_on_amd_but_not_started(amd: Host) -> None:
    amd.build_in(started=False)
    assert amd.check("kvm-amd") == Check("kvm-amd", FAILED, "kvm_amd is built in but did not start", DISABLED)
    assert obstacle(amd.machine) == f"kvm_amd is built in but did not start: {DISABLED}"


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


@pytest.mark.parametrize(
    ("layout", "kernels", "functions"),
    [
        ("pass", "5.10-6.16", PASS),
        ("set", "6.17", ("svm_set_intercept_for_msr", "svm_recalc_msr_intercepts", "kvm_vm_ioctl_set_msr_filter")),
        ("recalc", "6.18+", ("svm_set_intercept_for_msr", "svm_recalc_intercepts", "kvm_vm_ioctl_set_msr_filter")),
    ],
)
def test_layouts_of_amd(amd: Host, layout: str, kernels: str, functions: tuple[str, ...]) -> None:
    amd.write("proc/kallsyms", kallsyms(*functions, module="kvm_amd"))
    check = amd.check("symbols")
    assert (check.state, check.detail) == (OK, f"layout {layout} (kernels {kernels}): {', '.join(functions)}")
    assert json.loads(as_json(examine(amd.machine), amd.machine))["layout"] == layout


def test_clone_of_a_function_of_amd_is_shown(amd: Host) -> None:
    clone = "set_msr_interception_bitmap.part.0"
    amd.write("proc/kallsyms", kallsyms(*PASS, clone, module="kvm_amd"))
    assert amd.check("symbols").detail.endswith(f": {', '.join(PASS)}; not probed: {clone}")


def test_function_of_amd_that_was_inlined(amd: Host) -> None:
    amd.write("proc/kallsyms", kallsyms(PASS[1], module="kvm_amd"))
    check = amd.check("symbols")
    assert check.state is WARNING
    assert check.detail.endswith("; not found, so what they do is not counted: set_msr_interception_bitmap")


def test_part_that_is_probed_is_shown(host: Host) -> None:
    """As in Debian's 6.17: what calls the part, does not call the function."""
    functions = ["vmx_set_intercept_for_msr", "vmx_recalc_msr_intercepts.part.0", "kvm_vm_ioctl_set_msr_filter"]
    host.write("proc/kallsyms", kallsyms(*functions, "vmx_recalc_msr_intercepts", "vmx_recalc_msr_intercepts.cold"))
    check = host.check("symbols")
    assert check.state is OK
    found = f"layout set (kernels 6.17): {', '.join(functions)}; not probed: vmx_recalc_msr_intercepts"
    assert check.detail == found


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
    assert check.detail.endswith(f"vmx_disable_intercept_for_msr, {clones[0]}; not probed: {clones[1]}")


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
    fix = (
        "boot Linux 5.10 or newer; if this is one, report the output of: grep -E 'intercept|msr_filter' /proc/kallsyms"
    )
    assert check.fix == fix
    assert obstacle(host.machine) == f"{check.detail}: {fix}"


def test_no_known_symbol_of_amd(amd: Host) -> None:
    amd.write("proc/kallsyms", kallsyms("svm_vcpu_run", module="kvm_amd"))
    check = amd.check("symbols")
    assert check.state is FAILED
    known = check.detail.removeprefix(f"kernel {RELEASE} has none of ").removesuffix(" in /proc/kallsyms").split(", ")
    assert sorted(known) == sorted({function for layout in SVM.layouts for function in layout.functions})


@pytest.mark.parametrize("vendor", [VMX, SVM])
def test_the_command_that_lists_functions_finds_every_known_one(host: Host, vendor: Vendor) -> None:
    host.write("proc/kallsyms", kallsyms("vmx_vcpu_run"))
    pattern = str(host.check("symbols").fix).split("'")[1]
    assert [f for layout in vendor.layouts for f in layout.functions if not re.search(pattern, f)] == []


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
    image = "\n".join(f"ffffffff8106{n}f30 t {f}" for n, f in enumerate(("vmx_vcpu_run", *TOGGLE, *EXITS)))
    host.write("proc/kallsyms", image + "\n")
    host.remove("sys/kernel/btf/kvm_intel")
    assert host.found("symbols") == (OK, None)
    assert host.found("exits") == (OK, None)
    assert host.check("btf").detail.startswith("the BTF has no struct vcpu_vmx: calls are counted")
    host.write("sys/kernel/btf/vmlinux", btf(KVM))
    assert host.found("btf") == (OK, None)


def test_built_into_a_kernel_whose_functions_have_suffixes(host: Host) -> None:
    names = [f"{name}.llvm.3433979326929198294" for name in ("vmx_vcpu_run", *TOGGLE)]
    host.write("proc/kallsyms", "".join(f"ffffffff8106{n}f30 t {name}\n" for n, name in enumerate(names)))
    check = host.check("symbols")
    assert (check.state, check.detail) == (OK, f"layout toggle (kernels 5.13-6.16): {', '.join(names[1:])}")


def test_kvm_built_in_without_kvm_intel(host: Host) -> None:
    image = ["kvm_vcpu_ioctl", "kvm_vm_ioctl_set_msr_filter"]
    lines = "".join(f"ffffffff8106{n}f30 t {name}\n" for n, name in enumerate(image))
    host.write("proc/kallsyms", lines + kallsyms(*RECALC[:2], exits=()).partition("\n")[2])
    check = host.check("symbols")
    assert (check.state, check.detail) == (OK, f"layout recalc (kernels 6.18+): {', '.join(RECALC)}")


def exits(host: Host, *functions: str) -> Check:
    """The check, where kvm has these functions."""
    host.write("proc/kallsyms", kallsyms(*TOGGLE, exits=functions))
    return host.check("exits")


def test_exits_are_counted_at_what_the_kernel_has(host: Host) -> None:
    newer = ("handle_fastpath_wrmsr", "kvm_emulate_rdmsr_imm", "kvm_emulate_wrmsr_imm", "handle_fastpath_wrmsr_imm")
    read, write, fast, refused = EXITS
    check = exits(host, *EXITS[:2], refused, *newer)
    assert (check.state, check.fix) == (OK, None)
    assert check.detail.startswith(f"--exits probes {read}, {write}, {newer[0]}, {refused}, {', '.join(newer[1:])}; no")
    assert exits(host, fast, read, refused, write).detail.startswith(f"--exits probes {', '.join(EXITS)}; no exits: ")


@pytest.mark.parametrize("lacking", EXITS)
def test_a_function_that_exits_need_and_the_kernel_lacks(host: Host, lacking: str) -> None:
    there = [function for function in EXITS if function != lacking]
    assert exits(host, *there) == Check(
        "exits",
        WARNING,
        f"--exits probes {', '.join(there)}; not found, so what they do is not counted: {lacking}",
        f"report the output of: grep -E '{lacking}' /proc/kallsyms",
    )
    assert obstacle(host.machine) is None


def test_a_kernel_without_any_of_them(host: Host) -> None:
    assert exits(host).detail.startswith("--exits probes nothing; not found, so what they do is not counted: kvm_emul")
    host.unload()
    assert host.found("exits") == (UNKNOWN, "fix symbols first")


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


def test_no_btf_where_calls_say_where_the_bitmap_is(amd: Host) -> None:
    assert amd.check("btf").detail == "msrpm is at 0x1af8 in struct vcpu_svm"
    amd.remove("sys/kernel/btf/kvm_amd")
    detail = (
        "not needed: each call says where the bitmap is; but fentry cannot be used "
        f"({amd.root}/sys/kernel/btf/kvm_amd: No such file or directory)"
    )
    assert amd.check("btf") == Check("btf", OK, detail)


def test_no_btf_where_calls_of_amd_do_not_say_where_the_bitmap_is(amd: Host) -> None:
    amd.write("proc/kallsyms", kallsyms("svm_set_intercept_for_msr", "svm_recalc_intercepts", module="kvm_amd"))
    amd.remove("sys/kernel/btf/kvm_amd")
    check = amd.check("btf")
    assert check.state is WARNING
    assert check.detail.endswith("calls are counted, but which were redundant is unknown")


def test_btf_without_the_member(host: Host) -> None:
    host.write("sys/kernel/btf/kvm_intel", btf({"vcpu_vmx": ("vmcs02", 8)}, VMLINUX))
    check = host.check("btf")
    assert check.state is WARNING
    assert check.detail.startswith("the BTF has no member vmcs01 in struct vcpu_vmx: calls are counted")
