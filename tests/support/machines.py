# SPDX-License-Identifier: GPL-2.0-or-later
"""Machines made of files, for checks to look at."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

from tracer.doctor.check import Check, State
from tracer.doctor.examination import examine
from tracer.kernel.machine import Machine

RELEASE = "6.1.0-56-amd64"


NAMES = ["cpu", "kvm-intel", "symbols", "livepatch", "library", "headers", "bcc", "btf"]
NAMES += ["lockdown", "capabilities", "perf-event-paranoid", "bpf", "tracefs"]


EVERYTHING, BPF_AND_PERFMON, OF_DOCKER = 0x1FFFFFFFFFF, 0xC000000000, 0xA80425FB  # CapEff


OK, WARNING, FAILED, UNKNOWN = State.OK, State.WARNING, State.FAILED, State.UNKNOWN


MODPROBE = "sudo modprobe kvm_intel"


TOGGLE = ("vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr", "vmx_msr_filter_changed")


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
