# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks of what this process is permitted to do. Facts are from the sources of Linux 5.10 to 7.2, cited at each."""

from __future__ import annotations

import re

from tracer.doctor.check import Found, State
from tracer.doctor.containers import in_container, on_host
from tracer.doctor.kernels import restricts_perf_events
from tracer.kernel.machine import SYS_ADMIN, Machine, search

LOCKDOWN = "/sys/kernel/security/lockdown"
_CMDLINE = "the kernel command line"
_REMOVE = "remove lockdown=confidentiality from {}, and reboot"
#: Docker's seccomp profile, and Podman's from Debian 13 on, allow both calls to who has CAP_BPF and CAP_PERFMON.
ALLOW_CALLS = (
    "allow bpf and perf_event_open: docker run --cap-add SYS_ADMIN, which older seccomp profiles ask for, or "
    "--security-opt seccomp=unconfined (systemd: SystemCallFilter=)"
)


def lockdown_asked(machine: Machine) -> str:
    """The level that the kernel command line asks for, or "": the highest, as none is undone (security/lockdown)."""
    asked = re.findall(r"(?<!\S)lockdown=(\w+)", machine.text("/proc/cmdline", ""))
    return next((level for level in ("confidentiality", "integrity") if level in asked), asked[-1] if asked else "")


def explain_lockdown(machine: Machine) -> str | None:
    """Why the kernel refused, where it is lockdown, and what to do; None if nothing says that it is."""
    state, detail, fix = check_lockdown(machine)
    if state is State.FAILED:
        return f"{detail}: {fix}"
    if state is State.UNKNOWN and lockdown_asked(machine) == "confidentiality":
        detail = f"probably lockdown: {_CMDLINE} has lockdown=confidentiality, which forbids kprobes even for root"
        return f"{detail}: {_REMOVE.format(_CMDLINE)}"
    return None


def check_lockdown(machine: Machine) -> Found:
    """Only confidentiality forbids kprobes and BPF's reads (enum lockdown_reason in include/linux/security.h)."""
    path, asked = LOCKDOWN, lockdown_asked(machine)
    if not machine.at(path).exists():
        if not asked:
            return State.OK, "none found (securityfs is not mounted, or the kernel has no lockdown)", None
        fix = on_host(machine, "sudo mount -t securityfs securityfs /sys/kernel/security")
        return State.UNKNOWN, f"the kernel command line has lockdown={asked}, but there is no {path}", fix
    level = search(r"\[(\w+)\]", machine.text(path))
    if level not in ("none", "integrity", "confidentiality"):
        return State.UNKNOWN, f"{path} has an unknown level", None
    if level != "confidentiality":
        return State.OK, level + (", which permits kprobes and BPF" if level == "integrity" else ""), None
    where = _CMDLINE if asked == level else f"what writes it to {path}, or from the kernel's config"
    return (
        State.FAILED,
        "the kernel is locked down (confidentiality), which forbids kprobes even for root",
        _REMOVE.format(where),
    )


def check_capabilities(machine: Machine) -> Found:
    """Those in the initial user namespace, which bpf() and perf_event_open() require."""
    if machine.text("/proc/self/uid_map", "0 0 4294967295").split() != ["0", "0", "4294967295"]:
        detail = "in a user namespace (a rootless container, userns-remap), whose capabilities do not permit tracing"
        fix = "as root of the host: sudo msrtrace run, or a container without one (Kubernetes: hostUsers: true)"
        return State.FAILED, detail, fix
    if machine.missing:
        return _without_capabilities(machine)
    if machine.capable(SYS_ADMIN):
        return State.OK, "CAP_SYS_ADMIN", None
    if machine.backends == ("fentry",) and machine.fentry_takes_sys_admin:
        detail = "CAP_BPF and CAP_PERFMON, but fentry on a module's functions takes CAP_SYS_ADMIN"
        return State.FAILED, detail, "grant that, too, or use --backend kprobe"
    return State.OK, "CAP_BPF and CAP_PERFMON", None


def _without_capabilities(machine: Machine) -> Found:
    contained = in_container(machine)
    if machine.euid and not contained:
        return State.FAILED, f"not root, and without {machine.missing}", f"{machine.command} run"
    needed = ["BPF", "PERFMON", "SYSLOG", *(["SYS_ADMIN"] if _asks_for_sys_admin(machine) is not False else [])]
    fix = f"docker run {' '.join(f'--cap-add {name}' for name in needed)} (systemd: CapabilityBoundingSet=)"
    if machine.euid:
        fix = fix.replace("docker run", "docker run --user 0", 1)
        return State.FAILED, f"not root, and without {machine.missing}", fix
    return State.FAILED, f"root, but without {machine.missing} (a container's or a service's bounds)", fix


def check_perf_event_paranoid(machine: Machine) -> Found:
    """Upstream requires only CAP_PERFMON; Debian and others patch kernel/events/core.c (perf_paranoid_any).

    That is of kprobes: programs at fentry, which without CAP_SYS_ADMIN are for what is built in, take no perf events.
    """
    level = int(machine.text("/proc/sys/kernel/perf_event_paranoid"))
    if level <= 2 or machine.missing or machine.capable(SYS_ADMIN):
        return State.OK, f"{level}, which does not affect root", None
    restricts = restricts_perf_events(machine.release)
    if restricts is False:
        return State.OK, f"{level}, which is as 2 for kernel {machine.release}", None
    if machine.backends[:1] == ("fentry",):
        return State.OK, f"{level}, which does not affect the backend fentry", None
    detail = f"perf_event_paranoid is {level}: above 2, "
    detail += "Debian's kernels require" if restricts else f"kernel {machine.release} may require"
    detail += " CAP_SYS_ADMIN for kprobes, too"
    state = State.FAILED if restricts and machine.backends else State.WARNING
    fix = on_host(machine, "sudo sysctl -w kernel.perf_event_paranoid=2")
    return state, detail, f"{fix}; or docker run --cap-add SYS_ADMIN" if in_container(machine) else fix


def _asks_for_sys_admin(machine: Machine) -> bool | None:
    """Whether the kernel asks for CAP_SYS_ADMIN to attach kprobes; None if it may."""
    level = machine.text("/proc/sys/kernel/perf_event_paranoid", "2")
    return restricts_perf_events(machine.release) if level not in ("-1", "0", "1", "2") else False


def check_bpf(machine: Machine) -> Found:
    """The bpf system call, by its sysctl, and perf's kprobe PMU, through which probes are attached; and seccomp."""
    sysctl, pmu = "/proc/sys/kernel/unprivileged_bpf_disabled", "/sys/bus/event_source/devices/kprobe"
    for path, what in {sysctl: "BPF (CONFIG_BPF_SYSCALL)", pmu: "kprobes (CONFIG_KPROBE_EVENTS)"}.items():
        if not machine.at(path).exists():
            return State.FAILED, f"kernel {machine.release} has no {what}", "boot a kernel that has it"
    if not machine.missing and (refused := machine.refused_calls()):
        detail = f"{' and '.join(refused)}: refused by the seccomp filter of the container or service"
        return State.FAILED, detail, ALLOW_CALLS
    return State.OK, "the kernel has BPF and kprobes", None


def check_tracefs(machine: Machine) -> Found:
    """What disables attached probes (kernel/kprobes.c, kernel/trace/ftrace.c), and tracefs, which is optional."""
    if machine.text("/proc/sys/kernel/ftrace_enabled", "1") == "0":
        fix = on_host(machine, "sudo sysctl -w kernel.ftrace_enabled=1")
        return State.FAILED, "ftrace_enabled is 0: probes never fire", fix
    armed = machine.text(switch := "/sys/kernel/debug/kprobes/enabled", "")  # lockdown closes it even to root
    if armed == "0":
        fix = on_host(machine, f"echo 1 | sudo tee {switch}")
        return State.FAILED, "kprobes are disarmed: probes never fire", fix
    if where := search(r"^\S+ (\S+) tracefs ", machine.text("/proc/self/mounts", "")):
        return State.OK, f"mounted at {where}" + ("" if armed else f"; {switch} cannot be read here"), None
    if in_container(machine):
        return State.OK, "not mounted in this container; msrtrace does not need it", None
    detail = "tracefs is not mounted; msrtrace does not need it, but its probes cannot be listed"
    return State.WARNING, detail, "sudo mount -t tracefs tracefs /sys/kernel/tracing"
