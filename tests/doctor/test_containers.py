# SPDX-License-Identifier: GPL-2.0-or-later
"""What doctor says inside of a container: what hides from it or is forbidden to it, and where a command must be typed.

Whether real containers are as these is judged by tests/kvmhost/test_container.py.
"""

from __future__ import annotations

import os

import pytest
from machines import BPF_AND_PERFMON, FAILED, KVM, OF_DOCKER, OK, VMLINUX, WARNING, Host, btf, status

from tracer.cli import session
from tracer.doctor.examination import obstacle
from tracer.doctor.rights import ALLOW_CALLS
from tracer.model.errors import MsrtraceError
from tracer.model.options import BACKENDS, Options

HOST_PIDS, OWN_PIDS = "pid:[4026531836]", "pid:[4026532201]"


@pytest.fixture
def container(host: Host) -> Host:
    """A container on that host, with all rights and nothing hidden."""
    host.write(".dockerenv")
    host.remove(f"lib/modules/{host.machine.release}")
    return host


def pids(host: Host, namespace: str) -> None:
    link = host.root / "proc/self/ns/pid"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(namespace)


def test_the_host_s_processes(container: Host) -> None:
    pids(container, HOST_PIDS)
    assert container.found("processes") == (OK, None)


def test_processes_of_the_container_alone(container: Host) -> None:
    pids(container, OWN_PIDS)
    assert container.found("processes") == (WARNING, "docker run --pid=host (Kubernetes: hostPID: true)")


def test_a_command_that_changes_the_kernel_is_for_the_host(container: Host) -> None:
    container.write("proc/self/status", status(BPF_AND_PERFMON))
    container.be(expected=lambda _: ("kprobe",))
    unparanoid = "on the host: sudo sysctl -w kernel.perf_event_paranoid=2; or docker run --cap-add SYS_ADMIN"
    assert container.found("perf-event-paranoid") == (FAILED, unparanoid)
    container.write("proc/sys/kernel/ftrace_enabled", "0\n")
    assert container.found("tracefs") == (FAILED, "on the host: sudo sysctl -w kernel.ftrace_enabled=1")
    container.unload()
    assert container.found("kvm-intel") == (FAILED, "on the host: sudo modprobe kvm_intel")


def test_tracefs_need_not_be_in_a_container(container: Host) -> None:
    container.write("proc/self/mounts", "overlay / overlay rw 0 0\n")
    assert container.found("tracefs") == (OK, None)


def test_another_user_of_a_container_has_no_capabilities(container: Host) -> None:
    container.write("proc/self/status", status(0))
    container.be(euid=1000)
    capabilities = "--cap-add BPF --cap-add PERFMON --cap-add SYSLOG --cap-add SYS_ADMIN"
    assert container.found("capabilities") == (
        FAILED,
        f"docker run --user 0 {capabilities} (systemd: CapabilityBoundingSet=)",
    )


def test_a_user_namespace_comes_before_its_capabilities(container: Host) -> None:
    """Where both are wrong, to add capabilities would be in vain."""
    container.write("proc/self/uid_map", "0 100000 65536\n")
    container.write("proc/self/status", status(OF_DOCKER))
    assert container.check("capabilities").detail.startswith("in a user namespace")


def test_calls_that_seccomp_refuses(container: Host) -> None:
    container.be(refused_calls=lambda: ("bpf", "perf_event_open"))
    check = container.check("bpf")
    assert (check.state, check.fix) == (FAILED, ALLOW_CALLS)
    assert check.detail == "bpf and perf_event_open: refused by the seccomp filter of the container or service"
    assert obstacle(container.machine) == f"{check.detail}: {ALLOW_CALLS}"


def test_what_is_refused_for_want_of_capabilities_is_not_seccomp_s(container: Host) -> None:
    container.write("proc/self/status", status(OF_DOCKER))
    container.be(refused_calls=lambda: ("bpf", "perf_event_open"))
    assert container.found("bpf") == (OK, None)


def test_a_module_that_sysfs_hides(container: Host) -> None:
    container.remove("sys/module/kvm_intel")
    assert container.found("kvm-intel") == (
        FAILED,
        "docker run --security-opt systempaths=unconfined (podman: --security-opt unmask=/sys/module)",
    )


def test_hidden_symbols(container: Host) -> None:
    container.write("proc/kallsyms", "")
    assert container.found("symbols") == (
        FAILED,
        "docker run --security-opt systempaths=unconfined (podman: --security-opt unmask=/proc/kallsyms)",
    )


def test_hidden_types(container: Host) -> None:
    for name in ("vmlinux", "kvm_intel"):
        container.remove(f"sys/kernel/btf/{name}")
    assert container.found("btf") == (WARNING, "docker run -v /sys/kernel/btf:/sys/kernel/btf:ro")


def test_types_that_the_kernel_lacks_are_not_hidden(container: Host) -> None:
    container.remove("sys/kernel/btf/kvm_intel")
    assert "CONFIG_DEBUG_INFO_BTF_MODULES" in str(container.found("btf")[1])
    container.write("sys/kernel/btf/kvm_intel", btf(KVM, VMLINUX))
    assert container.found("btf") == (OK, None)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (Options(by_vm=True), "--by-vm"),
        (Options(pid=os.getpid()), "--pid"),
        (Options(by_vm=True, pid=os.getpid()), "--by-vm and --pid"),
    ],
)
def test_what_needs_the_host_s_ids_is_refused_without_them(
    container: Host, monkeypatch: pytest.MonkeyPatch, options: Options, named: str
) -> None:
    monkeypatch.setattr(session, "this_machine", lambda _: container.machine)
    container.be(compiled=frozenset(BACKENDS))
    pids(container, HOST_PIDS)
    assert session.ready_machine(options) is container.machine
    pids(container, OWN_PIDS)
    assert session.ready_machine(Options()) is container.machine
    with pytest.raises(MsrtraceError, match=f"^{named} cannot be used: .*: docker run --pid=host"):
        session.ready_machine(options)
