# SPDX-License-Identifier: GPL-2.0-or-later
"""The VMs of a fake /proc, with and without the right to see descriptors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tracer.trace.running_vms import running_vms

QEMU = ["/usr/bin/qemu-system-x86_64", "-name", "guest=web-01"]


def process(proc: Path, pid: int, command: list[str], *descriptors: str) -> Path:
    made = proc / str(pid)
    (made / "fd").mkdir(parents=True)
    (made / "cmdline").write_bytes("".join(f"{word}\0" for word in command).encode())
    (made / "comm").write_text(f"{(command or ['kthreadd'])[0].rpartition('/')[2][:15]}\n")
    for number, target in enumerate(descriptors):
        (made / "fd" / str(number)).symlink_to(target)
    return made


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors are those of another user's processes, also if root runs this test."""

    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)


def test_a_vm_is_known_by_its_descriptor(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    process(tmp_path, 2, [])
    process(tmp_path, 7, ["/usr/bin/own-vmm"], "/dev/null", "anon_inode:kvm-vm")
    process(tmp_path, 8, QEMU, "/dev/kvm", "anon_inode:kvm-vm", "anon_inode:kvm-vcpu:0")
    process(tmp_path, 9, [*QEMU, "-accel", "tcg"], "/dev/null")
    found = running_vms(tmp_path)
    assert {pid: vm.name for pid, vm in found.items()} == {7: "own-vmm", 8: "web-01"}


def test_vms_of_others_are_known_by_their_vmm(tmp_path: Path, hidden: None) -> None:
    process(tmp_path, 7, ["/usr/bin/own-vmm"], "anon_inode:kvm-vm")
    process(tmp_path, 8, QEMU, "anon_inode:kvm-vm")
    assert {pid: vm.name for pid, vm in running_vms(tmp_path).items()} == {8: "web-01"}


def test_processes_that_end_meanwhile_are_left_out(tmp_path: Path) -> None:
    process(tmp_path, 8, QEMU, "anon_inode:kvm-vm")
    (process(tmp_path, 9, QEMU, "anon_inode:kvm-vm") / "comm").unlink()
    (tmp_path / "10").mkdir()
    assert list(running_vms(tmp_path)) == [8]


def test_without_proc_there_are_none(tmp_path: Path) -> None:
    assert running_vms(tmp_path / "proc") == {}
