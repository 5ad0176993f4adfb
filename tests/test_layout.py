"""Symbols from made-up kallsyms, and the layout that is chosen for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.errors import MsrtraceError
from tracer.layout import LAYOUTS, Symbol, Symbols, choose

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


def test_functions_of_the_modules(tmp_path: Path) -> None:
    symbols = read(tmp_path, KALLSYMS)
    assert [(s.address, s.name, s.module) for s in symbols.functions] == FUNCTIONS
    assert symbols.module == "kvm_intel"


def test_clones_stand_in_only_where_the_function_itself_is_missing(tmp_path: Path) -> None:
    disable = "vmx_disable_intercept_for_msr"
    symbols = read(tmp_path, KALLSYMS)
    assert found(symbols, "vmx_enable_intercept_for_msr") == ["vmx_enable_intercept_for_msr"]
    assert found(symbols, disable) == [f"{disable}.constprop.0", f"{disable}.part.0"]
    assert found(symbols, f"{disable}.part.0") == [f"{disable}.part.0"]
    assert found(symbols, "vmx_disable_intercept") == []
    whole = read(tmp_path, KALLSYMS + f"ffffffffc0b00610 t {disable}\t[kvm_intel]\n")
    assert found(whole, disable) == [disable]


@pytest.mark.parametrize(
    "suffix",
    ["", ".isra.0", ".constprop.12", ".part.3", ".cold", ".cold.7", ".isra.0.cold", ".constprop.0.isra.1"],
)
def test_the_name_in_the_source(suffix: str) -> None:
    assert Symbol(1, f"vmx_set_msr{suffix}", "kvm_intel").function == "vmx_set_msr"


@pytest.mark.parametrize("name", ["vmx_partial", "vmx_cold", "isra", "vmx.partly", "vmx.colder"])
def test_names_that_are_no_clones(name: str) -> None:
    assert Symbol(1, name, None).function == name


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
def test_containing(tmp_path: Path, address: int, name: str | None) -> None:
    symbol = read(tmp_path, KALLSYMS).containing(address)
    assert (symbol and symbol.name) == name


def test_hidden_addresses(tmp_path: Path) -> None:
    hidden = "\n".join("0" * 16 + line[16:] for line in KALLSYMS.splitlines())
    symbols = read(tmp_path, hidden)
    assert sorted(s.name for s in symbols.functions) == sorted(name for _, name, _ in FUNCTIONS)
    assert [symbols.containing(address) for address in (0, 1, 0xFFFFFFFFC0B00110)] == [None] * 3
    assert choose(symbols) == choose(read(tmp_path, KALLSYMS))


@pytest.mark.parametrize("size", [*range(1, 90), 1000])
def test_read_in_pieces(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(tmp_path, KALLSYMS)
    monkeypatch.setattr("tracer.layout._CHUNK", size)
    assert read(tmp_path, KALLSYMS) == whole


def test_built_in(tmp_path: Path) -> None:
    image = "ffffffff81064f30 t vmx_vcpu_run\nffffffff81065f30 T vmx_msr_filter_changed\nffffffff82000000 D vmx_x\n"
    symbols = read(tmp_path, image + "ffffffffc0a00000 t nf_hook\t[nf_tables]\nffffffffc0d00000 t x\t[kvm]\n")
    assert [(s.name, s.module) for s in symbols.functions] == [("vmx_vcpu_run", None), ("vmx_msr_filter_changed", None)]
    assert symbols.module is None


def test_not_loaded(tmp_path: Path) -> None:
    symbols = read(tmp_path, "ffffffff81000000 T _text\nffffffffc0d00000 t kvm_set_msr\t[kvm]\n")
    assert [s.name for s in symbols.functions] == ["kvm_set_msr"]
    assert symbols.module == "kvm_intel"
    assert choose(symbols) is None


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(MsrtraceError, match=f"^cannot read {tmp_path}/kallsyms: No such file or directory$"):
        Symbols.read(tmp_path / "kallsyms")


ENABLE, DISABLE, SET = "vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr", "vmx_set_intercept_for_msr"
HOOK, RECALC, RECALC_MSR = "vmx_msr_filter_changed", "vmx_recalc_intercepts", "vmx_recalc_msr_intercepts"
FILTER = "kvm_vm_ioctl_set_msr_filter"


@pytest.mark.parametrize(
    ("functions", "layout"),
    [
        # what the kernels have: 5.10, 6.1 and 6.12, 6.17, 7.2
        ([HOOK], "filter-only"),
        ([HOOK, ENABLE, DISABLE], "toggle"),
        ([SET, RECALC_MSR, f"{RECALC_MSR}.part.0", FILTER], "set"),
        ([SET, RECALC, FILTER], "recalc"),
        # the filter's ioctl is inlined
        ([SET, RECALC_MSR], "set"),
        ([SET, RECALC], "recalc"),
        # a compiler made clones of all of them
        ([f"{HOOK}.isra.0", f"{ENABLE}.constprop.0", f"{DISABLE}.part.0"], "toggle"),
        ([f"{HOOK}.cold"], None),
        # the newest that is whole, though a newer one is there in part
        ([HOOK, ENABLE, DISABLE, RECALC], "toggle"),
        ([HOOK, ENABLE, DISABLE, SET], "toggle"),
        ([SET, RECALC_MSR, RECALC], "recalc"),
        # in part: calls count more than updates
        ([HOOK, ENABLE], "toggle"),
        ([HOOK, DISABLE], "toggle"),
        ([ENABLE, DISABLE], "toggle"),
        ([SET], "recalc"),
        ([SET, HOOK], "recalc"),
        ([RECALC], "recalc"),
        ([RECALC_MSR], "set"),
        ([HOOK, RECALC], "filter-only"),
        ([FILTER], None),
        (["vmx_vcpu_run", "vmx_set_msr"], None),
        ([], None),
    ],
)
def test_layout(functions: list[str], layout: str | None) -> None:
    chosen = choose(Symbols.of(Symbol(64 * n, name, "kvm_intel") for n, name in enumerate(functions, 1)))
    assert (chosen and chosen.name) == layout


def test_what_a_layout_probes() -> None:
    assert {layout.name: (layout.calls, layout.update, layout.filter_set) for layout in LAYOUTS} == {
        "recalc": ((SET,), RECALC, FILTER),
        "set": ((SET,), RECALC_MSR, FILTER),
        "toggle": ((ENABLE, DISABLE), HOOK, None),
        "filter-only": ((), HOOK, None),
    }


@given(st.sets(st.sampled_from([ENABLE, DISABLE, SET, HOOK, RECALC, RECALC_MSR, FILTER])))
def test_a_layout_has_something_to_probe_whenever_there_is_something(names: set[str]) -> None:
    chosen = choose(Symbols.of(Symbol(64, name, "kvm_intel") for name in names))
    if chosen is None:
        assert names <= {FILTER}
        return
    assert names & {*chosen.calls, chosen.update}
    assert bool(names & set(chosen.calls)) == bool(names & {ENABLE, DISABLE, SET})  # calls are never given up
