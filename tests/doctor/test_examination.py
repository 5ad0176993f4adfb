# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace doctor` on synthetic machines made of files: what it finds on each, and the fix that it names."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tracer.doctor.check import Check, State
from tracer.doctor.examination import examine, explain_eperm, obstacle
from tracer.doctor.output import as_json, as_text
from tracer.kernel.machine import Machine
from tracer.kernel.symbols import Symbols

RELEASE = "6.1.0-56-amd64"
NAMES = ["cpu", "kvm-intel", "symbols", "livepatch", "library", "headers", "bcc", "btf"]
NAMES += ["lockdown", "capabilities", "perf-event-paranoid", "bpf", "tracefs"]
EVERYTHING, BPF_AND_PERFMON, OF_DOCKER = 0x1FFFFFFFFFF, 0xC000000000, 0xA80425FB  # CapEff
OK, WARNING, FAILED, UNKNOWN = State.OK, State.WARNING, State.FAILED, State.UNKNOWN
MODPROBE = "sudo modprobe kvm_intel"
BOOT_KVM = "boot a kernel that has CONFIG_KVM_INTEL"

TOGGLE = ("vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr", "vmx_msr_filter_changed")
RECALC = ("vmx_set_intercept_for_msr", "vmx_recalc_intercepts", "kvm_vm_ioctl_set_msr_filter")


def btf(members: dict[str, tuple[str, int]], base: bytes = b"") -> bytes:
    """BTF of structures with one member each, by name and offset in bytes (Documentation/bpf/btf.rst).

    `base` is the BTF that a split one continues.
    """
    start = struct.unpack_from("<I", base, 20)[0] if base else 0
    strings, types = b"" if base else b"\0", b""
    for structure, (member, offset) in members.items():
        name, member_name = start + len(strings), start + len(strings) + len(structure) + 1
        strings += f"{structure}\0{member}\0".encode()
        types += struct.pack("<IIIIII", name, 4 << 24 | 1, 4096, member_name, 0, offset * 8)
    return struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings)) + types + strings


VMLINUX = btf({"kvm_vcpu": ("kvm", 0)})
#: 6.1.192: 0x1ab8 altogether (KERNEL.md, 1)
KVM = {"loaded_vmcs": ("msr_bitmap", 0x18), "vcpu_vmx": ("vmcs01", 0x1AA0)}


def kallsyms(*functions: str, address: int = 0xFFFFFFFFC0A81F30) -> str:
    lines = ["ffffffff81000000 T _text" if address else "0000000000000000 T _text"]
    for index, function in enumerate(functions):
        module = "kvm" if function.startswith("kvm_") else "kvm_intel"
        lines.append(f"{address + 64 * index if address else 0:016x} t {function}\t[{module}]")
    return "\n".join(lines) + "\n"


def cpuinfo(vendor: str = "GenuineIntel", flags: str = "fpu vme vmx ept", model: str = "Xeon Gold 6338") -> str:
    cpu = f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: {model}\nflags\t\t: {flags}\n\n"
    return cpu + cpu.replace("processor\t: 0", "processor\t: 1")


def status(capabilities: int = EVERYTHING, seccomp: int = 0) -> str:
    return f"Name:\tpython3\nCapEff:\t{capabilities:016x}\nSeccomp:\t{seccomp}\nSeccomp_filters:\t{seccomp // 2}\n"


class Host:
    """A good Debian 12 host with an Intel CPU, VMX, kvm_intel, headers and BCC, seen by root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.site = root / "usr/lib/python3/dist-packages"
        self.machine = Machine(root, 0, RELEASE, {}, (str(root / "usr/bin"), str(self.site)), "/usr/bin/python3")
        self.write("proc/cpuinfo", cpuinfo())
        self.write("proc/kallsyms", kallsyms(*TOGGLE))
        self.write("proc/cmdline", "BOOT_IMAGE=/vmlinuz root=/dev/sda1 ro quiet")
        self.write("proc/modules", "kvm_intel 380928 0 - Live 0x0000000000000000\n")
        self.write("proc/self/status", status())
        self.write("proc/self/uid_map", "         0          0 4294967295\n")
        self.write("proc/self/mounts", "proc /proc proc rw 0 0\ntracefs /sys/kernel/tracing tracefs rw,nosuid 0 0\n")
        for sysctl, value in {"perf_event_paranoid": 3, "kptr_restrict": 0, "unprivileged_bpf_disabled": 2}.items():
            self.write(f"proc/sys/kernel/{sysctl}", f"{value}\n")
        self.write("proc/sys/kernel/ftrace_enabled", "1\n")
        self.write("sys/module/kvm_intel/parameters/nested", "Y\n")
        self.write("sys/module/kvm_intel/parameters/enable_apicv", "N\n")
        self.write("sys/kernel/btf/vmlinux", VMLINUX)
        self.write("sys/kernel/btf/kvm_intel", btf(KVM, VMLINUX))
        self.write("sys/kernel/security/lockdown", "[none] integrity confidentiality\n")
        self.write("sys/kernel/debug/kprobes/enabled", "1\n")
        self.write("sys/bus/event_source/devices/kprobe/type", "6\n")
        self.write(
            f"lib/modules/{RELEASE}/modules.dep", "kernel/arch/x86/kvm/kvm-intel.ko: kernel/arch/x86/kvm/kvm.ko\n"
        )
        self.write(f"lib/modules/{RELEASE}/modules.builtin", "kernel/fs/ext4/ext4.ko\n")
        for link, tree, file in (
            ("build", f"linux-headers-{RELEASE}", "include/generated/autoconf.h"),
            ("source", "linux-headers-6.1.0-56-common", "include/linux/kconfig.h"),
        ):
            self.write(f"usr/src/{tree}/{file}")
            (root / f"lib/modules/{RELEASE}/{link}").symlink_to(root / f"usr/src/{tree}")
        self.write("etc/os-release", 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\n')
        self.write("etc/ld.so.cache", b"glibc-ld.so.cache1.1\0libbcc.so.0\0/lib/libbcc.so.0\0")
        self.package("from .libbcc import lib\n\n\nclass BPF(object):\n    pass\n")

    def write(self, path: str, content: str | bytes = "") -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    def remove(self, path: str) -> None:
        top = self.root / path
        for file in sorted(top.rglob("*"), reverse=True) if top.is_dir() and not top.is_symlink() else []:
            file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
        top.rmdir() if top.is_dir() and not top.is_symlink() else top.unlink()

    def package(self, init: str, version: str = "0.26.0", site: str = "usr/lib/python3/dist-packages") -> None:
        self.write(f"{site}/bcc/__init__.py", init)
        self.write(f"{site}/bcc/version.py", f"__version__ = '{version}'\n")
        self.write(f"{site}/bcc/libbcc.py", 'import ctypes as ct\nlib = ct.CDLL("libbcc.so.0", use_errno=True)\n')

    def unload(self) -> None:
        self.remove("sys/module/kvm_intel")
        self.remove("sys/kernel/btf/kvm_intel")
        self.write("proc/kallsyms", kallsyms())

    def be(self, **facts: Any) -> None:
        self.machine = replace(self.machine, **facts)

    def check(self, name: str) -> Check:
        """The named check; the others must be well-formed."""
        checks = examine(self.machine)
        assert [check.name for check in checks] == NAMES
        for one in checks:
            assert one.detail
            assert "\n" not in one.detail + (one.fix or "")
            assert (one.fix is None) if one.state is OK else (one.fix or one.state is UNKNOWN)
        return next(one for one in checks if one.name == name)

    def found(self, name: str) -> tuple[State, str | None]:
        check = self.check(name)
        return check.state, check.fix


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


# --- the whole ---


def test_a_good_host_needs_no_fix(host: Host) -> None:
    assert [(c.name, c.state, c.fix) for c in examine(host.machine)] == [(name, OK, None) for name in NAMES]
    assert obstacle(host.machine) is None
    assert {c.name: c.detail for c in examine(host.machine)} == {
        "cpu": "Xeon Gold 6338 has VMX",
        "kvm-intel": "loaded nested=Y enable_apicv=N",
        "symbols": f"layout toggle (kernels 5.13-6.16): {', '.join(TOGGLE)}",
        "livepatch": "no livepatch or other module has a function that msrtrace probes",
        "library": "libbcc.so.0",
        "headers": f"/lib/modules/{RELEASE}/build",
        "bcc": f"0.26.0 in {host.site}/bcc",
        "btf": "vmcs01.msr_bitmap is at 0x1ab8 in struct vcpu_vmx",
        "lockdown": "none",
        "capabilities": "CAP_SYS_ADMIN",
        "perf-event-paranoid": "3, which does not affect root",
        "bpf": "the kernel has BPF and kprobes",
        "tracefs": "mounted at /sys/kernel/tracing",
    }


def _garbage(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\0[:=\n1 2\n" * 3)


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _absent(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("spoil", [_garbage, _empty, _directory, _absent])
def test_no_damaged_file_makes_it_raise(host: Host, spoil: Callable[[Path], None]) -> None:
    for file in [f for f in host.root.rglob("*") if f.is_file() and not f.is_symlink()]:
        before = file.read_bytes()
        spoil(file)
        host.check("cpu")
        explain_eperm(host.machine)
        obstacle(host.machine)
        as_json(examine(host.machine), host.machine)
        if file.is_dir():
            file.rmdir()
        file.write_bytes(before)
    assert obstacle(host.machine) is None


def test_what_an_empty_machine_cannot_show_is_unknown(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "nothing", 1000, RELEASE)
    states = {check.name: check.state for check in examine(machine)}
    assert [name for name in NAMES if states[name] is UNKNOWN] == [
        "cpu",
        "symbols",
        "livepatch",
        "btf",
        "capabilities",
        "perf-event-paranoid",
    ]
    checks = {check.name: check for check in examine(machine)}
    assert checks["cpu"].detail == f"cannot read {tmp_path}/nothing/proc/cpuinfo: No such file or directory"
    assert checks["cpu"].fix == "sudo msrtrace doctor"


def test_symbols_are_read_once_before_tracing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Mock(wraps=Symbols.read)
    monkeypatch.setattr(Symbols, "read", read)
    assert obstacle(host.machine) is None
    assert host.machine.symbols.find("vmx_msr_filter_changed")
    assert read.call_count == 1
    host.remove("proc/kallsyms")
    unknown = {check.name for check in examine(host.machine) if check.state is UNKNOWN}
    assert unknown == {"symbols", "livepatch", "btf"}  # read again


def test_the_checks_import_neither_bcc_nor_click() -> None:
    code = (
        "import sys\nfrom tracer.doctor.examination import *\nfrom tracer.doctor.output import *\n"
        "machine = Machine.here()\nchecks = examine(machine)\n"
        "obstacle(machine), explain_eperm(machine), as_text(checks), as_json(checks, machine)\n"
        "assert not {'bcc', 'click'} & set(sys.modules)\nprint(*(check.name for check in checks))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout.split()) == (0, "", NAMES)


# --- cpu ---


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


# --- kvm-intel ---


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


# --- symbols ---


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
    assert check.detail == (
        f"kernel {RELEASE} has none of vmx_set_intercept_for_msr, vmx_recalc_intercepts, kvm_vm_ioctl_set_msr_filter, "
        "vmx_recalc_msr_intercepts, vmx_enable_intercept_for_msr, vmx_disable_intercept_for_msr, "
        "vmx_msr_filter_changed in /proc/kallsyms"
    )
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


# --- livepatch ---

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


# --- headers ---


@pytest.mark.parametrize(
    ("os_release", "release", "fix"),
    [
        ("ID=debian", RELEASE, f"sudo apt-get install linux-headers-{RELEASE}"),
        ("ID=ubuntu\nID_LIKE=debian", "6.8.0-45-generic", "sudo apt-get install linux-headers-6.8.0-45-generic"),
        ("ID=debian", "6.12.117+deb13-amd64", "sudo apt-get install linux-headers-6.12.117+deb13-amd64"),
        ("ID=debian", "6.8.12-4-pve", "sudo apt-get install proxmox-headers-6.8.12-4-pve"),
        ("ID=fedora", "6.11.4-301.fc41.x86_64", "sudo dnf install kernel-devel-6.11.4-301.fc41.x86_64"),
        (
            'ID="rhel"\nID_LIKE="fedora"',
            "5.14.0-427.13.1.el9_4.x86_64+rt",
            "sudo dnf install kernel-rt-devel-5.14.0-427.13.1.el9_4.x86_64",
        ),
        (
            'ID="rocky"\nID_LIKE="rhel centos fedora"',
            "5.14.0-427.el9.x86_64",
            "sudo dnf install kernel-devel-5.14.0-427.el9.x86_64",
        ),
        (
            'ID="ol"\nID_LIKE="fedora"',
            "5.15.0-206.153.7.el9uek.x86_64",
            "sudo dnf install kernel-uek-devel-5.15.0-206.153.7.el9uek.x86_64",
        ),
        ("ID=arch", "6.11.5-arch1-1", "sudo pacman -S linux-headers"),
        ("ID=arch", "6.6.63-1-lts", "sudo pacman -S linux-lts-headers"),
        (
            'ID="opensuse-leap"\nID_LIKE="suse opensuse"',
            "6.4.0-150600.23-default",
            "sudo zypper install kernel-default-devel",
        ),
        ('ID="opensuse-tumbleweed"', "6.11.3-1-default", "sudo zypper install kernel-default-devel"),
        ("ID=alpine", "6.6.58-0-lts", "sudo apk add linux-lts-dev"),
        ("ID=nixos", "6.6.58", "install the headers of kernel 6.6.58, or set BCC_KERNEL_SOURCE to them"),
    ],
)
def test_no_headers(host: Host, os_release: str, release: str, fix: str) -> None:
    host.remove("usr/src")
    host.write("etc/os-release", f'NAME="some"\n{os_release}\nVERSION_ID="1"\n')
    host.be(release=release)
    for link in ("build", "source"):
        host.remove(f"lib/modules/{RELEASE}/{link}")
    detail = (
        "no kernel headers, which BCC needs to compile (this msrtrace came without the compiled BPF program): "
        f"/lib/modules/{release}/build/include/linux/kconfig.h does not exist"
    )
    assert host.check("headers") == Check("headers", FAILED, detail, fix)
    assert obstacle(host.machine) == f"{detail}: {fix}"


def test_headers_in_one_tree(host: Host) -> None:
    host.remove(f"lib/modules/{RELEASE}/source")
    host.write(f"usr/src/linux-headers-{RELEASE}/include/linux/kconfig.h")
    assert host.found("headers") == (OK, None)


@pytest.mark.parametrize("lost", [f"usr/src/linux-headers-{RELEASE}", "usr/src/linux-headers-6.1.0-56-common"])
def test_half_of_the_headers(host: Host, lost: str) -> None:
    host.remove(lost)
    assert host.found("headers") == (FAILED, f"sudo apt-get install linux-headers-{RELEASE}")


def test_headers_of_another_kernel_will_do(host: Host) -> None:
    host.remove(f"lib/modules/{RELEASE}/build")
    assert host.found("headers") == (OK, None)
    assert host.check("headers").detail.endswith(f"linux-headers-{RELEASE}: those of another kernel, which will do")


def test_where_the_program_is_compiled_nothing_that_compiles_is_needed(host: Host) -> None:
    host.remove(f"lib/modules/{RELEASE}")
    host.remove("usr/src")
    host.remove("usr/lib/python3/dist-packages/bcc")
    assert {host.found(name)[0] for name in ("headers", "bcc")} == {FAILED}
    host.be(compiled=True)
    assert {host.found(name)[0] for name in ("headers", "bcc")} == {OK}
    assert obstacle(host.machine) is None


def test_no_headers_in_a_container(host: Host) -> None:
    host.remove("usr/src")
    host.remove(f"lib/modules/{RELEASE}")
    host.write(".dockerenv")
    check = host.check("headers")
    assert (check.state, check.fix) == (FAILED, f"sudo apt-get install linux-headers-{RELEASE}")
    assert "-v /lib/modules:/lib/modules:ro -v /usr/src:/usr/src:ro" in check.detail


def test_headers_that_the_kernel_carries(host: Host) -> None:
    host.remove("usr/src")
    host.remove(f"lib/modules/{RELEASE}/build")
    host.write("sys/kernel/kheaders.tar.xz")
    assert host.found("headers") == (OK, None)
    host.remove("sys/kernel/kheaders.tar.xz")
    host.write(f"lib/modules/{RELEASE}/modules.dep", "kernel/kernel/kheaders.ko.zst:\n")
    assert host.found("headers") == (OK, None)


def test_headers_that_the_kernel_carries_do_not_complete_a_tree(host: Host) -> None:
    host.write("sys/kernel/kheaders.tar.xz")
    host.remove(f"usr/src/linux-headers-{RELEASE}/include/generated/autoconf.h")
    assert host.found("headers") == (FAILED, f"sudo apt-get install linux-headers-{RELEASE}")


def test_headers_elsewhere(host: Host) -> None:
    host.be(environ={"BCC_KERNEL_SOURCE": "/opt/linux"})
    check = host.check("headers")
    assert (check.state, check.fix) == (FAILED, "unset BCC_KERNEL_SOURCE")
    assert check.detail == "BCC_KERNEL_SOURCE is set, but there is no /opt/linux/include/linux/kconfig.h"
    host.write("opt/linux/include/generated/autoconf.h")
    assert host.found("headers") == (FAILED, "unset BCC_KERNEL_SOURCE")
    host.write("opt/linux/include/linux/kconfig.h")
    assert host.found("headers") == (OK, None)


# --- bcc ---


@pytest.mark.parametrize(
    ("os_release", "fix"),
    [
        ("ID=debian", "sudo apt-get install python3-bpfcc"),
        ("ID=ubuntu\nID_LIKE=debian", "sudo apt-get install python3-bpfcc"),
        ("ID=fedora", "sudo dnf install python3-bcc"),
        ('ID="almalinux"\nID_LIKE="rhel centos fedora"', "sudo dnf install python3-bcc"),
        ("ID=arch", "sudo pacman -S python-bcc"),
        ('ID="sles"\nID_LIKE="suse"', "sudo zypper install python3-bcc"),
        ("ID=alpine", "sudo apk add py3-bcc"),
        ("ID=plan9", "install BCC's Python module with the system's package manager"),
    ],
)
def test_no_bcc(host: Host, os_release: str, fix: str) -> None:
    host.write("etc/os-release", os_release)
    host.remove("usr/lib/python3/dist-packages/bcc")
    detail = (
        "BCC is not installed (this msrtrace came without the compiled BPF program; PyPI's bcc is an unrelated package)"
    )
    assert host.check("bcc") == Check("bcc", FAILED, detail, fix)
    assert obstacle(host.machine) == f"{detail}: {fix}"


def test_bcc_of_pypi(host: Host) -> None:
    host.package("__author__ = 'Will Sheffler'\n__version__ = '0.1.10'\nfrom .bcc import *\n", site="venv/lib")
    python = "/srv/venv/bin/python3"
    host.be(python_path=(f"{host.root}/venv/lib", *host.machine.python_path), python=python)
    check = host.check("bcc")
    assert check.detail == f"{host.root}/venv/lib/bcc is not BCC but PyPI's unrelated package bcc (it has no BPF)"
    assert (check.state, check.fix) == (
        FAILED,
        f"{python} -m pip uninstall bcc && sudo apt-get install python3-bpfcc",
    )


@pytest.mark.parametrize(("file", "shown"), [("bcc/__init__.py", "bcc"), ("bcc.py", "bcc.py")])
def test_bcc_in_the_working_directory(host: Host, file: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host.write(f"work/{file}", "import sys\n")
    monkeypatch.chdir(host.root / "work")
    host.be(python_path=("", *host.machine.python_path))
    check = host.check("bcc")
    assert check.detail == f"{host.root}/work/{shown} in the working directory hides BCC"
    assert (check.state, check.fix) == (FAILED, "start msrtrace elsewhere: cd /")


def test_directory_named_bcc_without_a_module_hides_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.write("work/bcc/README.md")
    monkeypatch.chdir(host.root / "work")
    host.be(python_path=("", *host.machine.python_path))
    assert host.found("bcc") == (OK, None)
    host.be(python_path=("",))
    assert host.check("bcc").state is FAILED


def test_virtual_environment_without_system_packages(host: Host) -> None:
    host.be(python_path=("/nowhere",), python="/srv/venv/bin/python3", venv="/srv/venv")
    check = host.check("bcc")
    assert check.detail == "BCC is installed for /usr/bin/python3, but /srv/venv/bin/python3 does not find it"
    assert (check.state, check.fix) == (
        FAILED,
        "/usr/bin/python3 -m venv --clear --system-site-packages /srv/venv, then install msrtrace there",
    )


def test_no_library(host: Host) -> None:
    host.write("etc/ld.so.cache", b"glibc-ld.so.cache1.1\0libc.so.6\0")
    check = host.check("library")
    assert check.detail == "BCC's library, which attaches probes, is missing (libbcc_bpf.so.0 and libbcc.so.0)"
    assert (check.state, check.fix) == (FAILED, "sudo apt-get install libbpfcc")
    host.be(environ={"LD_LIBRARY_PATH": "/opt/bcc/lib"})
    assert host.found("library") == (OK, None)


# --- btf ---


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


# --- lockdown, capabilities, perf-event-paranoid ---

CONFIDENTIAL = "the kernel is locked down (confidentiality), which forbids kprobes even for root"


def test_lockdown_by_the_command_line(host: Host) -> None:
    host.write("sys/kernel/security/lockdown", "none integrity [confidentiality]\n")
    host.write("proc/cmdline", "ro lockdown=confidentiality quiet\n")
    fix = "remove lockdown=confidentiality from the kernel command line, and reboot"
    assert host.check("lockdown") == Check("lockdown", FAILED, CONFIDENTIAL, fix)
    assert obstacle(host.machine) == f"{CONFIDENTIAL}: {fix}"
    assert explain_eperm(host.machine) == f"the kernel refused: {CONFIDENTIAL}: {fix}"


def test_lockdown_by_something_else(host: Host) -> None:
    host.write("sys/kernel/security/lockdown", "none integrity [confidentiality]\n")
    assert host.found("lockdown") == (
        FAILED,
        "remove lockdown=confidentiality from what writes it to /sys/kernel/security/lockdown, "
        "or from the kernel's config, and reboot",
    )


def test_lockdown_for_integrity_permits_kprobes(host: Host) -> None:
    host.write("sys/kernel/security/lockdown", "none [integrity] confidentiality\n")
    check = host.check("lockdown")
    assert (check.state, check.detail) == (OK, "integrity, which permits kprobes and BPF")


def test_securityfs_not_mounted(host: Host) -> None:
    host.remove("sys/kernel/security/lockdown")
    assert host.found("lockdown") == (OK, None)
    host.write("proc/cmdline", "lockdown=confidentiality")
    assert host.found("lockdown") == (UNKNOWN, "sudo mount -t securityfs securityfs /sys/kernel/security")


def test_not_root(host: Host) -> None:
    host.write("proc/self/status", status(0))
    host.be(euid=1000)
    assert host.check("capabilities").detail == "not root, and without CAP_BPF and CAP_PERFMON"
    assert host.found("capabilities") == (FAILED, "sudo msrtrace run")
    assert host.found("perf-event-paranoid") == (OK, None)
    assert obstacle(host.machine) == "not root, and without CAP_BPF and CAP_PERFMON: sudo msrtrace run"
    host.be(venv="/srv/venv")
    assert host.found("capabilities") == (FAILED, "sudo /srv/venv/bin/msrtrace run")


def test_one_capability_missing(host: Host) -> None:
    host.write("proc/self/status", status(1 << 39))
    host.be(euid=1000)
    assert host.check("capabilities").detail == "not root, and without CAP_PERFMON"


def test_root_of_a_container(host: Host) -> None:
    host.write("proc/self/status", status(OF_DOCKER, seccomp=2))
    fix = "docker run --cap-add BPF --cap-add PERFMON --cap-add SYSLOG (systemd: CapabilityBoundingSet=)"
    assert host.found("capabilities") == (FAILED, fix)
    assert explain_eperm(host.machine).endswith(fix)


def test_sys_admin_stands_for_both(host: Host) -> None:
    host.write("proc/self/status", status(OF_DOCKER | 1 << 21))
    assert host.check("capabilities") == Check("capabilities", OK, "CAP_SYS_ADMIN")
    assert obstacle(host.machine) is None


def test_root_of_a_user_namespace(host: Host) -> None:
    host.write("proc/self/uid_map", "0 1000 1\n1 100000 65536\n")
    assert host.found("capabilities") == (FAILED, "as root of the host: sudo msrtrace run")


def test_two_capabilities_are_enough_where_perf_is_not_paranoid(host: Host) -> None:
    host.write("proc/self/status", status(BPF_AND_PERFMON))
    host.write("proc/sys/kernel/perf_event_paranoid", "2\n")
    host.be(euid=1000)
    assert host.check("capabilities").detail == "CAP_BPF and CAP_PERFMON"
    assert obstacle(host.machine) is None


@pytest.mark.parametrize(("distribution", "state"), [("debian", FAILED), ("fedora", WARNING)])
def test_paranoid_kernel(host: Host, distribution: str, state: State) -> None:
    host.write("proc/self/status", status(BPF_AND_PERFMON))
    host.write("etc/os-release", f"ID={distribution}\n")
    host.be(euid=1000)
    fix = "sudo sysctl -w kernel.perf_event_paranoid=2"
    assert host.found("perf-event-paranoid") == (state, fix)
    assert explain_eperm(host.machine).endswith(fix)


# --- bpf, tracefs ---


@pytest.mark.parametrize(
    ("lost", "what"),
    [
        ("proc/sys/kernel/unprivileged_bpf_disabled", "BPF (CONFIG_BPF_SYSCALL)"),
        ("sys/bus/event_source/devices/kprobe", "kprobes (CONFIG_KPROBE_EVENTS)"),
    ],
)
def test_kernel_without_bpf_or_kprobes(host: Host, lost: str, what: str) -> None:
    host.remove(lost)
    expected = Check("bpf", FAILED, f"kernel {RELEASE} has no {what}", "boot a kernel that has it")
    assert host.check("bpf") == expected


def test_silenced_probes(host: Host) -> None:
    host.write("sys/kernel/debug/kprobes/enabled", "0\n")
    assert host.found("tracefs") == (FAILED, "echo 1 | sudo tee /sys/kernel/debug/kprobes/enabled")
    host.write("proc/sys/kernel/ftrace_enabled", "0\n")
    assert host.found("tracefs") == (FAILED, "sudo sysctl -w kernel.ftrace_enabled=1")


def test_kprobes_switch_that_cannot_be_read(host: Host) -> None:
    host.remove("sys/kernel/debug/kprobes/enabled")
    check = host.check("tracefs")
    assert check.state is OK
    assert check.detail == "mounted at /sys/kernel/tracing; /sys/kernel/debug/kprobes/enabled cannot be read here"


def test_tracefs_not_mounted(host: Host) -> None:
    host.write("proc/self/mounts", "proc /proc proc rw 0 0\n")
    assert host.found("tracefs") == (WARNING, "sudo mount -t tracefs tracefs /sys/kernel/tracing")
    assert obstacle(host.machine) is None


# --- EPERM, text, JSON ---


def test_eperm_by_seccomp(host: Host) -> None:
    host.write("proc/self/status", status(seccomp=2))
    assert explain_eperm(host.machine) == (
        "the kernel refused: probably the seccomp filter of the container or service: allow bpf and perf_event_open "
        "(docker run --security-opt seccomp=unconfined, SystemCallFilter=)"
    )


def test_eperm_by_something_unknown(host: Host) -> None:
    assert explain_eperm(host.machine) == (
        "the kernel refused: probably SELinux or another security module: see sudo dmesg and "
        "sudo ausearch -m avc -ts recent"
    )


CHECKS = [
    Check("cpu", OK, "has VMX"),
    Check("kvm-intel", FAILED, "not loaded", MODPROBE),
    Check("btf", UNKNOWN, "not yet", "fix kvm-intel first"),
    Check("tracefs", WARNING, "not mounted", "mount it"),
]


def test_each_fix_is_below_its_check() -> None:
    assert as_text(CHECKS) == (
        "ok       cpu        has VMX\n"
        "FAILED   kvm-intel  not loaded\n"
        "                    -> sudo modprobe kvm_intel\n"
        "unknown  btf        not yet\n"
        "                    -> fix kvm-intel first\n"
        "warning  tracefs    not mounted\n"
        "                    -> mount it\n"
        "\n"
        "1 to fix before msrtrace can trace here"
    )
    assert as_text(CHECKS[:1]).endswith("\n\nnothing found that prevents tracing here")
    assert as_text([]) == "\nnothing found that prevents tracing here"


def test_colors_change_nothing_else() -> None:
    colored = as_text(CHECKS, color=True)
    assert "\x1b[1;31mFAILED \x1b[0m  kvm-intel  not loaded" in colored
    for code in ("\x1b[32m", "\x1b[33m", "\x1b[36m", "\x1b[1;31m", "\x1b[0m"):
        colored = colored.replace(code, "")
    assert colored == as_text(CHECKS)


def test_the_json_of_checks(host: Host) -> None:
    assert as_json(CHECKS[:2], host.machine) == (
        '{\n  "schema": "msrtrace-doctor/1",\n  "kernel": "6.1.0-56-amd64",\n  "layout": "toggle",\n  "ok": false,\n'
        '  "checks": [\n    {\n      "name": "cpu",\n      "state": "ok",\n      "detail": "has VMX",\n'
        '      "fix": null\n    },\n    {\n      "name": "kvm-intel",\n      "state": "failed",\n'
        '      "detail": "not loaded",\n      "fix": "sudo modprobe kvm_intel"\n    }\n  ]\n}'
    )


def test_the_json_names_kernel_and_layout(host: Host) -> None:
    document = json.loads(as_json(examine(host.machine), host.machine))
    assert list(document) == ["schema", "kernel", "layout", "ok", "checks"]
    assert (document["ok"], [check["name"] for check in document["checks"]]) == (True, NAMES)
    host.unload()
    document = json.loads(as_json(examine(host.machine), host.machine))
    assert (document["ok"], document["layout"]) == (False, None)
