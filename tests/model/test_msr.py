# SPDX-License-Identifier: GPL-2.0-or-later
"""Names of MSRs: the table in the package, and the program that makes it."""

import re
from pathlib import Path

import pytest
from known import kernel_of

from tracer.model.msr import NAMES, generate, hexadecimal, name, number, table

# Where MSRs are: SDM vol. 4 and AMD's APM vol. 2 (the two bitmap ranges and AMD's third),
# Hyper-V's and KVM's synthetic ones, Transmeta's.
RANGES = [
    range(0x2000),
    range(0x40000000, 0x40002000),
    range(0x4B564D00, 0x4B564E00),
    range(0x80868000, 0x80869000),
    range(0xC0000000, 0xC0020000),
]


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        # all that kvm_intel has let through to a guest, from 5.10 to 7.2
        (0x10, "IA32_TSC"),
        (0x48, "IA32_SPEC_CTRL"),
        (0x49, "IA32_PRED_CMD"),
        (0x10B, "IA32_FLUSH_CMD"),
        (0x174, "IA32_SYSENTER_CS"),
        (0x175, "IA32_SYSENTER_ESP"),
        (0x176, "IA32_SYSENTER_EIP"),
        (0x1C4, "IA32_XFD"),
        (0x1C5, "IA32_XFD_ERR"),
        (0x3FC, "CORE_C3_RESIDENCY"),
        (0x3FD, "CORE_C6_RESIDENCY"),
        (0x3FE, "CORE_C7_RESIDENCY"),
        (0x660, "CORE_C1_RES"),
        (0xE7, "IA32_MPERF"),
        (0xE8, "IA32_APERF"),
        (0x6A0, "IA32_U_CET"),
        (0x6A4, "IA32_PL0_SSP"),
        (0xC0000100, "FS_BASE"),
        (0xC0000101, "GS_BASE"),
        (0xC0000102, "KERNEL_GS_BASE"),
        # processor trace
        (0x560, "IA32_RTIT_OUTPUT_BASE"),
        (0x561, "IA32_RTIT_OUTPUT_MASK"),
        (0x570, "IA32_RTIT_CTL"),
        (0x571, "IA32_RTIT_STATUS"),
        (0x572, "IA32_RTIT_CR3_MATCH"),
        (0x580, "IA32_RTIT_ADDR0_A"),
        (0x587, "IA32_RTIT_ADDR3_B"),
        # branch records
        (0x1C8, "LBR_SELECT"),
        (0x40, "LBR_CORE_FROM"),
        (0x47, "LBR_CORE_FROM_7"),
        (0x67, "LBR_CORE_TO_7"),
        (0x680, "LBR_NHM_FROM"),
        (0x690, "LBR_NHM_FROM_16"),
        (0x69F, "LBR_NHM_FROM_31"),
        (0x6DF, "LBR_NHM_TO_31"),
        (0xDC0, "LBR_INFO_0"),
        (0xDDF, "LBR_INFO_31"),
        (0x151F, "ARCH_LBR_FROM_31"),
        (0x161F, "ARCH_LBR_TO_31"),
        (0x121F, "ARCH_LBR_INFO_31"),
        # counters
        (0xC1, "IA32_PERFCTR0"),
        (0xC8, "IA32_PERFCTR7"),
        (0x186, "ARCH_PERFMON_EVENTSEL0"),
        (0x18D, "ARCH_PERFMON_EVENTSEL7"),
        (0x4C1, "IA32_PMC0"),
        (0x4C8, "IA32_PMC7"),
        (0x309, "CORE_PERF_FIXED_CTR0"),
        (0x30B, "CORE_PERF_FIXED_CTR2"),
        (0x318, "CORE_PERF_FIXED_CTR15"),
        (0x38F, "CORE_PERF_GLOBAL_CTRL"),
        (0x1904, "IA32_PMC_V6_GP1_CTR"),
        (0x197F, "IA32_PMC_V6_GP31_CFG_C"),
        (0x1980, "IA32_PMC_V6_FX0_CTR"),
        # the local APIC
        (0x802, "X2APIC_ID"),
        (0x808, "X2APIC_TPR"),
        (0x80B, "X2APIC_EOI"),
        (0x810, "X2APIC_ISR"),
        (0x817, "X2APIC_ISR_7"),
        (0x818, "X2APIC_TMR"),
        (0x820, "X2APIC_IRR"),
        (0x830, "X2APIC_ICR"),
        (0x839, "X2APIC_TMCCT"),
        (0x83F, "X2APIC_SELF_IPI"),
        # others a guest uses
        (0x1B, "IA32_APICBASE"),
        (0x277, "IA32_CR_PAT"),
        (0x200, "MTRRphysBase0"),
        (0x20F, "MTRRphysMask7"),
        (0x401, "IA32_MC0_STATUS"),
        (0x47F, "IA32_MC31_MISC"),
        (0x480, "IA32_VMX_BASIC"),
        (0x6E0, "IA32_TSC_DEADLINE"),
        (0xC0000080, "EFER"),
        (0xC0000082, "LSTAR"),
        (0xC0000084, "SYSCALL_MASK"),
        (0x4B564D00, "KVM_WALL_CLOCK_NEW"),
        (0x40000000, "HV_X64_MSR_GUEST_OS_ID"),
        (0x4000009F, "HV_X64_MSR_SINT15"),
    ],
)
def test_names_kvm_developers_know(index: int, expected: str) -> None:
    assert name(index) == expected


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        # direct_access_msrs[], arch/x86/kvm/svm/svm.c of 6.12, which has all that 5.10 to 6.16 have
        (0xC0000081, "STAR"),
        (0x174, "IA32_SYSENTER_CS"),
        (0x176, "IA32_SYSENTER_EIP"),
        (0x175, "IA32_SYSENTER_ESP"),
        (0xC0000101, "GS_BASE"),
        (0xC0000100, "FS_BASE"),
        (0xC0000102, "KERNEL_GS_BASE"),
        (0xC0000082, "LSTAR"),
        (0xC0000083, "CSTAR"),
        (0xC0000084, "SYSCALL_MASK"),
        (0x48, "IA32_SPEC_CTRL"),
        (0x49, "IA32_PRED_CMD"),
        (0x10B, "IA32_FLUSH_CMD"),
        (0x1D9, "IA32_DEBUGCTLMSR"),
        (0x1DB, "IA32_LASTBRANCHFROMIP"),
        (0x1DC, "IA32_LASTBRANCHTOIP"),
        (0x1DD, "IA32_LASTINTFROMIP"),
        (0x1DE, "IA32_LASTINTTOIP"),
        (0xDA0, "IA32_XSS"),
        (0xC0000080, "EFER"),
        (0x277, "IA32_CR_PAT"),
        (0xC0010130, "AMD64_SEV_ES_GHCB"),
        (0xC0000103, "TSC_AUX"),
        (0x802, "X2APIC_ID"),
        (0x803, "X2APIC_LVR"),
        (0x808, "X2APIC_TPR"),
        (0x809, "X2APIC_APR"),
        (0x80A, "X2APIC_PPR"),
        (0x80B, "X2APIC_EOI"),
        (0x80C, "X2APIC_RRR"),
        (0x80D, "X2APIC_LDR"),
        (0x80E, "X2APIC_DFR"),
        (0x80F, "X2APIC_SPIV"),
        (0x810, "X2APIC_ISR"),
        (0x818, "X2APIC_TMR"),
        (0x820, "X2APIC_IRR"),
        (0x828, "X2APIC_ESR"),
        (0x830, "X2APIC_ICR"),
        (0x831, "X2APIC_ICR2"),
        (0x833, "X2APIC_LVTTHMR"),
        (0x834, "X2APIC_LVTPC"),
        (0x835, "X2APIC_LVT0"),
        (0x836, "X2APIC_LVT1"),
        (0x837, "X2APIC_LVTERR"),
        (0x838, "X2APIC_TMICT"),
        (0x839, "X2APIC_TMCCT"),
        (0x83E, "X2APIC_TDCR"),
        # svm_recalc_msr_intercepts() of 6.17 and newer, with CET (6.18) and the counters (7.2)
        (0xE7, "IA32_MPERF"),
        (0xE8, "IA32_APERF"),
        (0x6A0, "IA32_U_CET"),
        (0x6A2, "IA32_S_CET"),
        (0x6A4, "IA32_PL0_SSP"),
        (0x6A7, "IA32_PL3_SSP"),
        (0xC0010004, "K7_PERFCTR0"),
        (0xC0010007, "K7_PERFCTR3"),
        (0xC0010201, "F15H_PERF_CTR0"),
        (0xC0010203, "F15H_PERF_CTR1"),
        (0xC001020B, "F15H_PERF_CTR5"),
        (0xC0000300, "AMD64_PERF_CNTR_GLOBAL_STATUS"),
        (0xC0000301, "AMD64_PERF_CNTR_GLOBAL_CTL"),
        (0xC0000302, "AMD64_PERF_CNTR_GLOBAL_STATUS_CLR"),
        (0xC0000303, "AMD64_PERF_CNTR_GLOBAL_STATUS_SET"),
        (0xC0010134, "AMD64_GUEST_TSC_FREQ"),
        # others that a guest uses
        (0x8B, "IA32_UCODE_REV"),
        (0xC0010000, "K7_EVNTSEL0"),
        (0xC0010200, "F15H_PERF_CTL0"),
        (0xC001020A, "F15H_PERF_CTL5"),
        (0xC0010015, "K7_HWCR"),
        (0xC0010114, "VM_CR"),
        (0xC001011F, "AMD64_VIRT_SPEC_CTRL"),
        (0xC0000104, "AMD64_TSC_RATIO"),
    ],
)
def test_names_on_hosts_with_an_amd_cpu(index: int, expected: str) -> None:
    assert name(index) == expected


@pytest.mark.parametrize("index", [0x800, 0x801, 0x804, 0x82E, 0x1FFF, 0x12345678, 0xFFFFFFFF])
def test_an_index_without_a_name_is_shown_in_hexadecimal(index: int) -> None:
    assert index not in NAMES
    assert name(index) == hexadecimal(index)


def test_hexadecimal_is_lower_case_and_as_short_as_it_gets() -> None:
    assert hexadecimal(0x48) == "0x48"
    assert hexadecimal(0xC0000100) == "0xc0000100"
    assert hexadecimal(0) == "0x0"


def test_every_entry_is_an_index_with_a_name_of_its_own() -> None:
    assert list(NAMES) == sorted(NAMES)
    assert len(set(NAMES.values())) == len(NAMES)
    for index, given in NAMES.items():
        assert any(index in numbers for numbers in RANGES), hexadecimal(index)
        assert re.fullmatch(r"[A-Za-z]\w+", given, re.ASCII), given
        assert not given.startswith("MSR_")
        assert not given.endswith(("_BIT", "_SHIFT", "_RSVD")), given


def test_the_local_apic_is_all_there() -> None:
    given = {index for index in NAMES if index in range(0x800, 0x900)}
    single = {0x802, 0x803, 0x828, 0x82F, 0x83E, 0x83F}
    assert given == single | set(range(0x808, 0x828)) | set(range(0x830, 0x83A))


MSR_INDEX = """
#ifndef _ASM_X86_MSR_INDEX_H
#define _ASM_X86_MSR_INDEX_H
#define MSR_FS_BASE\t\t0xc0000100 /* 64bit FS base */
#  define MSR_TSC_AUX\t0xC0000103UL // with a suffix
/* #define MSR_COMMENTED_OUT 0x99
 * #define MSR_COMMENTED_OUT_TOO 0x9a */
#define MSR_TEST_CTRL\t0x33
#define MSR_TEST_CTRL_SPLIT_LOCK_DETECT_BIT 29
#define MSR_TEST_CTRL_SPLIT_LOCK_DETECT BIT(MSR_TEST_CTRL_SPLIT_LOCK_DETECT_BIT)
#define MSR_TEST_CTRL_HEX_BIT 0x1d
#define MSR_TEST_CTRL_HEX_SHIFT 0x1d
#define MSR_TEST_CTRL_MASK 0xff
#define MSR_TEST_CTRL_RSVD 0xffc
#define MSR_TEST_CTRL_ON (1 << 8)
#define MSR_TEST_CTRL_FIELD GENMASK_ULL(10, 9)
#define MSR_TEST_CTRL_INVERTED (~0x03U)
#define MSR_TEST_CTRL_WIDE 0x1fffffffffULL
#define MSR_SYSCALL_MASK 0xc0000084
#define MSR_COUNT 8
#define MSR_FUNCTION(x) (MSR_TEST_CTRL + (x))
#define MSR_CONTINUED \\
\t0x34
#define SPEC_CTRL_IBRS 0x1
#define MSR_IA32_PL0_SSP 0x6a4
#define MSR_F15H_PERF_CTL1 (MSR_F15H_PERF_CTL + 2)
#define MSR_F15H_PERF_CTL 0xc0010200
#define MSR_F15H_PERF_CTL0 MSR_F15H_PERF_CTL
#define MSR_HEX_OFFSET ((MSR_F15H_PERF_CTL + 0x10))
#define MSR_TO_NOTHING MSR_NOT_DEFINED
#define MSR_TO_A_BIT MSR_TEST_CTRL_SPLIT_LOCK_DETECT_BIT
#define MSR_CIRCLE_A MSR_CIRCLE_B
#define MSR_CIRCLE_B MSR_CIRCLE_A

#define MSR_P6_PERFCTR0 0xc1
#define MSR_IDT_SOMETHING 0xc1
#define MSR_IA32_PERFCTR0 0xc1
#define MSR_K6_WHCR 0xc0000082
#define MSR_LSTAR 0xc0000082
#define MSR_IA32_FRED_SSP0 MSR_IA32_PL0_SSP
#define MSR_IA32_MCG_EBP 0x186
#define MSR_P6_EVNTSEL0 0x186
#define MSR_ATOM_PKG_C6_RESIDENCY 0x3fa
#define MSR_PKG_C7_RESIDENCY 0x3fa
#define MSR_AMD64_PATCH_LEVEL 0x8b
#define MSR_IA32_UCODE_REV 0x8b
#define MSR_FIRST 0x35
#define MSR_SECOND 0x35
#endif
"""

APICDEF = """
#define\tAPIC_ID\t\t0x20
#define\tAPIC_TASKPRI\t0x80
#define\t\tAPIC_TPRI_MASK\t\t0xFFu
#define\tAPIC_ARBPRI\t0x90
#define\tAPIC_ISR\t0x100
#define\tAPIC_ISR_NR     0x8     /* Number of 32 bit ISR registers. */
#define\t\tAPIC_ESR_RECVILL\t0x00040
#define \tAPIC_LVTCMCI\t0x2f0
#define\t\tAPIC_DM_LOWEST\t\t0x00100
#define\t\t\tAPIC_MODE_FIXED\t\t0x0
#define\t\tAPIC_MODE_MASK\t\t\t0x700
#define APIC_SELF_IPI\t0x3F0
#define\t\tAPIC_TDR_DIV_1\t\t0xB
#define APIC_BASE_MSR\t\t0x800
"""

HYPERV = """
#define HV_X64_MSR_HYPERCALL 0x40000001
#define HV_X64_MSR_HYPERCALL_ENABLE 0x00000001
#define HV_X64_MSR_TSC_REFERENCE_ENABLE 0x00000001
#define HV_REGISTER_VP_INDEX 0x40000002
#define HV_X64_MSR_VP_INDEX HV_REGISTER_VP_INDEX
#define HV_X64_MSR_CRASH_PARAMS (1 + (HV_X64_MSR_CRASH_P4 - HV_X64_MSR_CRASH_P0))
#define HV_MSR_HYPERCALL (HV_X64_MSR_HYPERCALL)
"""


HYPERV_PLACE = "include/hyperv/hvgdk_mini.h"


def write_tree(tree: Path, msr_index: str = MSR_INDEX, hyperv: str = HYPERV_PLACE) -> Path:
    for path, text in {
        "Makefile": "# SPDX\nVERSION = 6\nPATCHLEVEL = 99\nSUBLEVEL = 3\nEXTRAVERSION =\n",
        "arch/x86/include/asm/msr-index.h": msr_index,
        "arch/x86/include/asm/perf_event.h": "#define MSR_ARCH_PERFMON_EVENTSEL0 0x186\n",
        "arch/x86/include/asm/mce.h": "#define MSR_AMD64_SMCA_MC0_CTL 0xc0002000\n",
        "arch/x86/include/uapi/asm/kvm_para.h": "#define MSR_KVM_STEAL_TIME 0x4b564d03\n",
        "arch/x86/include/asm/apicdef.h": APICDEF,
        hyperv: HYPERV,
    }.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
    return tree


@pytest.fixture
def fixture_names(tmp_path: Path) -> dict[int, str]:
    return generate.names_in(write_tree(tmp_path))


def test_headers_are_read_for_indices_and_nothing_else(fixture_names: dict[int, str]) -> None:
    families = {
        *range(0xC2, 0xCB),
        *range(0x187, 0x190),
        *range(0x200, 0x214),
        *range(0x811, 0x818),
    }
    assert {k: v for k, v in fixture_names.items() if k not in families} == {
        0x33: "TEST_CTRL",
        0x34: "CONTINUED",
        0x35: "FIRST",
        0x8B: "IA32_UCODE_REV",
        0xC1: "IA32_PERFCTR0",
        0x186: "ARCH_PERFMON_EVENTSEL0",
        0x3FA: "PKG_C7_RESIDENCY",
        0x6A4: "IA32_PL0_SSP",
        0x802: "X2APIC_ID",
        0x808: "X2APIC_TPR",
        0x809: "X2APIC_APR",
        0x810: "X2APIC_ISR",
        0x82F: "X2APIC_LVTCMCI",
        0x83F: "X2APIC_SELF_IPI",
        0x40000001: "HV_X64_MSR_HYPERCALL",
        0x40000002: "HV_X64_MSR_VP_INDEX",
        0x4B564D03: "KVM_STEAL_TIME",
        0xC0000082: "LSTAR",
        0xC0000084: "SYSCALL_MASK",
        0xC0000100: "FS_BASE",
        0xC0000103: "TSC_AUX",
        0xC0002000: "AMD64_SMCA_MC0_CTL",
        0xC0010200: "F15H_PERF_CTL0",
        0xC0010202: "F15H_PERF_CTL1",
        0xC0010210: "HEX_OFFSET",
    }
    assert families <= set(fixture_names)


def test_families_go_as_far_as_the_architecture(fixture_names: dict[int, str]) -> None:
    assert [fixture_names[0xC1 + n] for n in range(10)] == [f"IA32_PERFCTR{n}" for n in range(10)]
    assert 0xCB not in fixture_names
    assert fixture_names[0x18F] == "ARCH_PERFMON_EVENTSEL9"
    assert fixture_names[0x817] == "X2APIC_ISR_7"
    # a family whose base the headers do not have does not exist for that kernel
    assert 0x1500 not in fixture_names


def test_the_first_tree_wins(tmp_path: Path) -> None:
    new = write_tree(tmp_path / "new", "#define MSR_NEW_NAME 0x50\n")
    old = write_tree(tmp_path / "old", "#define MSR_OLD_NAME 0x50\n#define MSR_GONE 0x51\n")
    names = generate.merged([new, old])
    assert (names[0x50], names[0x51]) == ("NEW_NAME", "GONE")
    assert generate.merged([old, new])[0x50] == "OLD_NAME"


def test_the_old_place_of_the_hyperv_header(tmp_path: Path) -> None:
    tree = write_tree(tmp_path, hyperv="arch/x86/include/asm/hyperv-tlfs.h")
    assert generate.names_in(tree)[0x40000001] == "HV_X64_MSR_HYPERCALL"


def test_the_command_writes_a_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = write_tree(tmp_path / "a tree")
    output = tmp_path / "table.py"
    assert generate.main([str(tree), "-o", str(output)]) == 0
    text = output.read_text()
    assert f"python3 -m tracer.model.msr.generate \\\n#         '{tree}' -o {output}\n" in text
    assert "Linux 6.99.3." in text
    assert text.startswith("# SPDX-License-Identifier: GPL-2.0-or-later\n# Made from ")
    module: dict[str, object] = {}
    exec(compile(text, str(output), "exec"), module)
    assert module["NAMES"] == generate.names_in(tree)

    assert generate.main([str(tree)]) == 0
    assert "NAMES: dict[int, str] = {\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("arch/x86/include/asm/msr-index.h", "no arch/x86/include/asm/msr-index.h in "),
        ("include/hyperv/hvgdk_mini.h", " or arch/x86/include/asm/hyperv-tlfs.h in "),
        ("arch/x86/include/asm/apicdef.h", "apicdef.h in "),
        ("Makefile", "no Makefile in "),
    ],
)
def test_a_missing_header_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str, named: str
) -> None:
    tree = write_tree(tmp_path)
    (tree / missing).unlink()
    output = tmp_path / "table.py"
    assert generate.main([str(tree), "-o", str(output)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert named in captured.err
    assert str(tree) in captured.err
    assert "linux-headers-VERSION-common" in captured.err
    assert not output.exists()


def test_what_is_no_tree_is_one_clear_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tree = write_tree(tmp_path)
    for arguments in ([str(tmp_path / "none")], [str(tree), "-o", str(tmp_path / "no" / "file")]):
        assert generate.main(arguments) == 1
        assert capsys.readouterr().err.count("\n") == 1
    (tree / "Makefile").write_text("all:\n")
    assert generate.main([str(tree)]) == 1
    assert "no kernel version" in capsys.readouterr().err


@pytest.mark.timeout(900)  # it may download the kernel
def test_the_table_against_the_headers_of_a_host() -> None:
    [tree] = (kernel_of("bookworm") / "usr/src").glob("linux-headers-*-common")
    names = generate.names_in(tree)
    absent = {hexadecimal(index): given for index, given in names.items() if index not in NAMES}
    assert not absent, f"{tree} names MSRs that tracer/model/msr/table.py lacks: make it again"
    # 5.10 has 949, 7.2 has 1218: far fewer means headers that are no longer understood
    assert len(names) > 900
    made_from = (Path(table.__file__)).read_text().partition("# Headers: Linux ")[2]
    if made_from.startswith(f"{generate.kernel_version(tree)}."):
        assert names == NAMES


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("0x48", 0x48),
        ("0xC0000100", 0xC0000100),
        ("72", 72),
        ("0", 0),
        ("0xffffffff", 0xFFFFFFFF),
        ("IA32_SPEC_CTRL", 0x48),
        ("MSR_IA32_SPEC_CTRL", 0x48),
        ("spec_ctrl", 0x48),
        ("fs_base", 0xC0000100),
        ("0x100000000", None),
        ("-1", None),
        ("", None),
        ("c0000100", None),
        ("SPEC", None),
        ("0x", None),
        ("4\u0662", 42),  # what int() takes; it does no harm
    ],
)
def test_an_msr_by_its_number_or_its_name(text: str, index: int | None) -> None:
    assert number(text) == index


def test_every_name_is_that_of_its_msr() -> None:
    assert [index for index, known in NAMES.items() if number(known) != index] == []
