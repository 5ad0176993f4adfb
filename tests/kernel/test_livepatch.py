# SPDX-License-Identifier: GPL-2.0-or-later
"""Livepatches from synthetic directories of sysfs."""

from __future__ import annotations

from pathlib import Path

from tracer.kernel.livepatch import Livepatch, read_livepatches


def test_livepatches_are_read_from_sysfs(tmp_path: Path) -> None:
    """Names as in kernel/livepatch/core.c; objects have an attribute `patched` since 6.1."""
    for function in ("kvm_intel/vmx_set_msr,1", "kvm_intel/vmx_x.isra.0,2", "vmlinux/tcp_ack,1"):
        (tmp_path / "kpatch_x" / function).mkdir(parents=True)
    (tmp_path / "kpatch_x/kvm_intel/patched").write_text("1\n")
    (tmp_path / "kpatch_x/enabled").write_text("1\n")
    (tmp_path / "kpatch_y").mkdir()
    (tmp_path / "kpatch_y/enabled").write_text("0\n")
    replaced = {("kvm_intel", "vmx_set_msr"), ("kvm_intel", "vmx_x.isra.0"), ("vmlinux", "tcp_ack")}
    patches = read_livepatches(tmp_path)
    assert patches == (Livepatch("kpatch_x", True, frozenset(replaced)), Livepatch("kpatch_y", False, frozenset()))
    assert patches[0].functions({"kvm", "kvm_intel"}) == {"vmx_set_msr", "vmx_x.isra.0"}


def test_a_kernel_without_livepatching_has_none(tmp_path: Path) -> None:
    assert read_livepatches(tmp_path / "livepatch") == ()
    (tmp_path / "kpatch_x").mkdir()  # and no attributes any more: it is being unloaded
    assert read_livepatches(tmp_path) == ()
