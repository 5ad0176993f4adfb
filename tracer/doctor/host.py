# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks of the CPU, the kernel and KVM. Facts are from the sources of Linux 5.10 to 7.3, cited at each check."""

from __future__ import annotations

from tracer.doctor.check import Found, State
from tracer.doctor.containers import UNMASK, in_container, on_host
from tracer.doctor.hypervisors import enable_nested
from tracer.kernel.btf import Btf, BtfError
from tracer.kernel.copies import describe
from tracer.kernel.layout import choose, places
from tracer.kernel.machine import Machine, search
from tracer.model.exits import EXIT_FUNCTIONS
from tracer.model.vendor import Vendor
from tracer.model.vendors import VENDORS

#: Of a check that needs the functions which check_symbols() finds.
_FIRST = "fix symbols first"
_BTF_MOUNT = "-v /sys/kernel/btf:/sys/kernel/btf:ro"
_NO_EXITS = "no exits: accesses that pass, that the virtual APIC serves, or that a guest's user space tries"


def check_cpu(machine: Machine) -> Found:
    """By its flag, which kernels clear where the firmware has disabled what it stands for; not all: check_module()."""
    cpu, vendor = machine.cpu, machine.vendor
    model = cpu.model or cpu.maker or "this CPU"
    if vendor.cpu_flag in cpu.flags:
        return State.OK, f"{model} has {vendor.cpu_feature}", None
    if cpu.maker not in vendor.makers:
        features = [one.cpu_feature for one in VENDORS]
        why = f"has neither {' nor '.join(features)}" if cpu.maker else "is not an x86 CPU"
        fix = f"run msrtrace on a host whose CPU has {' or '.join(features)}"
        return State.FAILED, f"{model} {why}; msrtrace traces {' and '.join(features)}", fix
    if "hypervisor" in cpu.flags:
        detail = f"{model} of a virtual machine, without nested {vendor.cpu_feature}"
        return State.FAILED, detail, enable_nested(machine, vendor)
    return State.FAILED, f"{model} has no {vendor.cpu_feature}, or the firmware has disabled it", vendor.firmware_fix


def check_module(machine: Machine) -> Found:
    """KVM's module for the vendor: loaded, loadable, built in or missing.

    One that is built in has a directory in /sys/module even if it did not start, but no initstate in it
    (kernel/params.c, kernel/module/sysfs.c); the device is registered last (kvm_init(), virt/kvm/kvm_main.c).
    """
    vendor, module = machine.vendor, machine.vendor.module
    directory = f"/sys/module/{module}"
    there, loadable = machine.at(directory).exists(), machine.at(f"{directory}/initstate").exists()
    if loadable or (there and machine.at("/sys/class/misc/kvm").exists()):
        values = ((name, machine.text(f"{directory}/parameters/{name}", "")) for name in vendor.parameters)
        state = "loaded" if loadable else "built in"
        return State.OK, " ".join([state, *(f"{name}={value}" for name, value in values if value)]), None
    if search(rf"^({module}) ", machine.text("/proc/modules", "")):
        hidden = f"{module} is loaded, but /sys/module does not show it here"
        return State.FAILED, hidden, UNMASK.format(path="/sys/module")
    return _check_missing_module(machine, there)


def _check_missing_module(machine: Machine, there: bool) -> Found:
    vendor, module, modules = machine.vendor, machine.vendor.module, f"/lib/modules/{machine.release}"
    built_in = there or f"/{vendor.module_file}" in machine.text(f"{modules}/modules.builtin", "")
    unlisted = machine.at("/proc/modules").exists() and not machine.at(modules).exists()  # in a container
    detail = f"{module} is built in but did not start" if built_in else f"{module} is not loaded"
    if check_cpu(machine)[0] is not State.OK:
        return State.FAILED, detail, "fix cpu first"
    if built_in:
        return State.FAILED, detail, _why_not_started(vendor)
    if unlisted or f"/{vendor.module_file}" in machine.text(f"{modules}/modules.dep", ""):
        fix = on_host(machine, f"sudo modprobe {module}")
        if vendor.flag_if_disabled:
            fix += f"; if that fails, {_why_not_started(vendor)}"
        return State.FAILED, detail, fix
    detail = f"kernel {machine.release} has no {module}, neither built in nor as a module"
    return State.FAILED, detail, f"boot a kernel that has {vendor.config_option}"


def _why_not_started(vendor: Vendor) -> str:
    fix = f"see why: sudo dmesg | grep -i -e kvm -e {vendor.name}"
    return fix + (f" (if the BIOS has disabled it, {vendor.firmware_fix})" if vendor.flag_if_disabled else "")


def check_symbols(machine: Machine) -> Found:
    """The functions to probe, and whether their addresses are visible."""
    symbols, layout, vendor = machine.symbols, choose(machine.symbols), machine.vendor
    known = list(dict.fromkeys(f for one in vendor.layouts for f in one.functions))
    if layout is None:
        return _without_functions(machine, known)
    wanted = layout.functions
    probed = [s.name for f in wanted for s in places(layout, symbols, f)[:1]]
    own = {f for one in vendor.layouts for f in (*one.calls, one.update)}
    others = {s.name for s in symbols.functions if s.function in own and s.is_entry}
    detail = f"layout {layout.name} (kernels {layout.kernels}): {', '.join(probed)}"
    if unused := sorted(others.difference(probed)):
        detail += f"; not probed: {', '.join(unused)}"
    if not layout.calls:
        detail += "; calls per MSR are not observable in this kernel, only filter updates and their time"
        [*_, oldest] = (one.kernels for one in vendor.layouts if one.calls)
        return State.WARNING, detail, f"boot Linux {oldest.partition('-')[0]} or newer to count calls"
    if missing := [f for f in wanted if not symbols.find(f)]:
        detail += f"; not found, so what they do is not counted: {', '.join(missing)}"
        return State.WARNING, detail, f"report the output of: grep -E '{'|'.join(missing)}' /proc/kallsyms"
    hidden = not any(symbol.address for symbol in symbols.functions)
    if hidden and not machine.missing:
        # kernel/ksyms_common.c: kptr_restrict 2 hides addresses from everybody, 0 and 1 require CAP_SYSLOG
        everybody = machine.text("/proc/sys/kernel/kptr_restrict", "") == "2"
        unhide = on_host(machine, "sudo sysctl -w kernel.kptr_restrict=1")
        fix = unhide if everybody else "grant CAP_SYSLOG (--cap-add SYSLOG)"
        return State.WARNING, f"{detail}; their addresses are hidden, so causes are unknown", fix
    return State.OK, detail + ("; their addresses are hidden from this user" if hidden else ""), None


def _without_functions(machine: Machine, known: list[str]) -> Found:
    """Why none of the known functions is found."""
    vendor = machine.vendor
    with machine.at("/proc/kallsyms").open("rb") as file:
        if not file.read(1):
            return State.FAILED, "/proc/kallsyms is empty: it is hidden here", UNMASK.format(path="/proc/kallsyms")
    if not machine.at(f"/sys/module/{vendor.module}").exists():
        detail = f"its functions can be looked up once {vendor.module} is loaded"
        return State.UNKNOWN, detail, f"fix {vendor.module_name} first"
    names = "grep -E 'intercept|msr_filter' /proc/kallsyms"
    fix = f"boot Linux 5.10 or newer; if this is one, report the output of: {names}"
    return State.FAILED, f"kernel {machine.release} has none of {', '.join(known)} in /proc/kallsyms", fix


def check_livepatch(machine: Machine) -> Found:
    """Livepatches and other modules that have copies of those functions."""
    detail, fix = describe(machine.symbols)
    return State.WARNING if fix else State.OK, detail, fix


def check_btf(machine: Machine) -> Found:
    """The types that locate the MSR bitmap of a vCPU, where calls do not say where it is."""
    layout = choose(machine.symbols)
    if layout is None:
        return State.UNKNOWN, "its types can be looked up once its functions are found", _FIRST
    if not layout.calls:
        return State.OK, "not needed where calls are not observable", None
    directory, module, path = machine.at("/sys/kernel/btf"), machine.symbols.module, machine.symbols.vendor.bitmap
    try:
        offset = (Btf.of_module(module, directory) if module else Btf.of_kernel(directory)).nested_offset(path)
    except BtfError as error:
        if in_container(machine) and not any(directory.glob("*")):
            lost = "what vCPUs intercept, exits" + ("" if layout.pass_ else " and which calls were redundant")
            return (
                State.WARNING,
                f"{directory} is hidden here: no fentry; unknown are {lost}",
                f"docker run {_BTF_MOUNT}",
            )
        if layout.pass_:
            detail = f"not needed: each call says where the bitmap is; but fentry cannot be used ({error})"
            return State.OK, detail, None
        fix = "boot a kernel with CONFIG_DEBUG_INFO_BTF=y and CONFIG_DEBUG_INFO_BTF_MODULES=y (Debian: 6.1 and newer)"
        return State.WARNING, f"{error}: calls are counted, but which were redundant is unknown", fix
    return State.OK, f"{'.'.join(member for _, member in path)} is at {offset:#x} in struct {path[0][0]}", None


def check_exits(machine: Machine) -> Found:
    """The functions that `--exits` probes. Which others tell exits apart is known when they are probed."""
    symbols, functions = machine.symbols, EXIT_FUNCTIONS
    if choose(symbols) is None:
        return State.UNKNOWN, "its functions can be looked up once those of symbols are found", _FIRST
    fast = next((name for name in functions.write_fast if symbols.find(name)), functions.write_fast[-1])
    wanted = (functions.read, functions.write, fast, functions.refused)
    missing = [function for function in wanted if not symbols.find(function)]
    probed = [function for function in (*wanted, *functions.immediate) if symbols.find(function)]
    detail = f"--exits probes {', '.join(probed) or 'nothing'}"
    if missing:
        detail += f"; not found, so what they do is not counted: {', '.join(missing)}"
        return State.WARNING, detail, f"report the output of: grep -E '{'|'.join(missing)}' /proc/kallsyms"
    return State.OK, f"{detail}; {_NO_EXITS}", None
