# SPDX-License-Identifier: GPL-2.0-or-later
"""What VMs are called, from synthetic /proc trees and a real process."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.model.snapshot import VmInfo
from tracer.trace.vm_info import NAME_LIMIT, VmInfos, start_time, vm_info

PID = 4711
UUID = "6f1d7d5e-0c1b-4b6e-9a58-2d0a6f4f0001"


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


def called(vm: VmInfo | None) -> str | None:
    return vm.name if vm else None


def arguments(*given: str) -> bytes:
    return b"".join(argument.encode() + b"\0" for argument in given)


@pytest.mark.parametrize(
    ("program", "comm", "vmm"),
    [
        ("qemu-system-x86_64", "qemu-system-x86", "qemu"),
        ("/usr/libexec/qemu-kvm", "qemu-kvm", "qemu"),
        ("/usr/bin/kvm", "kvm", "qemu"),
        ("/nix/store/0a1b-qemu-9.2/bin/.qemu-system-x86_64-wrapped", ".qemu-system-x8", "qemu"),
        ("qemu-system-x86_64-headless", "qemu-system-x86", "qemu"),
        ("/opt/renamed", "qemu-system-x86", "qemu"),
        ("/usr/bin/cloud-hypervisor-static", "cloud-hyperviso", "cloud-hypervisor"),
        ("/opt/renamed", "cloud-hyperviso", "cloud-hypervisor"),
        ("./firecracker-v1.12.0-x86_64", "firecracker-v1.", "firecracker"),
        ("crosvm", "crosvm", "crosvm"),
        ("runsc-sandbox", "exe", "gvisor"),
        ("/usr/bin/containerd-shim-kata-v2", "containerd-shim", "kata"),
        ("lkvm", "lkvm", "kvmtool"),
        ("/usr/lib/virtualbox/VirtualBoxVM", "VirtualBoxVM", "virtualbox"),
        ("stratovirt", "stratovirt", "stratovirt"),
        # any other: the command, in full where the kernel has cut it
        ("/opt/bin/openvmm", "openvmm", "openvmm"),
        ("/usr/bin/solo5-hvt-with-a-long-name", "solo5-hvt-with-", "solo5-hvt-with-a-long-name"),
        ("worker: 7 of 9", "my-vmm", "my-vmm"),
        ("kvmd", "kvmd", "kvmd"),
        ("vm\x1b[2J", "vm\x1b[2J", "vm\ufffd[2J"),
        ("", "", "?"),
    ],
)
def test_the_vmm_is_known_by_its_program(tmp_path: Path, program: str, comm: str, vmm: str) -> None:
    add_process(tmp_path, arguments(program, "--verbose"), comm.encode())
    found = vm_info(PID, tmp_path)
    assert found
    assert found.vmm == vmm


@pytest.mark.parametrize(
    ("command_line", "comm", "name"),
    [
        (["cloud-hypervisor", "--api-socket", "/run/user/1000/ch.sock"], b"cloud-hyperviso", "cloud-hypervisor"),
        (["/usr/bin/qemu-system-x86_64", "-nographic"], b"qemu-system-x86", "qemu-system-x86_64"),
        (["/opt/solo5-hvt-with-a-long-name"], b"solo5-hvt-with-", "solo5-hvt-with-a-long-name"),
        (["/opt/vmm-launcher"], b"vmm", "vmm"),
        (["/opt/launcher"], b"cloud-hyperviso", "cloud-hyperviso"),
        (["/usr/bin/qemu-system-x86_64", "-name", "web"], b"qemu-system-x86", "web"),
    ],
)
def test_a_command_that_the_kernel_has_cut_is_shown_in_full(
    tmp_path: Path, command_line: list[str], comm: bytes, name: str
) -> None:
    """TASK_COMM_LEN: 15 bytes and the end. A command of less is what the process calls itself."""
    add_process(tmp_path, arguments(*command_line), comm)
    assert called(vm_info(PID, tmp_path)) == name


def test_a_vmm_is_known_by_its_command_alone(tmp_path: Path) -> None:
    add_process(tmp_path, b"", b"qemu-system-x86")
    assert vm_info(PID, tmp_path) == VmInfo("qemu-system-x86", "", "qemu")


def test_a_sandbox_of_gvisor_is_known_by_its_arguments(tmp_path: Path) -> None:
    add_process(tmp_path, arguments("/proc/self/exe", "--platform=kvm", "boot", "--bundle=/run/b", "6fa1"), b"exe")
    assert vm_info(PID, tmp_path) == VmInfo("6fa1", "", "gvisor")


@pytest.mark.parametrize("piece", [b"[", b'"', b",", b",,", b"uuid=", b"-name\0", b"6f1d7d5e-", b"\xff", b"a=b,"])
@pytest.mark.parametrize("option", [b"-smbios\0type=1,", b"--platform\0", b"-name\0", b"--api-socket\0/", b"-drive\0"])
def test_a_megabyte_is_read_at_once(tmp_path: Path, option: bytes, piece: bytes) -> None:
    add_process(tmp_path, b"qemu\0" + option + piece * (2**20 // len(piece)))
    started = time.process_time()
    assert vm_info(PID, tmp_path)
    assert time.process_time() - started < 0.5


def test_without_a_command_line_the_command_is_the_name(tmp_path: Path) -> None:
    add_process(tmp_path, b"", b"kvm")
    assert called(vm_info(PID, tmp_path)) == "kvm"


def test_a_process_that_is_gone_has_no_name(tmp_path: Path) -> None:
    assert vm_info(PID, tmp_path) is None
    assert start_time(PID, tmp_path) is None
    assert VmInfos(tmp_path).info(PID) is None
    assert not VmInfos(tmp_path).alive(PID)


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
    assert called(vm_info(PID, tmp_path)) == shown


def test_a_command_without_a_name_still_has_something_to_show(tmp_path: Path) -> None:
    add_process(tmp_path, b"", b"")
    assert called(vm_info(PID, tmp_path)) == "?"


@pytest.fixture(scope="module")
def hostile_proc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proc")


# Mostly of the pieces that mean something, in an order nobody meant.
piece = st.sampled_from(
    b"-name --name --id --id= --api-socket --event-monitor guest= path= fd= , ,, = / .sock "
    b"-uuid -smbios --platform type=1 uuid= [ ] 6f1d7d5e-0c1b-4b6e-9a58-2d0a6f4f0001 qemu crosvm runsc boot".split()
).flatmap(lambda word: st.sampled_from([word, word + b"\0", b"\0", b" ", b"\x1b", b"\xff"]))
hostile = st.lists(st.one_of(piece, st.binary()), max_size=30).map(b"".join)


@given(cmdline=hostile, comm=st.binary(max_size=64))
def test_hostile_processes_have_safe_names(hostile_proc: Path, cmdline: bytes, comm: bytes) -> None:
    add_process(hostile_proc, cmdline, comm)
    for vm in (vm_info(PID, hostile_proc), VmInfos(hostile_proc).info(PID)):
        assert vm is not None
        for name in (vm.name, vm.vmm):
            assert name.isprintable()
            assert name == name.strip()
            assert 1 <= len(name) <= NAME_LIMIT
        assert re.fullmatch(r"|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", vm.uuid)


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


def test_a_process_whose_first_thread_has_ended_is_there() -> None:
    exit_thread = "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(60,)).start(); "
    exit_thread += "ctypes.CDLL(None).syscall(60, 0)"  # __NR_exit
    process = subprocess.Popen([sys.executable, "-c", exit_thread])
    vms = VmInfos()
    try:
        before = start_time(process.pid)
        while b") Z " not in Path(f"/proc/{process.pid}/stat").read_bytes():
            time.sleep(0.01)
        assert start_time(process.pid) == before is not None
        assert vms.alive(process.pid)
    finally:
        process.kill()
        process.wait()
    assert start_time(process.pid) is None
    assert not vms.alive(process.pid)


def test_a_name_is_read_once(tmp_path: Path) -> None:
    vms = VmInfos(tmp_path)
    add_process(tmp_path, arguments("qemu", "-name", "web"))
    assert called(vms.info(PID)) == "web"
    add_process(tmp_path, arguments("qemu", "-name", "changed"))
    assert called(vms.info(PID)) == "web"


def test_a_command_name_is_read_again(tmp_path: Path) -> None:
    vms = VmInfos(tmp_path)
    add_process(tmp_path, b"", b"launcher")
    assert called(vms.info(PID)) == "launcher"
    add_process(tmp_path, arguments("qemu", "-name", "web"))
    assert called(vms.info(PID)) == "web"


def test_a_reused_pid_never_has_the_old_name(tmp_path: Path) -> None:
    vms = VmInfos(tmp_path)
    add_process(tmp_path, arguments("qemu", "-name", "web"), started=1000)
    assert called(vms.info(PID)) == "web"
    assert vms.alive(PID)
    add_process(tmp_path, arguments("qemu", "-name", "db"), started=2000)
    assert not vms.alive(PID)  # the process that was named is gone
    assert called(vms.info(PID)) == "db"
    assert vms.alive(PID)


def test_names_of_ended_processes_are_dropped(tmp_path: Path) -> None:
    vms = VmInfos(tmp_path)
    add_process(tmp_path, arguments("qemu", "-name", "web"))
    assert called(vms.info(PID)) == "web"
    remove_process(tmp_path)
    assert not vms.alive(PID)
    assert vms.info(PID) is None


def test_a_pid_reused_while_it_is_read_has_no_name_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_process(tmp_path, arguments("qemu", "-name", "web"), started=1000)
    times = iter([1000, 2000])
    monkeypatch.setattr("tracer.trace.vm_info.start_time", lambda pid, proc: next(times))
    assert VmInfos(tmp_path).info(PID) is None


def test_the_name_of_a_real_process() -> None:
    process = subprocess.Popen(
        ["qemu-system-x86_64", "-c", "echo; read line", "-name", "guest=real,,vm,process=x", "-uuid", UUID],
        executable="/bin/sh",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()  # until then it may be in the middle of its exec
    vms = VmInfos()
    try:
        assert called(vm_info(process.pid)) == "real,vm"
        assert called(vms.info(process.pid)) == "real,vm"
        assert vms.info(process.pid) == VmInfo("real,vm", UUID, "qemu")
        assert vms.alive(process.pid)
    finally:
        process.kill()
        process.communicate()
    assert not vms.alive(process.pid)
    assert vms.info(process.pid) is None
    assert vm_info(process.pid) is None
