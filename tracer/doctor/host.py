# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks of the CPU, the kernel and KVM. Facts are from the sources of Linux 5.10 to 7.2, cited at each check."""

from __future__ import annotations

from tracer.doctor.check import Found, State
from tracer.kernel.btf import Btf, BtfError
from tracer.kernel.copies import describe
from tracer.kernel.layout import choose
from tracer.kernel.machine import Machine


def check_cpu(machine: Machine) -> Found:
    """By its flag: Zhaoxin CPUs have Intel's, too, and feat_ctl.c clears it where the firmware has disabled VMX."""
    cpu, vendor = machine.cpu, machine.vendor
    model = cpu.model or cpu.maker or "this CPU"
    if vendor.cpu_flag in cpu.flags:
        return State.OK, f"{model} has {vendor.cpu_feature}", None
    if not cpu.maker or cpu.maker in ("AuthenticAMD", "HygonGenuine"):
        why = "has AMD's SVM, for which KVM has other code" if cpu.maker else "is not an x86 CPU"
        return State.FAILED, f"{model} {why}; msrtrace traces Intel VMX", "run msrtrace on a host with an Intel CPU"
    if "hypervisor" in cpu.flags:
        given = f"give the VM a CPU with {vendor.cpu_flag} (QEMU: -cpu host)"
        fix = f"on its host, sudo modprobe {vendor.module} nested=1, and {given}"
        return State.FAILED, f"{model} of a virtual machine, without nested {vendor.cpu_feature}", fix
    return State.FAILED, f"{model} has no {vendor.cpu_feature}, or the firmware has disabled it", vendor.firmware_fix


def check_module(machine: Machine) -> Found:
    """KVM's module for the vendor: loaded, loadable, built in or missing."""
    vendor, module = machine.vendor, machine.vendor.module
    if machine.at(f"/sys/module/{module}").exists():
        values = ((name, machine.text(f"/sys/module/{module}/parameters/{name}", "")) for name in vendor.parameters)
        return State.OK, " ".join(["loaded", *(f"{name}={value}" for name, value in values if value)]), None
    modules = f"/lib/modules/{machine.release}"
    unlisted = machine.at("/proc/modules").exists() and not machine.at(modules).exists()  # in a container
    if unlisted or f"/{vendor.module_file}" in machine.text(f"{modules}/modules.dep", ""):
        return State.FAILED, f"{module} is not loaded", f"sudo modprobe {module}"
    if f"/{vendor.module_file}" in machine.text(f"{modules}/modules.builtin", ""):
        fix = f"see why: sudo dmesg | grep -i -e kvm -e {vendor.name}"
        return State.FAILED, f"{module} is built in but did not start", fix
    detail = f"kernel {machine.release} has no {module}, neither built in nor as a module"
    return State.FAILED, detail, f"boot a kernel that has {vendor.config_option}"


def check_symbols(machine: Machine) -> Found:
    """The functions to probe, and whether their addresses are visible."""
    symbols, layout, vendor = machine.symbols, choose(machine.symbols), machine.vendor
    known = list(dict.fromkeys(f for one in vendor.layouts for f in one.functions))
    if layout is None:
        if not machine.at(f"/sys/module/{vendor.module}").exists():
            detail = f"its functions can be looked up once {vendor.module} is loaded"
            return State.UNKNOWN, detail, f"fix {vendor.module_name} first"
        fix = "boot Linux 5.10 or newer; if this is one, report the output of: grep -i intercept /proc/kallsyms"
        return State.FAILED, f"kernel {machine.release} has none of {', '.join(known)} in /proc/kallsyms", fix
    wanted = layout.functions
    probed = [s.name for f in wanted for s in symbols.find(f)[:1]]
    own = (s for s in symbols.functions if s.name.startswith(vendor.prefix))
    others = {s.name for s in own if s.function in known and s.is_entry}
    detail = f"layout {layout.name} (kernels {layout.kernels}): {', '.join(probed)}"
    if unused := sorted(others.difference(probed)):
        detail += f"; not probed: {', '.join(unused)}"
    if not layout.calls:
        detail += "; calls per MSR are not observable in this kernel, only filter updates and their time"
        return State.WARNING, detail, "boot Linux 5.13 or newer to count calls"
    if missing := [f for f in wanted if not symbols.find(f)]:
        detail += f"; not found, so what they do is not counted: {', '.join(missing)}"
        return State.WARNING, detail, f"report the output of: grep -E '{'|'.join(missing)}' /proc/kallsyms"
    hidden = not any(symbol.address for symbol in symbols.functions)
    if hidden and not machine.missing:
        # kernel/ksyms_common.c: kptr_restrict 2 hides addresses from everybody, 0 and 1 require CAP_SYSLOG
        everybody = machine.text("/proc/sys/kernel/kptr_restrict", "") == "2"
        fix = "sudo sysctl -w kernel.kptr_restrict=1" if everybody else "grant CAP_SYSLOG (--cap-add SYSLOG)"
        return State.WARNING, f"{detail}; their addresses are hidden, so causes are unknown", fix
    return State.OK, detail + ("; their addresses are hidden from this user" if hidden else ""), None


def check_livepatch(machine: Machine) -> Found:
    """Livepatches and other modules that have copies of those functions."""
    detail, fix = describe(machine.symbols)
    return State.WARNING if fix else State.OK, detail, fix


def check_btf(machine: Machine) -> Found:
    """The types that locate the MSR bitmap of a vCPU."""
    layout = choose(machine.symbols)
    if layout is None:
        return State.UNKNOWN, "its types can be looked up once its functions are found", "fix symbols first"
    if not layout.calls:
        return State.OK, "not needed where calls are not observable", None
    directory, module, path = machine.at("/sys/kernel/btf"), machine.symbols.module, machine.symbols.vendor.bitmap
    try:
        offset = (Btf.of_module(module, directory) if module else Btf.of_kernel(directory)).nested_offset(path)
    except BtfError as error:
        fix = "boot a kernel with CONFIG_DEBUG_INFO_BTF=y and CONFIG_DEBUG_INFO_BTF_MODULES=y (Debian: 6.1 and newer)"
        return State.WARNING, f"{error}: calls are counted, but which were redundant is unknown", fix
    return State.OK, f"{'.'.join(member for _, member in path)} is at {offset:#x} in struct {path[0][0]}", None
