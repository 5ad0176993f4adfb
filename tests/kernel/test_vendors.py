# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose functions the running kernel has, and which part of a split function has its body."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracer.kernel.symbols import Symbols
from tracer.model.svm import SVM
from tracer.model.vendor import Vendor
from tracer.model.vmx import VMX

BOTH = """\
ffffffff81000000 T _text
ffffffff81010000 t vmx_vcpu_run
ffffffff81011000 t vmx_recalc_intercepts
ffffffff81020000 t svm_vcpu_run
ffffffff81021000 t svm_recalc_intercepts
"""
MODULE = """\
ffffffffc0a00000 t svm_msr_filter_changed\t[kvm_amd]
ffffffffc0a01000 t set_msr_interception_bitmap\t[kvm_amd]
ffffffffc0a02000 t nested_svm_vmrun_msrpm.part.0\t[kvm_amd]
ffffffffc0b00000 t kvm_vm_ioctl_set_msr_filter\t[kvm]
"""


def read(folder: Path, kallsyms: str, flags: str | None) -> Symbols:
    (folder / "kallsyms").write_text(kallsyms)
    if flags is not None:
        (folder / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    return Symbols.read(folder / "kallsyms", folder / "livepatch")


@pytest.mark.parametrize(
    ("kallsyms", "flags", "vendor"),
    [
        (MODULE, "fpu svm", SVM),
        (BOTH + MODULE, "fpu vmx", SVM),  # a module is loaded where its CPU is
        (BOTH, "fpu vmx", VMX),
        (BOTH, "fpu svm", SVM),
        (BOTH, "fpu svm_lock", VMX),
        (BOTH, None, VMX),
        ("".join(line for line in BOTH.splitlines(True) if "svm" in line), "fpu", SVM),
        ("", "fpu svm", VMX),
    ],
)
def test_the_vendor_is_that_whose_functions_are_there(
    kallsyms: str, flags: str | None, vendor: Vendor, tmp_path: Path
) -> None:
    assert read(tmp_path, kallsyms, flags).vendor is vendor


def test_every_function_of_kvm_amd_is_found(tmp_path: Path) -> None:
    symbols = read(tmp_path, MODULE, "svm")
    assert symbols.module == "kvm_amd"
    assert [symbols.find(name)[0].name for name in ("set_msr_interception_bitmap", "nested_svm_vmrun_msrpm")] == [
        "set_msr_interception_bitmap",
        "nested_svm_vmrun_msrpm.part.0",
    ]


def test_the_part_with_the_body_of_a_split_function(tmp_path: Path) -> None:
    """As in Debian's 6.17, where vmx_vcpu_after_set_cpuid() calls the part."""
    rows = [
        f"ffffffffc0a0{n}000 t {name}\t[kvm_intel]\n" for n, name in enumerate(("a", "a.part.0", "b", "c.part.0.cold"))
    ]
    symbols = read(tmp_path, "".join(rows), "vmx")
    assert [s.name for s in symbols.find("a")] == ["a"]
    assert {name: [s.name for s in symbols.body(name)] for name in "abc"} == {"a": ["a.part.0"], "b": ["b"], "c": []}
