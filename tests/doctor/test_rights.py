# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks of what a process may do, on machines made of files."""

from __future__ import annotations

import pytest
from machines import BPF_AND_PERFMON, FAILED, OF_DOCKER, OK, RELEASE, UNKNOWN, WARNING, Host, status

from tracer.doctor.check import Check, State
from tracer.doctor.examination import explain_eperm, obstacle

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


@pytest.mark.parametrize(
    "cmdline", ["lockdown=confidentiality", "ro lockdown=integrity lockdown=confidentiality lockdown=integrity quiet"]
)
def test_lockdown_without_securityfs_is_what_refused(host: Host, cmdline: str) -> None:
    host.remove("sys/kernel/security/lockdown")
    host.write("proc/cmdline", cmdline)
    assert explain_eperm(host.machine) == (
        "the kernel refused: probably lockdown: the kernel command line has lockdown=confidentiality, which forbids "
        "kprobes even for root: remove lockdown=confidentiality from the kernel command line, and reboot"
    )


def test_lockdown_that_nothing_shows_may_have_refused(host: Host) -> None:
    host.remove("sys/kernel/security/lockdown")
    assert explain_eperm(host.machine) == (
        "the kernel refused: probably SELinux or another security module, or lockdown by the kernel's config: see sudo "
        "dmesg and sudo ausearch -m avc -ts recent; sudo mount -t securityfs securityfs /sys/kernel/security, which "
        "shows lockdown to msrtrace doctor"
    )


def test_what_permits_kprobes_is_not_what_refused(host: Host) -> None:
    host.remove("sys/kernel/security/lockdown")
    host.write("proc/cmdline", "lockdown=integrity")
    assert "lockdown" not in explain_eperm(host.machine)


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
    fix = "docker run --cap-add BPF --cap-add PERFMON --cap-add SYSLOG{} (systemd: CapabilityBoundingSet=)"
    assert host.found("capabilities") == (FAILED, fix.format(" --cap-add SYS_ADMIN"))
    host.write("proc/sys/kernel/perf_event_paranoid", "2\n")
    fix = fix.format("")
    assert host.found("capabilities") == (FAILED, fix)
    assert explain_eperm(host.machine).endswith(fix)


def test_sys_admin_stands_for_both(host: Host) -> None:
    host.write("proc/self/status", status(OF_DOCKER | 1 << 21))
    assert host.check("capabilities") == Check("capabilities", OK, "CAP_SYS_ADMIN")
    assert obstacle(host.machine) is None


def test_root_of_a_user_namespace(host: Host) -> None:
    host.write("proc/self/uid_map", "0 1000 1\n1 100000 65536\n")
    assert host.found("capabilities") == (
        FAILED,
        "as root of the host: sudo msrtrace run, or a container without one (Kubernetes: hostUsers: true)",
    )


def test_two_capabilities_are_enough_where_perf_is_not_paranoid(host: Host) -> None:
    host.write("proc/self/status", status(BPF_AND_PERFMON))
    host.write("proc/sys/kernel/perf_event_paranoid", "2\n")
    host.be(euid=1000)
    assert host.check("capabilities").detail == "CAP_BPF and CAP_PERFMON"
    assert obstacle(host.machine) is None


UNPARANOID = "sudo sysctl -w kernel.perf_event_paranoid=2"


@pytest.mark.parametrize(
    ("release", "state", "why"),
    [
        ("6.1.0-56-amd64", FAILED, "Debian's kernels require"),
        ("6.12.117+deb13-amd64", FAILED, "Debian's kernels require"),
        ("6.16.8+kali-amd64", FAILED, "Debian's kernels require"),
        ("6.8.0-45-generic", WARNING, "kernel 6.8.0-45-generic may require"),
        ("6.8.12-4-pve", WARNING, "kernel 6.8.12-4-pve may require"),
        ("6.10.10-hardened1-1-hardened", WARNING, "kernel 6.10.10-hardened1-1-hardened may require"),
        ("6.18.44-custom", WARNING, "kernel 6.18.44-custom may require"),
    ],
)
def test_paranoid_kernel(host: Host, release: str, state: State, why: str) -> None:
    """It is the kernel that is patched, whatever distribution's files are seen: this host's are Debian's."""
    host.write("proc/self/status", status(BPF_AND_PERFMON))
    host.be(euid=1000, release=release, expected=lambda _: ("kprobe",))
    detail = f"perf_event_paranoid is 3: above 2, {why} CAP_SYS_ADMIN for kprobes, too"
    assert host.check("perf-event-paranoid") == Check("perf-event-paranoid", state, detail, UNPARANOID)
    assert explain_eperm(host.machine).endswith(UNPARANOID)


@pytest.mark.parametrize("os_release", ["ID=fedora", "ID=debian"])
@pytest.mark.parametrize(
    "release",
    ["6.11.4-301.fc41.x86_64", "5.14.0-427.22.1.el9_4.x86_64", "6.4.0-150600.23-default", "6.11.5-arch1-1"],
)
def test_other_kernels_are_not_more_paranoid_than_2(host: Host, os_release: str, release: str) -> None:
    host.write("proc/self/status", status(BPF_AND_PERFMON))
    host.write("etc/os-release", f"{os_release}\n")
    host.be(euid=1000, release=release)
    check = host.check("perf-event-paranoid")
    assert (check.state, check.detail) == (OK, f"3, which is as 2 for kernel {release}")


def test_fentry_on_a_modules_functions_takes_cap_sys_admin(host: Host) -> None:
    """The kernel gives descriptors of a module's BTF to nobody else, whatever perf_event_paranoid is."""
    host.write("proc/self/status", status(BPF_AND_PERFMON))
    host.write("proc/sys/kernel/perf_event_paranoid", "2\n")
    host.be(euid=1000, expected=lambda _: ("fentry", "kprobe"))
    assert "fentry" not in host.machine.backends
    assert obstacle(host.machine) is None
    host.be(expected=lambda _: ("fentry",))
    assert obstacle(host.machine) == (
        "CAP_BPF and CAP_PERFMON, but fentry on a module's functions takes CAP_SYS_ADMIN: grant that, too, or use "
        "--backend kprobe"
    )
    host.write("proc/self/status", status(BPF_AND_PERFMON | 1 << 21))
    host.be(expected=lambda _: ("fentry", "kprobe"))
    assert host.machine.backends == ("fentry", "kprobe")
    assert obstacle(host.machine) is None


def test_paranoid_kernel_whose_module_is_probed_by_fentry(host: Host) -> None:
    host.write("proc/self/status", status(BPF_AND_PERFMON))
    host.be(euid=1000, expected=lambda _: ("fentry", "kprobe"))
    assert host.found("perf-event-paranoid") == (FAILED, UNPARANOID)


def test_fentry_needs_no_perf_events(host: Host) -> None:
    host.build_in()
    host.write("proc/self/status", status(BPF_AND_PERFMON))
    host.be(euid=1000, expected=lambda _: ("fentry", "kprobe"))
    check = host.check("perf-event-paranoid")
    assert (check.state, check.detail) == (OK, "3, which does not affect the backend fentry")
    assert obstacle(host.machine) is None
    assert explain_eperm(host.machine).endswith(UNPARANOID)  # if fentry is refused, kprobes are tried
    host.be(expected=lambda _: ())
    assert host.check("perf-event-paranoid").state is WARNING


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
