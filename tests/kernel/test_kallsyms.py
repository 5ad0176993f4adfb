# SPDX-License-Identifier: GPL-2.0-or-later
"""Where functions and data are, by /proc/kallsyms."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracer.kernel.kallsyms import places_of, scan

NAMES = ("kvm_vcpu_release", "vmx_possible_passthrough_msrs")
#: As in 6.12: data between others of its module, in no order; a livepatch with a function of the same name.
KALLSYMS = """\
ffffffff81000000 T _text
ffffffff81064f30 t kvm_vcpu_release_all
ffffffffc0a00000 t kvm_vcpu_release\t[kvm]
ffffffffc0a00900 t kvm_vcpu_release.cold\t[kvm]
ffffffffc0a00080 t kvm_vcpu_ioctl\t[kvm]
ffffffffc0b00500 r kvm_io_ops\t[kvm_intel]
ffffffffc0b00400 r vmx_possible_passthrough_msrs\t[kvm_intel]
ffffffffc0b00410 a in_the_middle\t[kvm_intel]
ffffffffc0b00450 r __func__.1\t[kvm_intel]
ffffffffc0b00410 r of_another\t[kvm]
ffffffffc0c00000 t kvm_vcpu_release\t[klp_1]
ffffffffc0c00010 U kvm_vcpu_release\t[klp_2]
"""


def placed(file: Path, names: tuple[str, ...], modules: tuple[str, ...]) -> dict[str, range]:
    with file.open("rb") as lines:
        return places_of(*scan(lines, [f" {name}".encode() for name in names]), names, modules)


def found(tmp_path: Path, text: str, *modules: str) -> dict[str, range]:
    file = tmp_path / "kallsyms"
    file.write_text(text)
    return placed(file, NAMES, modules)


def test_functions_and_data_of_modules(tmp_path: Path) -> None:
    """Data ends where the next symbol that has a place in its module begins."""
    assert found(tmp_path, KALLSYMS, "kvm", "kvm_intel") == {
        "kvm_vcpu_release": range(0xFFFFFFFFC0A00000, 0xFFFFFFFFC0A00080),
        "vmx_possible_passthrough_msrs": range(0xFFFFFFFFC0B00400, 0xFFFFFFFFC0B00450),
    }


def test_other_modules_do_not_count(tmp_path: Path) -> None:
    assert list(found(tmp_path, KALLSYMS, "kvm")) == ["kvm_vcpu_release"]
    assert found(tmp_path, KALLSYMS) == {}


def test_what_is_built_in_has_no_end(tmp_path: Path) -> None:
    built_in = KALLSYMS.replace("\t[kvm]", "").replace("\t[kvm_intel]", "")
    assert found(tmp_path, built_in) == {
        "kvm_vcpu_release": range(0xFFFFFFFFC0A00000, 0xFFFFFFFFC0A00000),
        "vmx_possible_passthrough_msrs": range(0xFFFFFFFFC0B00400, 0xFFFFFFFFC0B00400),
    }


def test_a_module_goes_before_the_image(tmp_path: Path) -> None:
    both = "ffffffff81000010 t kvm_vcpu_release\n" + KALLSYMS
    assert found(tmp_path, both, "kvm")["kvm_vcpu_release"].start == 0xFFFFFFFFC0A00000
    assert found(tmp_path, both)["kvm_vcpu_release"].start == 0xFFFFFFFF81000010


def test_hidden_addresses_are_none(tmp_path: Path) -> None:
    hidden = "".join(f"{0:016x}{line[16:]}\n" for line in KALLSYMS.splitlines())
    assert found(tmp_path, hidden, "kvm", "kvm_intel") == {}


@pytest.mark.parametrize("suffix", [".llvm.3433979326929198294", ".lto_priv.0", ".isra.0", "$1a2b"])
def test_a_compilers_suffix_is_no_other_name(tmp_path: Path, suffix: str) -> None:
    renamed = KALLSYMS.replace("t kvm_vcpu_release\t[kvm]", f"t kvm_vcpu_release{suffix}\t[kvm]")
    assert found(tmp_path, renamed, "kvm")["kvm_vcpu_release"].start == 0xFFFFFFFFC0A00000


@pytest.mark.parametrize("suffix", [".cold", ".part.0", ".part.0.cold", ".cfi_jt", ".llvm.5.__part.1"])
def test_a_part_of_a_function_is_not_the_function(tmp_path: Path, suffix: str) -> None:
    renamed = KALLSYMS.replace("t kvm_vcpu_release\t[kvm]", f"t kvm_vcpu_release{suffix}\t[kvm]")
    assert found(tmp_path, renamed, "kvm") == {}


def test_a_name_without_a_suffix_goes_first(tmp_path: Path) -> None:
    for address in ("c0a00001", "c0afffff"):
        both = KALLSYMS + f"ffffffff{address} t kvm_vcpu_release.isra.0\t[kvm]\n"
        assert found(tmp_path, both, "kvm")["kvm_vcpu_release"].start == 0xFFFFFFFFC0A00000


def test_this_machine_has_its_own() -> None:
    assert "vfs_read" in placed(Path("/proc/kallsyms"), ("vfs_read",), ())
