# SPDX-License-Identifier: GPL-2.0-or-later
"""Names of VMs, from synthetic /proc trees and a real process."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.trace.vm_names import NAME_LIMIT, VmNames, start_time, vm_name

PID = 4711


def add_process(
    proc: Path,
    cmdline: bytes,
    comm: bytes = b"qemu-system-x86",
    *,
    started: int = 1000,
    state: bytes = b"S",
) -> None:
    directory = proc / str(PID)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cmdline").write_bytes(cmdline)
    (directory / "comm").write_bytes(comm + b"\n")
    fields = [state, *[b"0"] * 18, str(started).encode(), b"1", b"2"]
    (directory / "stat").write_bytes(b"%d (%s) " % (PID, comm) + b" ".join(fields) + b"\n")


def remove_process(proc: Path) -> None:
    for file in (proc / str(PID)).iterdir():
        file.unlink()
    (proc / str(PID)).rmdir()


def arguments(*given: str) -> bytes:
    return b"".join(argument.encode() + b"\0" for argument in given)


@pytest.mark.parametrize(
    ("command_line", "name"),
    [
        # QEMU, as libvirt starts it and by hand
        (["qemu", "-name", "guest=web,debug-threads=on", "-S"], "web"),
        (["qemu", "-name", "web"], "web"),
        (["qemu", "--name", "web"], "web"),
        (["qemu", "-name", "web,process=db"], "web"),
        (["qemu", "-name", "debug-threads=on,guest=web"], "web"),
        (["qemu", "-name", "guest=web,guest=db"], "db"),
        (["qemu", "-name", "debug-threads=on", "-name", "web"], "web"),
        (["qemu", "-name", "web", "-name", "debug-threads=on"], "web"),
        (["qemu", "-name", "web", "-name", "db"], "db"),
        (["qemu", "-name", "guest=a,,b,debug-threads=on"], "a,b"),
        (["qemu", "-name", "a,,b"], "a,b"),
        (["qemu", "-name", "a,,b=c,debug-threads=on"], "a,b=c"),
        (["qemu", "-name", "a,,,guest=b"], "b"),
        (["qemu", "-name", "guest=a=b"], "a=b"),
        (["qemu", "-name", "guest=web 1"], "web 1"),
        (["/opt/renamed", "-name", "web"], "web"),
        (["qemu", "-name", "", "-id", "web"], None),
        (["qemu", "-name", "process=web"], None),
        (["qemu", "-name"], None),
        (["qemu", "-append", "-name web"], None),
        (["qemu", "-device", "virtio-net,id=web"], None),
        (["-name", "web"], None),
        # kvmtool
        (["lkvm", "run", "--name", "web", "-k", "bzImage"], "web"),
        (["lkvm", "run", "--name=web"], "web"),
        # Firecracker
        (["firecracker", "--id", "web", "--api-sock", "/run/api.sock"], "web"),
        (["firecracker", "--id=web"], "web"),
        (["firecracker", "--api-sock", "/run/fc/web.socket"], "web"),
        (["firecracker", "--api-sock", "/run/firecracker.socket"], None),
        # Cloud Hypervisor by hand, by libvirt (old, then new), by Kata (Go, then Rust)
        (["cloud-hypervisor", "--api-socket", "/run/ch/web.sock"], "web"),
        (["cloud-hypervisor", "--api-socket", "path=/run/ch/web.sock"], "web"),
        (["cloud-hypervisor", "--api-socket=path=/run/ch/web.v2.sock"], "web.v2"),
        (["cloud-hypervisor", "--api-socket", "/run/libvirt/ch/web-socket"], "web"),
        (
            [
                "cloud-hypervisor",
                "--api-socket",
                "fd=23",
                "--event-monitor",
                "path=/run/libvirt/ch/web-event-monitor-fifo",
            ],
            "web",
        ),
        (["cloud-hypervisor", "--api-socket", "/run/vc/vm/6fa1/clh-api.sock"], "6fa1"),
        (["cloud-hypervisor", "--api-socket", "/run/kata/6fa1/root/ch-api.sock"], "6fa1"),
        (["cloud-hypervisor", "--api-socket", "/tmp/cloud-hypervisor.sock"], None),
        (["cloud-hypervisor", "--api-socket", "fd=23"], None),
        (["cloud-hypervisor", "--kernel", "vmlinux"], None),
        # in a directory that is a user's, or the system's
        (["cloud-hypervisor", "--api-socket", "/run/user/1000/ch.sock"], None),
        (["cloud-hypervisor", "--api-socket", "path=/var/run/user/0/ch.sock"], None),
        (["cloud-hypervisor", "--api-socket", "/home/ada/cloud-hypervisor.sock"], None),
        (["cloud-hypervisor", "--api-socket", "/dev/shm/ch.sock"], None),
        (["cloud-hypervisor", "--api-socket", "/home/ada/.local/state/ch.sock"], None),
        (["cloud-hypervisor", "--api-socket", "/usr/local/var/ch.sock"], None),
        (["cloud-hypervisor", "--api-socket", "ch.sock"], None),
        (["cloud-hypervisor", "--api-socket", "/run/user/1000/web/ch.sock"], "web"),
        (["cloud-hypervisor", "--api-socket", "/run/user/1000/web.sock"], "web"),
        (["cloud-hypervisor", "--api-socket", "/srv/vms/1000/ch.sock"], "1000"),
        (["firecracker", "--api-sock", "/run/user/1000/firecracker.socket"], None),
        # Kata with the VMM in its shim
        (["containerd-shim-kata-v2", "-namespace", "k8s.io", "-address", "/run/c.sock", "-id", "6fa1"], "6fa1"),
        (["/opt/kata/bin/containerd-shim-kata-v2", "-id=6fa1", "-debug"], "6fa1"),
        (["containerd-shim-kata-v2", "-namespace", "k8s.io"], None),
        # gVisor
        (["runsc-sandbox", "--root=/run/r", "--platform=kvm", "boot", "--bundle=/run/b", "6fa1"], "6fa1"),
        (["runsc-sandbox", "boot", "--bundle", "/run/b", "--start-sync-fd=3", "6fa1"], "6fa1"),
        (["runsc-sandbox", "boot", "--bundle", "/run/b"], None),
        (["runsc-sandbox", "boot", "--bundle=/run/b"], None),
        (["runsc-sandbox", "boot"], None),
        (["lkvm", "run", "boot", "vmlinux"], None),
        # Multipass
        (["qemu-system-x86_64", "-drive", "file=/m/vault/instances/relay/x.img,if=none,format=qcow2"], "relay"),
        (["qemu-system-x86_64", "-cdrom", "/m/vault/instances/relay/cloud-init-config.iso"], "relay"),
        (["qemu-system-x86_64", "-drive", "file=/m/vault/instances/x.img"], None),
        # Android
        (["qemu-system-x86_64-headless", "-avd", "Pixel_6", "-no-window"], "Pixel_6"),
        (["/sdk/emulator/qemu/linux-x86_64/qemu-system-x86_64", "@Pixel_6"], "Pixel_6"),
        # crosvm: by hand, ChromeOS, Cuttlefish
        (["crosvm", "run", "-s", "/run/vm/crosvm-a.sock", "bzImage"], "crosvm-a"),
        (["crosvm", "run", "--socket=/run/vm/web.sock"], "web"),
        (["/usr/bin/crosvm", "run", "--socket", "/run/vm/vm.Xq3/crosvm.sock"], "vm.Xq3"),
        (["crosvm", "run", "--socket=/home/ada/cuttlefish/instances/cvd-1/internal/crosvm_control.sock"], "cvd-1"),
        (["crosvm", "run", "-s", "/run/crosvm.sock"], None),
        (["qemu-system-x86_64", "-s", "-S"], None),
    ],
)
def test_the_name_is_found_on_the_command_line(tmp_path: Path, command_line: list[str], name: str | None) -> None:
    add_process(tmp_path, arguments(*command_line), b"vmm")
    assert vm_name(PID, tmp_path) == (name or "vmm")


def test_without_a_command_line_the_command_is_the_name(tmp_path: Path) -> None:
    add_process(tmp_path, b"", b"kvm")
    assert vm_name(PID, tmp_path) == "kvm"


def test_a_process_that_is_gone_has_no_name(tmp_path: Path) -> None:
    assert vm_name(PID, tmp_path) is None
    assert start_time(PID, tmp_path) is None
    assert VmNames(tmp_path).name(PID) is None
    assert not VmNames(tmp_path).alive(PID)


@pytest.mark.parametrize(
    ("given_name", "shown"),
    [
        (b"a\nmsrtrace_up 0", "a\ufffdmsrtrace_up 0"),
        (b"\x1b[2Jweb", "\ufffd[2Jweb"),
        (b"web\xff\xfe", "web\ufffd\ufffd"),
        ("a\u202eb\u2028c\u200bd".encode(), "a\ufffdb\ufffdc\ufffdd"),
        (b"  web  ", "web"),
        ("b\u00fccher-\u65e5\u672c".encode(), "b\u00fccher-\u65e5\u672c"),
        (b"x" * NAME_LIMIT, "x" * NAME_LIMIT),
        (b"x" * (NAME_LIMIT + 1), "x" * (NAME_LIMIT - 1) + "\u2026"),
        (b" \t ", "\ufffd"),
        (b"   ", "qemu-system-x86"),
    ],
)
def test_names_are_safe_to_show(tmp_path: Path, given_name: bytes, shown: str) -> None:
    add_process(tmp_path, b"qemu\0-name\0" + given_name + b"\0")
    assert vm_name(PID, tmp_path) == shown


def test_a_command_without_a_name_still_has_something_to_show(tmp_path: Path) -> None:
    add_process(tmp_path, b"", b"")
    assert vm_name(PID, tmp_path) == "?"


@pytest.fixture(scope="module")
def hostile_proc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proc")


# Mostly of the pieces that mean something, in an order nobody meant.
piece = st.sampled_from(
    b"-name --name --id --id= --api-socket --event-monitor guest= path= fd= , ,, = / .sock".split()
).flatmap(lambda word: st.sampled_from([word, word + b"\0", b"\0", b" ", b"\x1b", b"\xff"]))
hostile = st.lists(st.one_of(piece, st.binary()), max_size=30).map(b"".join)


@given(cmdline=hostile, comm=st.binary(max_size=64))
def test_hostile_processes_have_safe_names(hostile_proc: Path, cmdline: bytes, comm: bytes) -> None:
    add_process(hostile_proc, cmdline, comm)
    for name in (vm_name(PID, hostile_proc), VmNames(hostile_proc).name(PID)):
        assert name is not None
        assert name.isprintable()
        assert name == name.strip()
        assert 1 <= len(name) <= NAME_LIMIT


@given(stat=st.one_of(st.binary(), st.binary().map(b"1 (vmm) S ".__add__)))
def test_a_hostile_stat_file_raises_nothing(hostile_proc: Path, stat: bytes) -> None:
    add_process(hostile_proc, b"")
    (hostile_proc / str(PID) / "stat").write_bytes(stat)
    assert isinstance(start_time(PID, hostile_proc), int | None)


@pytest.mark.parametrize("comm", [b"CPU 0/KVM", b"a) S 1 2 (b", b")", b"((", b""])
def test_start_time_whatever_the_command_is_called(tmp_path: Path, comm: bytes) -> None:
    add_process(tmp_path, b"", comm, started=987654321)
    assert start_time(PID, tmp_path) == 987654321


def test_a_zombie_is_gone(tmp_path: Path) -> None:
    add_process(tmp_path, b"", state=b"Z")
    assert start_time(PID, tmp_path) is None


def test_a_name_is_read_once(tmp_path: Path) -> None:
    names = VmNames(tmp_path)
    add_process(tmp_path, arguments("qemu", "-name", "web"))
    assert names.name(PID) == "web"
    add_process(tmp_path, arguments("qemu", "-name", "changed"))
    assert names.name(PID) == "web"


def test_a_command_name_is_read_again(tmp_path: Path) -> None:
    names = VmNames(tmp_path)
    add_process(tmp_path, b"", b"launcher")
    assert names.name(PID) == "launcher"
    add_process(tmp_path, arguments("qemu", "-name", "web"))
    assert names.name(PID) == "web"


def test_a_reused_pid_never_has_the_old_name(tmp_path: Path) -> None:
    names = VmNames(tmp_path)
    add_process(tmp_path, arguments("qemu", "-name", "web"), started=1000)
    assert names.name(PID) == "web"
    assert names.alive(PID)
    add_process(tmp_path, arguments("qemu", "-name", "db"), started=2000)
    assert not names.alive(PID)  # the process that was named is gone
    assert names.name(PID) == "db"
    assert names.alive(PID)


def test_names_of_ended_processes_are_dropped(tmp_path: Path) -> None:
    names = VmNames(tmp_path)
    add_process(tmp_path, arguments("qemu", "-name", "web"))
    assert names.name(PID) == "web"
    remove_process(tmp_path)
    assert not names.alive(PID)
    assert names.name(PID) is None


def test_a_pid_reused_while_it_is_read_has_no_name_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_process(tmp_path, arguments("qemu", "-name", "web"), started=1000)
    times = iter([1000, 2000])
    monkeypatch.setattr("tracer.trace.vm_names.start_time", lambda pid, proc: next(times))
    assert VmNames(tmp_path).name(PID) is None


def test_the_name_of_a_real_process() -> None:
    process = subprocess.Popen(
        ["qemu-system-x86_64", "-c", "echo; read line", "-name", "guest=real,,vm,process=x"],
        executable="/bin/sh",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()  # until then it may be in the middle of its exec
    names = VmNames()
    try:
        assert vm_name(process.pid) == "real,vm"
        assert names.name(process.pid) == "real,vm"
        assert names.alive(process.pid)
    finally:
        process.kill()
        process.communicate()
    assert not names.alive(process.pid)
    assert names.name(process.pid) is None
    assert vm_name(process.pid) is None
