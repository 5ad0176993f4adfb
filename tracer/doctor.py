# SPDX-License-Identifier: GPL-2.0-or-later
"""What msrtrace needs of a machine: found or not, and the exact step that mends it.

Facts are read from files below `Machine.root`, so a test describes a machine as a directory. BCC is looked for but not
imported: that loads LLVM, half a second and 100 MB. Sources of facts are Linux 5.10 to 7.2, cited at each check.
"""

from __future__ import annotations

import enum
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.machinery import PathFinder
from pathlib import Path

from tracer.btf import Btf, BtfError
from tracer.copies import describe
from tracer.errors import MsrtraceError
from tracer.layout import LAYOUTS, choose
from tracer.symbols import Symbols

SCHEMA = "msrtrace-doctor/1"
_Found = tuple["State", str, str | None]  # what a check finds: its state, detail and fix

# include/uapi/linux/capability.h; CAP_SYS_ADMIN stands for the two, which were split off it in 5.8.
_SYS_ADMIN, _NEEDED = 21, {39: "CAP_BPF", 38: "CAP_PERFMON"}

# By ID or ID_LIKE of os-release(5): the headers of the running kernel, BCC for the system's Python, and BCC's library,
# which comes along with that.
_PACKAGES = {
    "debian": ("sudo apt-get install {headers}", "sudo apt-get install python3-bpfcc", "sudo apt-get install libbpfcc"),
    "fedora": ("sudo dnf install {devel}", "sudo dnf install python3-bcc", "sudo dnf install bcc"),
    "arch": ("sudo pacman -S linux{flavour}-headers", "sudo pacman -S python-bcc", "sudo pacman -S bcc"),
    "suse": (
        "sudo zypper install kernel{flavour}-devel",
        "sudo zypper install python3-bcc",
        "sudo zypper install libbcc0",
    ),
    "alpine": ("sudo apk add linux{flavour}-dev", "sudo apk add py3-bcc", "sudo apk add bcc"),
}


class State(enum.Enum):
    """How a check ended: FAILED prevents tracing, WARNING costs a part of the result."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Check:
    """One requirement. `detail` and `fix` are one line each; `fix` is None where there is nothing to do."""

    name: str
    state: State
    detail: str
    fix: str | None = None


@dataclass(frozen=True)
class Machine:
    """The files of a machine below `root`, and of a process: `python_path` is sys.path, `venv` sys.prefix if in one."""

    root: Path = Path("/")
    euid: int = 0
    release: str = ""
    environ: Mapping[str, str] = field(default_factory=dict)
    python_path: tuple[str, ...] = ()
    python: str = "python3"
    venv: str | None = None

    @classmethod
    def here(cls) -> Machine:
        """This machine and this process."""
        venv = sys.prefix if sys.prefix != sys.base_prefix else None
        return cls(Path("/"), os.geteuid(), os.uname().release, os.environ, tuple(sys.path), sys.executable, venv)

    @property
    def command(self) -> str:
        """How root starts this msrtrace: sudo does not search a virtual environment."""
        return f"sudo {self.venv}/bin/msrtrace" if self.venv else "sudo msrtrace"

    def at(self, path: str) -> Path:
        """The absolute PATH, as found below `root`."""
        return self.root / path.lstrip("/")

    def text(self, path: str, otherwise: str | None = None) -> str:
        """What the file at PATH holds; where it cannot be read OTHERWISE, if given, else OSError is raised."""
        try:
            return self.at(path).read_bytes().decode(errors="replace").strip()
        except OSError:
            if otherwise is None:
                raise
            return otherwise

    @cached_property
    def symbols(self) -> Symbols:
        """The functions of the running kernel. Raises MsrtraceError."""
        return Symbols.read(self.at("/proc/kallsyms"), self.at("/sys/kernel/livepatch"))

    def capable(self, capability: int) -> bool:
        """Whether this process has CAPABILITY (CapEff in proc(5)). Raises OSError."""
        return bool(int(_search(r"^CapEff:\s*(\w+)", self.text("/proc/self/status")), 16) >> capability & 1)

    @cached_property
    def missing(self) -> str:
        """The capabilities that tracing needs and this process lacks."""
        return " and ".join(_NEEDED[c] for c in _NEEDED if not self.capable(c) and not self.capable(_SYS_ADMIN))

    @cached_property
    def distribution(self) -> str:
        """The key of _PACKAGES that fits /etc/os-release, or ""."""
        release = self.text("/etc/os-release", "").replace("opensuse", "suse")
        ids = f"{_search(r'^ID=(.*)', release)} {_search(r'^ID_LIKE=(.*)', release)}"
        return next((name for name in re.findall(r"\w+", ids) if name in _PACKAGES), "")

    def package(self, which: int) -> str:
        """The command that installs the headers (0), BCC (1) or its library alone (2), or ""."""
        # Proxmox VE: 6.8.12-4-pve, on Debian. RHEL: 5.14.0-427.el9.x86_64+rt. Arch: 6.6.63-1-lts.
        (base, _, variant), last = self.release.partition("+"), self.release.rpartition("-")[2]
        variant = f"-{variant}" if variant else "-uek" if "uek" in base else ""
        return _PACKAGES.get(self.distribution, ("", "", ""))[which].format(
            headers=f"{'proxmox' if last == 'pve' else 'linux'}-headers-{self.release}",
            devel=f"kernel{variant}-devel-{base}",
            flavour=f"-{last}" if last.isalpha() else "",
        )


def examine(machine: Machine) -> list[Check]:
    """Every check, in the order in which a user would mend them. Never raises."""
    return list(_checked(replace(machine)))  # a copy: what it keeps of what it has read is for this examination alone


def obstacle(machine: Machine, ignore: Collection[str] = ()) -> str | None:
    """What prevents tracing first, as one line "what is wrong: what to do", or None. IGNORE names checks to skip.

    MACHINE keeps the symbols that were read, which takes 0.1 s, for the tracing that comes next. BTF prevents nothing.
    """
    failed = (check for check in _checked(machine, ("btf", *ignore)) if check.state is State.FAILED)
    return next((f"{check.detail}: {check.fix}" for check in failed), None)


def explain_eperm(machine: Machine) -> str:
    """Why the kernel probably said EPERM, which BCC calls "Need super-user privileges", to root too: one line."""
    checks = {check.name: check for check in _checked(replace(machine), ("btf", "bcc"))}
    for check in (checks["lockdown"], checks["capabilities"], checks["perf-event-paranoid"]):
        if check.state in (State.FAILED, State.WARNING):
            return f"the kernel refused: {check.detail}: {check.fix}"
    why, fix = "probably SELinux or another security module", "see sudo dmesg and sudo ausearch -m avc -ts recent"
    if _search(r"^Seccomp:\s*(\d)", machine.text("/proc/self/status", "")) == "2":
        why = "probably the seccomp filter of the container or service"
        fix = "allow bpf and perf_event_open (docker run --security-opt seccomp=unconfined, SystemCallFilter=)"
    return f"the kernel refused: {why}: {fix}"


def as_text(checks: Sequence[Check], color: bool = False) -> str:
    """CHECKS as lines for a terminal, every fix below what it mends."""
    colors = {State.OK: "32", State.WARNING: "33", State.FAILED: "1;31", State.UNKNOWN: "36"}
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        word = f"{'FAILED' if check.state is State.FAILED else check.state.value:<7}"
        word = f"\x1b[{colors[check.state]}m{word}\x1b[0m" if color else word
        lines.append(f"{word}  {check.name:<{width}}  {check.detail}")
        lines += [f"{'':{width + 11}}-> {check.fix}"] if check.fix else []
    failed = sum(check.state is State.FAILED for check in checks)
    end = f"{failed} to mend before msrtrace can trace here" if failed else "nothing found that prevents tracing here"
    return "\n".join([*lines, "", end])


def as_json(checks: Sequence[Check], machine: Machine) -> str:
    """CHECKS as a JSON document whose fields and order stay within one major version of SCHEMA."""
    layout = None
    with suppress(MsrtraceError, ValueError):
        layout = choose(replace(machine).symbols)
    document = {
        "schema": SCHEMA,
        "kernel": machine.release,
        "layout": layout.name if layout else None,
        "ok": all(check.state is not State.FAILED for check in checks),
        "checks": [{"name": c.name, "state": c.state.value, "detail": c.detail, "fix": c.fix} for c in checks],
    }
    return json.dumps(document, indent=2, ensure_ascii=False)


def _checked(machine: Machine, ignore: Collection[str] = ()) -> Iterator[Check]:
    for name in (name for name in _CHECKS if name not in ignore):
        try:
            state, detail, fix = _CHECKS[name](machine)
        except OSError as error:
            state, fix = State.UNKNOWN, f"{machine.command} doctor" if machine.euid else None
            detail = f"cannot read {error.filename}: {error.strerror}"
        except Exception as error:  # whatever a strange machine holds, the other checks still count
            state, detail, fix = State.UNKNOWN, f"cannot be told: {error}", None
        yield Check(name, state, " ".join(detail.split()), fix)


def _cpu(machine: Machine) -> _Found:
    """VMX, by its flag: Zhaoxin has it too, and feat_ctl.c drops it where the firmware has locked VMX away."""
    with machine.at("/proc/cpuinfo").open(errors="replace") as file:
        first = file.read(8192).partition("\n\n")[0]  # all of it is slow on many CPUs
    vendor, flags = _search(r"^vendor_id\s*:\s*(.*)", first).strip(), _search(r"^flags\s*:(.*)", first).split()
    model = _search(r"^model name\s*:\s*(.*)", first) or vendor or "this CPU"
    if "vmx" in flags:
        return State.OK, f"{model} has VMX", None
    if not vendor or vendor in ("AuthenticAMD", "HygonGenuine"):
        why = "has AMD's SVM, whose code in KVM has no such functions" if vendor else "is no x86 CPU"
        return State.FAILED, f"{model} {why}; msrtrace traces Intel VMX", "run msrtrace on a host with an Intel CPU"
    if "hypervisor" in flags:
        fix = "on its host, sudo modprobe kvm_intel nested=1, and give the VM a CPU with vmx (QEMU: -cpu host)"
        return State.FAILED, f"{model} of a virtual machine, without nested VMX", fix
    fix = "enable VT-x (Intel Virtualization Technology) in the firmware setup, then power off and on"
    return State.FAILED, f"{model} has no VMX, or the firmware has disabled it", fix


def _kvm_intel(machine: Machine) -> _Found:
    if machine.at("/sys/module/kvm_intel").exists():
        # Those that change which MSRs are passed through, and how often that changes.
        names = ("nested", "enable_apicv", "enable_ipiv", "pt_mode")
        values = ((name, machine.text(f"/sys/module/kvm_intel/parameters/{name}", "")) for name in names)
        return State.OK, " ".join(["loaded", *(f"{name}={value}" for name, value in values if value)]), None
    modules = f"/lib/modules/{machine.release}"
    untold = machine.at("/proc/modules").exists() and not machine.at(modules).exists()  # in a container
    if untold or "/kvm-intel.ko" in machine.text(f"{modules}/modules.dep", ""):
        return State.FAILED, "kvm_intel is not loaded", "sudo modprobe kvm_intel"
    if "/kvm-intel.ko" in machine.text(f"{modules}/modules.builtin", ""):
        return State.FAILED, "kvm_intel is built in but did not start", "see why: sudo dmesg | grep -i -e kvm -e vmx"
    detail = f"kernel {machine.release} has no kvm_intel, neither built in nor as a module"
    return State.FAILED, detail, "boot a kernel that has CONFIG_KVM_INTEL"


def _symbols(machine: Machine) -> _Found:
    symbols, layout = machine.symbols, choose(machine.symbols)
    known = list(dict.fromkeys(f for one in LAYOUTS for f in (*one.calls, one.update, one.filter_set) if f))
    if layout is None:
        if not machine.at("/sys/module/kvm_intel").exists():
            return State.UNKNOWN, "its functions can be looked up once kvm_intel is loaded", "mend kvm-intel first"
        fix = "boot a kernel from 5.10 on; if it is one, report the output of: grep -i intercept /proc/kallsyms"
        return State.FAILED, f"kernel {machine.release} has none of {', '.join(known)} in /proc/kallsyms", fix
    wanted = [f for f in (*layout.calls, layout.update, layout.filter_set) if f]
    probed = [s.name for f in wanted for s in symbols.find(f)[:1]]
    others = {s.name for s in symbols.functions if s.name.startswith("vmx_") and s.function in known and s.is_entry}
    detail = f"layout {layout.name} (kernels {layout.kernels}): {', '.join(probed)}"
    if unused := sorted(others.difference(probed)):
        detail += f"; not probed: {', '.join(unused)}"
    if not layout.calls:
        detail += "; calls per MSR are not observable in this kernel, only filter updates and their time"
        return State.WARNING, detail, "boot a kernel from 5.13 on to see the calls"
    if missing := [f for f in wanted if not symbols.find(f)]:
        detail += f"; not found, so what they do is not counted: {', '.join(missing)}"
        return State.WARNING, detail, f"report the output of: grep -E '{'|'.join(missing)}' /proc/kallsyms"
    hidden = not any(symbol.address for symbol in symbols.functions)
    if hidden and not machine.missing:
        # kernel/ksyms_common.c: kptr_restrict 2 hides addresses from everybody, 0 and 1 ask for CAP_SYSLOG
        everybody = machine.text("/proc/sys/kernel/kptr_restrict", "") == "2"
        fix = "sudo sysctl -w kernel.kptr_restrict=1" if everybody else "give it CAP_SYSLOG (--cap-add SYSLOG)"
        return State.WARNING, f"{detail}; their addresses are hidden, so causes are unknown", fix
    return State.OK, detail + ("; this user may not see their addresses, and need not" if hidden else ""), None


def _livepatch(machine: Machine) -> _Found:
    detail, fix = describe(machine.symbols)
    return State.WARNING if fix else State.OK, detail, fix


def _headers(machine: Machine) -> _Found:
    """Where BCC looks (src/cc/frontends/clang/loader.cc), the kernel's own copy (CONFIG_IKHEADERS) included."""
    modules, override = f"/lib/modules/{machine.release}", machine.environ.get("BCC_KERNEL_SOURCE")
    build = override or f"{modules}/build"
    # Debian and SUSE split the tree: what is common is in source, what was configured in build.
    split = not override and machine.at(build).is_dir() and machine.at(f"{modules}/source").is_dir()
    common = f"{modules}/source/include/linux/kconfig.h" if split else f"{build}/include/linux/kconfig.h"
    lacking = [f for f in (common, f"{build}/include/generated/autoconf.h") if not machine.at(f).is_file()]
    if not lacking:
        return State.OK, build, None
    copy, module = "/sys/kernel/kheaders.tar.xz", "/kheaders.ko" in machine.text(f"{modules}/modules.dep", "")
    if common in lacking and (module or machine.at(copy).exists()):
        return State.OK, f"the kernel's own copy, {copy}, which BCC unpacks", None
    if override:
        return State.FAILED, f"BCC_KERNEL_SOURCE is set, but there is no {lacking[0]}", "unset BCC_KERNEL_SOURCE"
    detail = f"no headers of kernel {machine.release}, which BCC needs to compile: {lacking[0]} does not exist"
    if machine.at("/.dockerenv").exists() or machine.at("/run/.containerenv").exists():
        detail += " (in a container, the host's will do: -v /lib/modules:/lib/modules:ro -v /usr/src:/usr/src:ro)"
    otherwise = f"install the headers of kernel {machine.release}, or set BCC_KERNEL_SOURCE to them"
    return State.FAILED, detail, machine.package(0) or otherwise


def _bcc(machine: Machine) -> _Found:
    install = machine.package(1) or "install BCC's Python module with the system's package manager"
    spec = PathFinder.find_spec("bcc", list(machine.python_path))
    if spec is None or spec.origin is None:
        if not any(machine.at("/usr/lib").glob("python3*/*-packages/bcc")):
            return State.FAILED, "BCC is not installed (and PyPI's bcc is something else)", install
        detail = f"BCC is installed for /usr/bin/python3, but {machine.python} does not see it"
        venv = f"/usr/bin/python3 -m venv --clear --system-site-packages {machine.venv or 'msrtrace-venv'}"
        return State.FAILED, detail, f"{venv}, then install msrtrace there"
    origin = Path(spec.origin)
    package = origin.parent if origin.name == "__init__.py" else origin
    if not re.search(r"^class BPF\b", origin.read_text(errors="replace"), re.MULTILINE):
        if package.parent == Path.cwd():
            return State.FAILED, f"{package} in the working directory hides BCC", "start msrtrace elsewhere: cd /"
        detail = f"{package} is not BCC but PyPI's unrelated package bcc (it has no BPF)"
        return State.FAILED, detail, f"{machine.python} -m pip uninstall bcc && {install}"
    version = _search(r"__version__ = '([^']+)'", (package / "version.py").read_text())
    library, cache = _search(r'CDLL\("([^"/]+)"', (package / "libbcc.py").read_text()), machine.at("/etc/ld.so.cache")
    # The dynamic linker lists every library it knows by name; musl has no such list.
    if cache.exists() and library.encode() not in cache.read_bytes() and "LD_LIBRARY_PATH" not in machine.environ:
        detail = f"BCC {version} is in {package}, but its library {library} is missing"
        return State.FAILED, detail, machine.package(2) or install
    return State.OK, f"{version} in {package}", None


def _btf(machine: Machine) -> _Found:
    """Where a vCPU's bitmap is: struct vcpu_vmx of arch/x86/kvm/vmx/vmx.h, struct loaded_vmcs of vmcs.h."""
    layout = choose(machine.symbols)
    if layout is None:
        return State.UNKNOWN, "its types can be looked up once its functions are found", "mend symbols first"
    if not layout.calls:
        return State.OK, "not needed where calls are not observable", None
    directory, module = machine.at("/sys/kernel/btf"), machine.symbols.module
    try:
        offset = (Btf.of_module(module, directory) if module else Btf.of_kernel(directory)).bitmap_offset()
    except BtfError as error:
        fix = "boot a kernel with CONFIG_DEBUG_INFO_BTF=y and CONFIG_DEBUG_INFO_BTF_MODULES=y (Debian: 6.1 and newer)"
        return State.WARNING, f"{error}: calls are counted, but which were redundant is unknown", fix
    return State.OK, f"vmcs01.msr_bitmap is at {offset:#x} in struct vcpu_vmx", None


def _lockdown(machine: Machine) -> _Found:
    """Only confidentiality forbids kprobes and BPF's reads (enum lockdown_reason in include/linux/security.h)."""
    path, asked = "/sys/kernel/security/lockdown", _search(r"\blockdown=(\w+)", machine.text("/proc/cmdline", ""))
    if not machine.at(path).exists():
        if not asked:
            return State.OK, "none that can be seen (securityfs is not mounted, or the kernel has no lockdown)", None
        fix = "sudo mount -t securityfs securityfs /sys/kernel/security"
        return State.UNKNOWN, f"the kernel command line has lockdown={asked}, but there is no {path}", fix
    level = _search(r"\[(\w+)\]", machine.text(path))
    if level not in ("none", "integrity", "confidentiality"):
        return State.UNKNOWN, f"{path} names no level that is known", None
    if level != "confidentiality":
        return State.OK, level + (", which leaves kprobes and BPF alone" if level == "integrity" else ""), None
    where = "the kernel command line" if asked == level else f"what writes it to {path}, or from the kernel's config"
    fix = f"remove lockdown=confidentiality from {where}, and reboot"
    return State.FAILED, "the kernel is locked down (confidentiality), which forbids kprobes even to root", fix


def _capabilities(machine: Machine) -> _Found:
    """Those of the initial user namespace, which bpf() and perf_event_open() ask for."""
    if machine.missing and machine.euid:
        return State.FAILED, f"not root, and without {machine.missing}", f"{machine.command} run"
    if machine.missing:
        fix = "docker run --cap-add BPF --cap-add PERFMON --cap-add SYSLOG (systemd: CapabilityBoundingSet=)"
        return State.FAILED, f"root, but without {machine.missing} (a container's or a service's bounds)", fix
    if machine.text("/proc/self/uid_map", "0 0 4294967295").split() != ["0", "0", "4294967295"]:
        detail = "root of a user namespace alone (a rootless container), which may not trace"
        return State.FAILED, detail, "as root of the host: sudo msrtrace run"
    return State.OK, "CAP_SYS_ADMIN" if machine.capable(_SYS_ADMIN) else "CAP_BPF and CAP_PERFMON", None


def _perf_event_paranoid(machine: Machine) -> _Found:
    """Upstream asks for CAP_PERFMON alone; Debian and Ubuntu patch kernel/events/core.c (perf_paranoid_any)."""
    level = int(machine.text("/proc/sys/kernel/perf_event_paranoid"))
    if level <= 2 or machine.missing or machine.capable(_SYS_ADMIN):
        return State.OK, f"{level}, which does not concern root", None
    state = State.FAILED if machine.distribution == "debian" else State.WARNING
    detail = f"perf_event_paranoid is {level}: above 2, Debian's and Ubuntu's kernels ask for CAP_SYS_ADMIN too"
    return state, detail, "sudo sysctl -w kernel.perf_event_paranoid=2"


def _bpf(machine: Machine) -> _Found:
    """The bpf system call, told by its sysctl, and perf's PMU of kprobes, through which probes are attached."""
    sysctl, pmu = "/proc/sys/kernel/unprivileged_bpf_disabled", "/sys/bus/event_source/devices/kprobe"
    for path, what in {sysctl: "BPF (CONFIG_BPF_SYSCALL)", pmu: "kprobes (CONFIG_KPROBE_EVENTS)"}.items():
        if not machine.at(path).exists():
            return State.FAILED, f"kernel {machine.release} has no {what}", "boot a kernel that has it"
    return State.OK, "the kernel has BPF and kprobes", None


def _tracefs(machine: Machine) -> _Found:
    """What silences attached probes (kernel/kprobes.c, kernel/trace/ftrace.c), and tracefs, which is not needed."""
    if machine.text("/proc/sys/kernel/ftrace_enabled", "1") == "0":
        return State.FAILED, "ftrace_enabled is 0: probes never fire", "sudo sysctl -w kernel.ftrace_enabled=1"
    armed = machine.text(switch := "/sys/kernel/debug/kprobes/enabled", "")  # lockdown closes it even to root
    if armed == "0":
        return State.FAILED, "kprobes are disarmed: probes never fire", f"echo 1 | sudo tee {switch}"
    if where := _search(r"^\S+ (\S+) tracefs ", machine.text("/proc/self/mounts", "")):
        return State.OK, f"mounted at {where}" + ("" if armed else f"; {switch} cannot be read here"), None
    detail = "tracefs is not mounted; msrtrace does without, but its probes cannot be looked at"
    return State.WARNING, detail, "sudo mount -t tracefs tracefs /sys/kernel/tracing"


def _search(pattern: str, text: str) -> str:
    return found[1] if (found := re.search(pattern, text, re.MULTILINE)) else ""


#: By name, in the order in which they are mended: _kvm_intel is the check kvm-intel.
_HOST = (_cpu, _kvm_intel, _symbols, _livepatch, _headers, _bcc, _btf)
_RIGHTS = (_lockdown, _capabilities, _perf_event_paranoid, _bpf, _tracefs)
_CHECKS: dict[str, Callable[[Machine], _Found]] = {f.__name__[1:].replace("_", "-"): f for f in _HOST + _RIGHTS}
