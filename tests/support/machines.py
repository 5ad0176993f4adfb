# SPDX-License-Identifier: GPL-2.0-or-later
"""Machines made of files, for checks to look at."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tracer.doctor.check import Check, State
from tracer.doctor.examination import examine
from tracer.kernel.machine import Machine

RELEASE = "6.1.0-56-amd64"


OTHERS = ["symbols", "exits", "livepatch", "library", "headers", "bcc", "btf"]
OTHERS += ["lockdown", "capabilities", "perf-event-paranoid", "bpf", "processes", "tracefs"]
NAMES = ["cpu", "kvm-intel", *OTHERS]
AMD_NAMES = ["cpu", "kvm-amd", *OTHERS]


EVERYTHING, BPF_AND_PERFMON, OF_DOCKER = 0x1FFFFFFFFFF, 0xC000000000, 0xA80425FB  # CapEff


OK, WARNING, FAILED, UNKNOWN = State.OK, State.WARNING, State.FAILED, State.UNKNOWN


MODPROBE = "sudo modprobe kvm_intel"
DISABLED = (
    "see why: sudo dmesg | grep -i -e kvm -e svm "
    "(if the BIOS has disabled it, enable SVM (AMD-V) in the firmware setup, then power off and on)"
)
MODPROBE_AMD = f"sudo modprobe kvm_amd; if that fails, {DISABLED}"


TOGGLE = ("vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr", "vmx_msr_filter_changed")
#: Of kvm, 6.1: what `--exits` probes.
EXITS = ("kvm_emulate_rdmsr", "kvm_emulate_wrmsr", "handle_fastpath_set_msr_irqoff", "kvm_msr_user_space")
PASS = ("set_msr_interception_bitmap", "svm_msr_filter_changed")


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
#: made up
KVM_AMD = {"vcpu_svm": ("msrpm", 0x1AF8)}


def kallsyms(
    *functions: str, address: int = 0xFFFFFFFFC0A81F30, module: str = "kvm_intel", exits: Sequence[str] = EXITS
) -> str:
    """The functions of KVM, and `exits`, unless there are none."""
    functions += tuple(exits) if functions else ()
    lines = ["ffffffff81000000 T _text" if address else "0000000000000000 T _text"]
    for index, function in enumerate(functions):
        home = "kvm" if function.startswith("kvm_") or function in exits else module
        lines.append(f"{address + 64 * index if address else 0:016x} t {function}\t[{home}]")
    return "\n".join(lines) + "\n"


def cpuinfo(vendor: str = "GenuineIntel", flags: str = "fpu vme vmx ept", model: str = "Xeon Gold 6338") -> str:
    cpu = f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: {model}\nflags\t\t: {flags}\n\n"
    return cpu + cpu.replace("processor\t: 0", "processor\t: 1")


def status(capabilities: int = EVERYTHING, seccomp: int = 0) -> str:
    return f"Name:\tpython3\nCapEff:\t{capabilities:016x}\nSeccomp:\t{seccomp}\nSeccomp_filters:\t{seccomp // 2}\n"


def amd_cpuinfo(flags: str = "fpu vme svm npt", vendor: str = "AuthenticAMD") -> str:
    return cpuinfo(vendor, flags, "AMD EPYC 7543")


@dataclass(frozen=True)
class Kind:
    """What differs between a host with an Intel CPU and one with an AMD CPU."""

    names: list[str]
    cpuinfo: str
    module: str
    parameters: dict[str, str]
    functions: tuple[str, ...]
    types: dict[str, tuple[str, int]]


INTEL = Kind(NAMES, cpuinfo(), "kvm_intel", {"nested": "Y", "enable_apicv": "N"}, TOGGLE, KVM)
AMD = Kind(AMD_NAMES, amd_cpuinfo(), "kvm_amd", {"nested": "1", "avic": "N", "vgif": "1"}, PASS, KVM_AMD)
#: On any x86 host: the modules of both vendors.
BOTH = "".join(f"kernel/arch/x86/kvm/kvm-{vendor}.ko: kernel/arch/x86/kvm/kvm.ko\n" for vendor in ("intel", "amd"))


class Host:
    """A good Debian 12 host with VMX (or SVM), kvm_intel (kvm_amd), headers and BCC, seen by root."""

    def __init__(self, root: Path, kind: Kind = INTEL) -> None:
        self.root, self.kind = root, kind
        self.site = root / "usr/lib/python3/dist-packages"
        self.machine = Machine(root, 0, RELEASE, {}, (str(root / "usr/bin"), str(self.site)), "/usr/bin/python3")
        self.write("proc/cpuinfo", kind.cpuinfo)
        self.write("proc/kallsyms", kallsyms(*kind.functions, module=kind.module))
        self.write("proc/cmdline", "BOOT_IMAGE=/vmlinuz root=/dev/sda1 ro quiet")
        self.write("proc/modules", f"{kind.module} 380928 0 - Live 0x0000000000000000\n")
        self.write("proc/self/status", status())
        self.write("proc/self/uid_map", "         0          0 4294967295\n")
        self.write("proc/self/mounts", "proc /proc proc rw 0 0\ntracefs /sys/kernel/tracing tracefs rw,nosuid 0 0\n")
        for sysctl, value in {"perf_event_paranoid": 3, "kptr_restrict": 0, "unprivileged_bpf_disabled": 2}.items():
            self.write(f"proc/sys/kernel/{sysctl}", f"{value}\n")
        self.write("proc/sys/kernel/ftrace_enabled", "1\n")
        self.write(f"sys/module/{kind.module}/initstate", "live\n")
        for parameter, setting in kind.parameters.items():
            self.write(f"sys/module/{kind.module}/parameters/{parameter}", f"{setting}\n")
        (root / "sys/class/misc/kvm").mkdir(parents=True)
        self.write("sys/kernel/btf/vmlinux", VMLINUX)
        self.write(f"sys/kernel/btf/{kind.module}", btf(kind.types, VMLINUX))
        self.write("sys/kernel/security/lockdown", "[none] integrity confidentiality\n")
        self.write("sys/kernel/debug/kprobes/enabled", "1\n")
        self.write("sys/bus/event_source/devices/kprobe/type", "6\n")
        self.write(f"lib/modules/{RELEASE}/modules.dep", BOTH)
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
        self.remove(f"sys/module/{self.kind.module}")
        self.remove(f"sys/kernel/btf/{self.kind.module}")
        self.remove("sys/class/misc/kvm")
        self.write("proc/modules", "")
        self.write("proc/kallsyms", kallsyms())

    def build_in(self, *, started: bool = True) -> None:
        """The modules of both vendors are part of the kernel image; if `started`, that of this CPU runs."""
        self.unload()
        image = ("vmx_vcpu_run", *TOGGLE, "svm_vcpu_run", *PASS)
        self.write("proc/kallsyms", "".join(f"ffffffff81{n:04x}30 t {f}\n" for n, f in enumerate(image)))
        for kind in (INTEL, AMD):  # whose parameters are there even if they did not start
            self.write(f"sys/module/{kind.module}/parameters/nested", "1\n")
        self.write(f"lib/modules/{RELEASE}/modules.dep")
        self.write(f"lib/modules/{RELEASE}/modules.builtin", BOTH.replace(": kernel/arch/x86/kvm/kvm.ko", ""))
        self.write("sys/kernel/btf/vmlinux", btf(self.kind.types))
        if started:
            (self.root / "sys/class/misc/kvm").mkdir(parents=True)

    def be(self, **facts: Any) -> None:
        self.machine = replace(self.machine, **facts)

    def check(self, name: str) -> Check:
        """The named check; the others must be well-formed."""
        checks = examine(self.machine)
        assert [check.name for check in checks] == self.kind.names
        for one in checks:
            assert one.detail
            assert "\n" not in one.detail + (one.fix or "")
            assert (one.fix is None) if one.state is OK else (one.fix or one.state is UNKNOWN)
        return next(one for one in checks if one.name == name)

    def found(self, name: str) -> tuple[State, str | None]:
        check = self.check(name)
        return check.state, check.fix
