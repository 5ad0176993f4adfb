# SPDX-License-Identifier: GPL-2.0-or-later
"""Symbols from synthetic kallsyms: names of functions, and which function an address is in."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tracer.kernel.layout import choose
from tracer.kernel.symbols import Symbol, Symbols
from tracer.model.errors import MsrtraceError
from tracer.model.exits import EXIT_FUNCTIONS
from tracer.model.symbol_name import plain_name
from tracer.model.vmx import VMX

# As in 6.12: clones, paddings, data, other modules, an alias, addresses in no order.
KALLSYMS = """\
ffffffff81000000 T _text
ffffffff81064f30 t vmx_set_msr
ffffffffc0b00000 t __pfx_vmx_enable_intercept_for_msr\t[kvm_intel]
ffffffffc0b00010 t vmx_enable_intercept_for_msr\t[kvm_intel]
ffffffffc0b00210 t vmx_set_intercept.isra.0\t[kvm_intel]
ffffffffc0b00110 T vmx_msr_filter_changed\t[kvm_intel]
ffffffffc0b00310 t vmx_disable_intercept_for_msr.constprop.0\t[kvm_intel]
ffffffffc0b00410 t vmx_disable_intercept_for_msr.part.0\t[kvm_intel]
ffffffffc0b00020 t vmx_disable_intercept_for_msr.part.0.cold\t[kvm_intel]
ffffffffc0b00510 W vmx_weak\t[kvm_intel]
ffffffffc0b00510 T vmx_alias\t[kvm_intel]
ffffffffc0c00000 d vmx_vcpu_create\t[kvm_intel]
ffffffffc0c00040 r __ksymtab_vmx_weak\t[kvm_intel]
ffffffffc0c00080 t __ksymtab_strings\t[kvm_intel]
ffffffffc0a00000 t kvm_vm_ioctl_set_msr_filter\t[kvm]
ffffffffc0a00000 t vmx_set_msr\t[kvm_amd]
ffffffffc0a00100 t bpf_prog_6deef7357e7b4530_sd_fw\t[bpf]
"""

FUNCTIONS = [
    (0xFFFFFFFFC0A00000, "kvm_vm_ioctl_set_msr_filter", "kvm"),
    (0xFFFFFFFFC0B00010, "vmx_enable_intercept_for_msr", "kvm_intel"),
    (0xFFFFFFFFC0B00020, "vmx_disable_intercept_for_msr.part.0.cold", "kvm_intel"),
    (0xFFFFFFFFC0B00110, "vmx_msr_filter_changed", "kvm_intel"),
    (0xFFFFFFFFC0B00210, "vmx_set_intercept.isra.0", "kvm_intel"),
    (0xFFFFFFFFC0B00310, "vmx_disable_intercept_for_msr.constprop.0", "kvm_intel"),
    (0xFFFFFFFFC0B00410, "vmx_disable_intercept_for_msr.part.0", "kvm_intel"),
    (0xFFFFFFFFC0B00510, "vmx_alias", "kvm_intel"),
    (0xFFFFFFFFC0B00510, "vmx_weak", "kvm_intel"),
]


def read(tmp_path: Path, text: str) -> Symbols:
    file = tmp_path / "kallsyms"
    file.write_text(text)
    return Symbols.read(file)


def found(symbols: Symbols, function: str) -> list[str]:
    return [symbol.name for symbol in symbols.find(function)]


def test_functions_of_both_modules_are_found(tmp_path: Path) -> None:
    symbols = read(tmp_path, KALLSYMS)
    assert [(s.address, s.name, s.module) for s in symbols.functions] == FUNCTIONS
    assert symbols.module == "kvm_intel"


def test_clones_are_found_only_where_the_function_itself_is_missing(tmp_path: Path) -> None:
    disable = "vmx_disable_intercept_for_msr"
    symbols = read(tmp_path, KALLSYMS)
    assert found(symbols, "vmx_enable_intercept_for_msr") == ["vmx_enable_intercept_for_msr"]
    assert found(symbols, disable) == [f"{disable}.constprop.0", f"{disable}.part.0"]
    assert found(symbols, f"{disable}.part.0") == [f"{disable}.part.0"]
    assert found(symbols, "vmx_disable_intercept") == []
    whole = read(tmp_path, KALLSYMS + f"ffffffffc0b00610 t {disable}\t[kvm_intel]\n")
    assert found(whole, disable) == [disable]


#: As GCC and LLVM make them, for what: interprocedural optimisation, and that of the whole program.
SUFFIXES = ["", ".isra.0", ".constprop.12", ".part.3", ".cold", ".cold.7", ".llvm.3433979326929198294", ".lto_priv.0"]
SUFFIXES += [
    ".__part.1",
    ".__uniq.245866110",
    ".localalias",
    ".cfi",
    ".cfi_jt",
    "$0ef1c3ba7a3e1dbb",
    ".specialized.1",
    ".slowpath",
]


@given(st.lists(st.sampled_from(SUFFIXES), max_size=3).map("".join))
@example(".isra.0.cold")
@example(".__uniq.245866110.llvm.3433979326929198294")
def test_suffixes_are_removed_from_names(suffix: str) -> None:
    assert plain_name(f"vmx_set_msr{suffix}") == "vmx_set_msr"
    assert VMX.cause_of(f"vmx_set_msr{suffix}") == "msr_write"


@pytest.mark.parametrize("name", ["vmx_partial", "vmx_cold", "isra", "vmx_llvm_1", ".E_copy", "$x"])
def test_names_without_suffixes_are_kept(name: str) -> None:
    """C identifiers have no dots, but local labels may begin with one."""
    assert Symbol(1, name, None).function == name


@pytest.mark.parametrize(
    ("suffix", "entry"),
    [
        (".cold", False),
        (".cold.7", False),
        (".llvm.5.cold", False),
        (".isra.0.cold", False),
        (".cfi_jt", False),
        (".__part.1", False),
        (".llvm.5.__part.12", False),
        (".cold_start", True),
        (".llvm.5", True),
        (".part.0", True),
        (".cfi", True),
    ],
)
def test_parts_moved_out_are_not_entries(tmp_path: Path, suffix: str, entry: bool) -> None:
    name = f"vmx_msr_filter_changed{suffix}"
    symbols = read(tmp_path, f"ffffffffc0b00010 t {name}\t[kvm_intel]\n")
    assert found(symbols, "vmx_msr_filter_changed") == [name] * entry
    assert symbols.caller(0xFFFFFFFFC0B00011) == (name, "vmx_msr_filter_changed")


def test_whole_clones_come_before_parts(tmp_path: Path) -> None:
    names = [f"vmx_recalc_msr_intercepts{suffix}" for suffix in (".part.0", ".constprop.0", ".cold", "")]
    rows = [f"ffffffffc0b0{n}010 t {name}\t[kvm_intel]\n" for n, name in enumerate(names)]
    assert found(read(tmp_path, "".join(rows)), "vmx_recalc_msr_intercepts") == ["vmx_recalc_msr_intercepts"]
    assert found(read(tmp_path, "".join(rows[:3])), "vmx_recalc_msr_intercepts") == [names[1], names[0]]


@pytest.mark.parametrize(
    ("address", "name"),
    [
        (0, None),
        (0xFFFFFFFF81064F40, None),  # vmx_set_msr of the image is not looked at while there are modules
        (0xFFFFFFFFC09FFFFF, None),
        (0xFFFFFFFFC0A00000, "kvm_vm_ioctl_set_msr_filter"),
        (0xFFFFFFFFC0B00011, "vmx_enable_intercept_for_msr"),
        (0xFFFFFFFFC0B0010F, "vmx_disable_intercept_for_msr.part.0.cold"),
        (0xFFFFFFFFC0B00110, "vmx_msr_filter_changed"),
        (0xFFFFFFFFC0B00510, "vmx_weak"),
    ],
)
def test_an_address_is_in_a_function_or_none(tmp_path: Path, address: int, name: str | None) -> None:
    symbol = read(tmp_path, KALLSYMS).containing(address)
    assert (symbol and symbol.name) == name


def test_hidden_addresses_are_in_no_function(tmp_path: Path) -> None:
    hidden = "\n".join("0" * 16 + line[16:] for line in KALLSYMS.splitlines())
    symbols = read(tmp_path, hidden)
    assert sorted(s.name for s in symbols.functions) == sorted(name for _, name, _ in FUNCTIONS)
    assert [symbols.containing(address) for address in (0, 1, 0xFFFFFFFFC0B00110)] == [None] * 3
    assert choose(symbols) == choose(read(tmp_path, KALLSYMS))


@pytest.mark.parametrize("size", [*range(1, 90), 1000])
def test_the_size_of_chunks_does_not_matter(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(tmp_path, KALLSYMS)
    monkeypatch.setattr("tracer.kernel.kallsyms._CHUNK", size)
    assert read(tmp_path, KALLSYMS) == whole


def test_kvm_built_into_the_kernel_is_found(tmp_path: Path) -> None:
    image = "ffffffff81064f30 t vmx_vcpu_run\nffffffff81065f30 T vmx_msr_filter_changed\nffffffff82000000 D vmx_x\n"
    symbols = read(tmp_path, image + "ffffffffc0a00000 t nf_hook\t[nf_tables]\nffffffffc0d00000 t x\t[kvm]\n")
    assert [(s.name, s.module) for s in symbols.functions] == [("vmx_vcpu_run", None), ("vmx_msr_filter_changed", None)]
    assert symbols.module is None
    assert symbols.caller(0xFFFFFFFF82000001) == ("0xffffffff82000001", "")  # data
    assert symbols.caller(0xFFFFFFFFC0D00000) == ("0xffffffffc0d00000", "")
    hidden = read(tmp_path, "".join(f"{0:016x}{line[16:]}\n" for line in image.splitlines()))
    assert hidden.functions[0].address == 0
    assert hidden.caller(0xFFFFFFFF81064F31) == ("0xffffffff81064f31", "")


def test_functions_of_exits_are_found_in_the_image(tmp_path: Path) -> None:
    wanted = sorted({*EXIT_FUNCTIONS.all, *EXIT_FUNCTIONS.completions.values(), "nested_vmx_vmexit"})
    names = ["vmx_vcpu_run", *wanted, "kvm_emulate_cpuid", "nested_svm_vmloadsave"]
    symbols = read(tmp_path, "".join(f"ffffffff8106{n:02x}30 t {name}\n" for n, name in enumerate(names)))
    assert [s.name for s in symbols.functions] == names[:-2]  # each once
    assert all(len(symbols.find(name)) == 1 for name in wanted)


def test_without_the_module_there_are_no_functions(tmp_path: Path) -> None:
    symbols = read(tmp_path, "ffffffff81000000 T _text\nffffffffc0d00000 t kvm_set_msr\t[kvm]\n")
    assert [s.name for s in symbols.functions] == ["kvm_set_msr"]
    assert symbols.module == "kvm_intel"
    assert choose(symbols) is None


def test_unreadable_kallsyms_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MsrtraceError, match=f"^cannot read {tmp_path}/kallsyms: No such file or directory$"):
        Symbols.read(tmp_path / "kallsyms")


# --- whose an address is ---

#: Another module at a lower address, a livepatch's at a higher one, in no order; with what kvm_intel ends.
MODULES = """\
ffffffff81000000 T _text
ffffffffc0d00000 t klp_init\t[kpatch_x]
ffffffffc0d00100 t vmx_set_msr\t[kpatch_x]
ffffffffc0d00200 t pt_guest_enter\t[kpatch_x]
ffffffffc0d00280 t klpp_vmx_vcpu_after_set_cpuid\t[kpatch_x]
ffffffffc0d00300 d kpatch_funcs\t[kpatch_x]
ffffffffc0b00030 ? .klp.sym.kvm_intel.vmx_vcpu_create,0\t[kpatch_x]
ffffffffc0b00280 u vmx_set_msr\t[kpatch_x]
ffffffffc0b00000 t vmx_vcpu_create\t[kvm_intel]
ffffffffc0b00100 t vmx_set_msr\t[kvm_intel]
ffffffffc0b00200 t vmx_vcpu_after_set_cpuid\t[kvm_intel]
ffffffffc0b00300 d kvm_intel_data\t[kvm_intel]
ffffffffc0b01000 t pt_update_intercept_for_msr\t[kvm_intel]
ffffffffc0a00000 t kvm_set_msr_common\t[kvm]
ffffffffc0c00000 t pt_of_something_else\t[nf_tables]
ffffffffc0e00000 t bpf_trampoline_6442479536\t[bpf]
ffffffffc0e01000 t ftrace_trampoline\t[__builtin__ftrace]
"""


@pytest.mark.parametrize(
    ("address", "caller", "function"),
    [
        (0xFFFFFFFFC0B00040, "vmx_vcpu_create", "vmx_vcpu_create"),  # what a livepatch refers to is not the livepatch's
        (0xFFFFFFFFC0B002FF, "vmx_vcpu_after_set_cpuid", "vmx_vcpu_after_set_cpuid"),
        (0xFFFFFFFFC0B00300, "0xffffffffc0b00300", ""),  # data
        (0xFFFFFFFFC0B01080, "pt_update_intercept_for_msr", "pt_update_intercept_for_msr"),
        (0xFFFFFFFFC0C00000, "0xffffffffc0c00000", ""),  # nf_tables
        (0xFFFFFFFFC0D00000, "klp_init [kpatch_x]", ""),
        (0xFFFFFFFFC0D00180, "vmx_set_msr [kpatch_x]", ""),
        (0xFFFFFFFFC0E00010, "0xffffffffc0e00010", ""),
        (0xFFFFFFFFC0E01010, "0xffffffffc0e01010", ""),
        (0xFFFFFFFFC0A00010, "kvm_set_msr_common", "kvm_set_msr_common"),
        (0xFFFFFFFF81000010, "0xffffffff81000010", ""),
        (0xFFFFFFFFC09FFFFF, "0xffffffffc09fffff", ""),
    ],
)
def test_callers_in_other_modules_have_their_module(tmp_path: Path, address: int, caller: str, function: str) -> None:
    assert read(tmp_path, MODULES).caller(address) == (caller, function)


def livepatch(directory: Path, *replaced: str, enabled: bool = True) -> Path:
    """Make the sysfs directory of a livepatch; `replaced` are paths of object and function."""
    for function in replaced:
        (directory / f"{function},1").mkdir(parents=True)
    (directory / "enabled").write_text(f"{enabled:d}\n")
    return directory.parent


@pytest.mark.parametrize(
    ("address", "caller", "cause"),
    [
        (0xFFFFFFFFC0D00180, "vmx_set_msr [kpatch_x]", "msr_write"),
        (0xFFFFFFFFC0D00290, "klpp_vmx_vcpu_after_set_cpuid [kpatch_x]", "cpuid_update"),
        (0xFFFFFFFFC0D00240, "pt_guest_enter [kpatch_x]", "other"),  # no function of KVM's here
        (0xFFFFFFFFC0D00300, "0xffffffffc0d00300", "other"),
    ],
)
def test_a_livepatch_stands_for_what_it_replaces(tmp_path: Path, address: int, caller: str, cause: str) -> None:
    (tmp_path / "kallsyms").write_text(MODULES)
    directory = livepatch(tmp_path / "livepatch/kpatch_x", "kvm_intel/vmx_set_msr", "vmlinux/tcp_ack")
    symbols = Symbols.read(tmp_path / "kallsyms", directory)
    shown, function = symbols.caller(address)
    assert (shown, VMX.cause_of(function)) == (caller, cause)
    assert [patch.module for patch in symbols.replacing("vmx_set_msr")] == ["kpatch_x"]
    assert symbols.replacing("vmx_vcpu_create") == []
    assert [s.module for s in symbols.find("vmx_set_msr")] == ["kvm_intel"]
    assert [s.place for s in symbols.copies("vmx_set_msr")] == ["vmx_set_msr [kpatch_x]"]


def test_a_livepatch_of_something_else_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "kallsyms").write_text(MODULES)
    directory = livepatch(tmp_path / "livepatch/kpatch_x", "vmlinux/vmx_set_msr", "nf_tables/pt_of_something_else")
    symbols = Symbols.read(tmp_path / "kallsyms", directory)
    assert symbols.livepatches == ()
    assert symbols.caller(0xFFFFFFFFC0D00180) == ("vmx_set_msr [kpatch_x]", "")


@pytest.mark.parametrize(
    ("modules", "known"),
    [
        ("kvm_intel 8192 1 - Live 0xffffffffc0b00000\n", True),
        ("kvm_intel 8192 1 - Live 0x0000000000000000\n", False),
        ("kvm_intel 8192 1 nonsense\n", False),
        ("", False),
    ],
)
def test_a_module_ends_where_proc_modules_says(tmp_path: Path, modules: str, known: bool) -> None:
    """A module loaded later, without symbols yet, may be placed right after it."""
    (tmp_path / "modules").write_text("other 4096 0 - Live 0xffffffffc0a00000 (OE)\n" + modules)
    symbols = read(tmp_path, "".join(line for line in MODULES.splitlines(True) if "[kvm_intel]" in line))
    assert symbols.caller(0xFFFFFFFFC0B01FFF)[1] == "pt_update_intercept_for_msr"
    assert symbols.caller(0xFFFFFFFFC0B02000)[1] == ("" if known else "pt_update_intercept_for_msr")


PLACES = st.integers(0, 1 << 12).map(lambda offset: 0xFFFFFFFFC0000000 + 16 * offset)
ROWS = st.lists(
    st.tuples(
        PLACES,
        st.sampled_from("ttttTdrb"),
        # The functions of kpatch_x are known, those of nf_tables and bpf are not.
        st.tuples(
            st.sampled_from(["vmx_a", "vmx_b.isra.0", "c", "__pfx_d", "vmx_e.cold"]),
            st.sampled_from(["kvm_intel", "kvm", "kpatch_x"]),
        )
        | st.tuples(st.sampled_from(["c", "d"]), st.sampled_from(["nf_tables", "bpf"])),
    ).map(lambda row: (row[0], row[1], *row[2])),
    max_size=40,
    unique_by=lambda row: row[0],
)


@given(rows=ROWS, probed=st.lists(st.integers(0, 1 << 16).map(lambda offset: 0xFFFFFFFFC0000000 + offset), max_size=40))
def test_an_address_is_of_the_function_that_it_is_in(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, str, str, str]], probed: list[int]
) -> None:
    """A function of KVM reaches from its start to the next symbol of any module, and no further."""
    text = "".join(f"{address:016x} {kind} {name}\t[{module}]\n" for address, kind, name, module in rows)
    symbols = read(tmp_path_factory.mktemp("kallsyms"), text)
    pages = {row[0] >> 12 for row in rows if row[3] in ("kvm_intel", "kvm")}
    for address in [*probed, *(row[0] for row in rows), *(row[0] + 15 for row in rows)]:
        before = max((row for row in rows if row[0] <= address), default=None)
        name, function = symbols.caller(address)
        owner = before and before[3] in ("kvm_intel", "kvm") and before[1] in "tT" and not before[2].startswith("__")
        if not before or not owner:
            assert function == "", (hex(address), before)
        elif any(row[0] >> 12 == address >> 12 for row in rows if row[3] not in ("kvm_intel", "kvm")) and (
            address >> 12 not in pages
        ):
            assert name in (hex(address), before[2])  # a page that is another module's, before its first symbol
        else:
            assert (name, function) == (before[2], plain_name(before[2]))


# --- KVM in the kernel image ---


@pytest.mark.parametrize("suffix", ["", ".llvm.3433979326929198294", ".lto_priv.0", ".__uniq.5.llvm.6"])
def test_kvm_built_in_is_found_by_names_with_suffixes(tmp_path: Path, suffix: str) -> None:
    image = f"""\
ffffffff81000000 T _text
ffffffff81064f30 t vmx_vcpu_run{suffix}
ffffffff81065f30 t vmx_msr_filter_changed{suffix}
ffffffff81066f30 t pt_update_intercept_for_msr{suffix}
ffffffff81067000 T _etext
ffffffffc0d00000 t vmx_msr_filter_changed\t[kpatch_x]
"""
    symbols = read(tmp_path, image)
    assert symbols.module is None
    assert [s.place for s in symbols.find("vmx_msr_filter_changed")] == [f"vmx_msr_filter_changed{suffix}"]
    assert VMX.cause_of(symbols.caller(0xFFFFFFFF81066FFF)[1]) == "pt"
    assert symbols.caller(0xFFFFFFFF81067001)[1] in ("", "_etext")
    assert symbols.caller(0xFFFFFFFFC0D00001) == ("vmx_msr_filter_changed [kpatch_x]", "")
    directory = livepatch(tmp_path / "livepatch/kpatch_x", "vmlinux/vmx_msr_filter_changed")
    patched = Symbols.read(tmp_path / "kallsyms", directory)
    assert patched.caller(0xFFFFFFFFC0D00001) == ("vmx_msr_filter_changed [kpatch_x]", "vmx_msr_filter_changed")


@pytest.mark.parametrize("name", ["vmx_vcpu_run.cold", "vmx_vcpu_runs", "vmx_vcpu_run_late.llvm.1"])
def test_similar_names_do_not_make_kvm_built_in(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, f"ffffffff81064f30 t {name}\n").module == "kvm_intel"


def test_kvm_may_be_built_in_without_kvm_intel(tmp_path: Path) -> None:
    symbols = read(
        tmp_path,
        "ffffffff81064f30 t kvm_vcpu_ioctl\nffffffff81065f30 t kvm_vm_ioctl_set_msr_filter.llvm.5\n"
        "ffffffff81066f30 t vmx_msr_filter_changed\nffffffffc0b00010 t vmx_msr_filter_changed\t[kvm_intel]\n",
    )
    assert symbols.module == "kvm_intel"
    assert found(symbols, "kvm_vm_ioctl_set_msr_filter") == ["kvm_vm_ioctl_set_msr_filter.llvm.5"]
    assert symbols.find("vmx_msr_filter_changed")[0].module == "kvm_intel"
    assert symbols.caller(0xFFFFFFFF81064F31) == ("kvm_vcpu_ioctl", "kvm_vcpu_ioctl")


def test_the_kernel_image_is_not_kept_where_kvm_is_a_module(tmp_path: Path) -> None:
    symbols = read(tmp_path, KALLSYMS)
    assert {s.module for s in symbols.functions} == {"kvm", "kvm_intel"}
    assert symbols.caller(0xFFFFFFFF81064F40) == ("0xffffffff81064f40", "")
    assert {s.place for s in symbols.copies("vmx_set_msr")} == {"vmx_set_msr", "vmx_set_msr [kvm_amd]"}
