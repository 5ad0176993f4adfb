# SPDX-License-Identifier: GPL-2.0-or-later
"""Make `tracer.model.msr.table` from the headers of a kernel.

    python3 -m tracer.model.msr.generate HEADERS_DIR... [-o FILE]

HEADERS_DIR is a "common" header tree: Debian's linux-headers-VERSION-common, installed at
/usr/src/linux-headers-VERSION-common. Several may be given, the most trusted first: a
later tree only adds the indices that the earlier ones do not name.

What is an index: a ``#define`` that starts with ``MSR_`` (``HV_X64_MSR_`` in the Hyper-V
header) whose value is a hexadecimal number, another such name, or such a name plus a number.
Bit numbers and counts are decimal, bits and masks are made with ``BIT()`` or ``<<``, so they
never match. `_is_field` excludes the rest.

Which name is taken when there are several:

1. ``IA32_*``, the architectural registers;
2. names that say neither vendor nor model (``CORE_PERF_FIXED_CTR0``);
3. names of one Intel model (``P4_*``, ``P6_*``, ``ATOM_*``...), and ``IA32_MCG_EAX`` to
   ``IA32_MCG_RESERVED`` of the Pentium 4, whose indices are now event selectors;
4. names of AMD's and of other vendors' registers.

One table does for Intel's and AMD's CPUs: the only number with names of both is 0x8b, on both
the revision of the microcode (``IA32_UCODE_REV``, ``AMD64_PATCH_LEVEL``).

Among equals a name defined as a number goes before one defined as another name, then the
one that comes first in the headers. `_PREFERRED` overrides these rules where they are wrong.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# Each row is one header, with the paths it has had, the newest first.
_HEADERS = (
    ("arch/x86/include/asm/msr-index.h",),
    ("arch/x86/include/asm/perf_event.h",),
    ("arch/x86/include/asm/mce.h",),
    ("arch/x86/include/uapi/asm/kvm_para.h",),
    # 6.14 replaced hyperv-tlfs.h by headers that follow Microsoft's.
    ("include/hyperv/hvgdk_mini.h", "arch/x86/include/asm/hyperv-tlfs.h"),
)
_APIC_HEADER = ("arch/x86/include/asm/apicdef.h",)

_HYPERV = "HV_X64_MSR_"

# Where the synthetic MSRs of a hypervisor begin (Hyper-V TLFS; a field of one is smaller).
_HYPERV_FIRST = 0x40000000
_LAST_INDEX = 0xFFFFFFFF


class _Family(NamedTuple):
    """Registers numbered from 0, of which the headers may name only the first."""

    first: str | int
    pattern: str
    size: int
    stride: int = 1


# How long each family is, and the source of that. Only those that KVM walks in a loop
# (vmx_recalc_pmu_msr_intercepts, vmx_update_intercept_for_lbr_msrs, kvm_set_msr_common).
# The first keeps the name the headers give it.
_FAMILIES = (
    # General counters: 10, Intel SDM vol. 4 table 2-2 (IA32_PMC9, IA32_PERFEVTSEL9).
    _Family("MSR_IA32_PERFCTR0", "IA32_PERFCTR{}", 10),
    _Family("MSR_IA32_PMC0", "IA32_PMC{}", 10),
    _Family("MSR_ARCH_PERFMON_EVENTSEL0", "ARCH_PERFMON_EVENTSEL{}", 10),
    # Fixed counters: 16, INTEL_PMC_MAX_FIXED in asm/perf_event.h.
    _Family("MSR_CORE_PERF_FIXED_CTR0", "CORE_PERF_FIXED_CTR{}", 16),
    # Performance monitoring version 6: 32 general (INTEL_PMC_MAX_GENERIC) and 16 fixed
    # counters, MSR_IA32_PMC_V6_STEP = 4 apart.
    _Family("MSR_IA32_PMC_V6_GP0_CTR", "IA32_PMC_V6_GP{}_CTR", 32, 4),
    _Family("MSR_IA32_PMC_V6_GP0_CFG_A", "IA32_PMC_V6_GP{}_CFG_A", 32, 4),
    _Family("MSR_IA32_PMC_V6_GP0_CFG_B", "IA32_PMC_V6_GP{}_CFG_B", 32, 4),
    _Family("MSR_IA32_PMC_V6_GP0_CFG_C", "IA32_PMC_V6_GP{}_CFG_C", 32, 4),
    _Family("MSR_IA32_PMC_V6_FX0_CTR", "IA32_PMC_V6_FX{}_CTR", 16, 4),
    _Family("MSR_IA32_PMC_V6_FX0_CFG_B", "IA32_PMC_V6_FX{}_CFG_B", 16, 4),
    _Family("MSR_IA32_PMC_V6_FX0_CFG_C", "IA32_PMC_V6_FX{}_CFG_C", 16, 4),
    # Last branch records: 8 with the Core layout (Atom), 32 with the others (Skylake;
    # SDM vol. 4 for IA32_LBR_31_*; msr-index.h "... 0xddf for _31").
    _Family("MSR_LBR_CORE_FROM", "LBR_CORE_FROM_{}", 8),
    _Family("MSR_LBR_CORE_TO", "LBR_CORE_TO_{}", 8),
    _Family("MSR_LBR_NHM_FROM", "LBR_NHM_FROM_{}", 32),
    _Family("MSR_LBR_NHM_TO", "LBR_NHM_TO_{}", 32),
    _Family("MSR_LBR_INFO_0", "LBR_INFO_{}", 32),
    _Family("MSR_ARCH_LBR_FROM_0", "ARCH_LBR_FROM_{}", 32),
    _Family("MSR_ARCH_LBR_TO_0", "ARCH_LBR_TO_{}", 32),
    _Family("MSR_ARCH_LBR_INFO_0", "ARCH_LBR_INFO_{}", 32),
    # Machine check banks: 32, the VMX capability registers follow (MSR_IA32_MCx_CTL(x)).
    _Family("MSR_IA32_MC0_CTL", "IA32_MC{}_CTL", 32, 4),
    _Family("MSR_IA32_MC0_STATUS", "IA32_MC{}_STATUS", 32, 4),
    _Family("MSR_IA32_MC0_ADDR", "IA32_MC{}_ADDR", 32, 4),
    _Family("MSR_IA32_MC0_MISC", "IA32_MC{}_MISC", 32, 4),
    _Family("MSR_IA32_MC0_CTL2", "IA32_MC{}_CTL2", 32),
    # Variable memory type ranges: 10, SDM vol. 4 table 2-2. The header has a macro with an
    # argument only, MTRRphysBase_MSR() in uapi/asm/mtrr.h.
    _Family(0x200, "MTRRphysBase{}", 10, 2),
    _Family(0x201, "MTRRphysMask{}", 10, 2),
)

_X2APIC_FIRST = 0x800
# The local APIC's registers lie between these offsets (the ID, SELF_IPI).
_APIC_OFFSETS = range(0x20, 0x400, 0x10)

# The manuals' names, where the kernel's are not shorter and not used elsewhere. APR, RRR, DFR and ICR2 have no MSR on
# Intel's CPUs (SDM vol. 3, "x2APIC Register Address Space"), but with AVIC kvm_amd passes them through.
_X2APIC_RENAMED = {"TASKPRI": "TPR", "ARBPRI": "APR", "PROCPRI": "PPR"}
# These are 256 bits wide: eight registers each (APIC_ISR_NR in apicdef.h).
_X2APIC_WIDE = {"ISR", "TMR", "IRR"}

# KVM passes 0x690 through as a branch record (Skylake and later, MSR_LBR_NHM_FROM + 16); on
# Haswell it was CORE_PERF_LIMIT_REASONS, which KVM has nothing to do with. The first of AMD's
# counters has a number as the others have.
_PREFERRED = {0x690: "LBR_NHM_FROM_16", 0xC0010200: "F15H_PERF_CTL0", 0xC0010201: "F15H_PERF_CTR0"}

_PENTIUM_4_STATE = re.compile(r"IA32_MCG_(E(AX|BX|CX|DX|SI|DI|BP|SP|FLAGS|IP)|RESERVED)")
_INTEL_MODEL = re.compile(r"(P4|P6|KNC|KNL|ATOM)_")
_OTHER_VENDOR = re.compile(r"AMD|(K[678]|F1\dH|FAM10H|ZEN\d|IDT|VIA|TMTA|GEODE)_")

# The bits of a capability register, in 6.1 (a mask, but neither its name nor its value shows it).
_FIELDS = {"MSR_IA32_VMX_MISC_PREEMPTION_TIMER_SCALE"}

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_DEFINE = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)[ \t]+(\S.*?)[ \t]*$", re.MULTILINE)
_NUMBER = re.compile(r"(0[xX][0-9a-fA-F]+)[uUlL]*")
_REFERENCE = re.compile(r"([A-Za-z_]\w*)(?:\s*\+\s*(0[xX][0-9a-fA-F]+|\d+)[uUlL]*)?")


class HeadersError(Exception):
    """A header tree cannot be used; the message says which, and what it lacks."""


class _Candidate(NamedTuple):
    """One name for an index. The smallest by `order` is taken."""

    msr: int
    name: str
    order: tuple[int, bool, int]


def names_in(tree: Path) -> dict[int, str]:
    """Index -> name for every MSR that one header tree names, sorted by index.

    Raises HeadersError when a header is missing or cannot be read.
    """
    taken: dict[int, _Candidate] = {}
    for candidate in _candidates(tree):
        best = taken.setdefault(candidate.msr, candidate)
        if candidate.order < best.order:
            taken[candidate.msr] = candidate
    names = {index: candidate.name for index, candidate in taken.items()}
    names |= {index: name for index, name in _PREFERRED.items() if index in names}
    names.update(_x2apic(_defines(_read(tree, _APIC_HEADER))))
    return dict(sorted(names.items()))


def merged(trees: Iterable[Path]) -> dict[int, str]:
    """`names_in` of several trees; where they disagree, the first that names an index wins.

    Raises HeadersError as `names_in` does.
    """
    names: dict[int, str] = {}
    for tree in trees:
        names = names_in(tree) | names
    return dict(sorted(names.items()))


def kernel_version(tree: Path) -> str:
    """The kernel a header tree belongs to, such as ``7.2.13``, from its top Makefile.

    Raises HeadersError when there is no Makefile with a version.
    """
    text = _read(tree, ("Makefile",))
    found = [re.search(rf"^{key}\s*=\s*(\d+)\s*$", text, re.MULTILINE) for key in ("VERSION", "PATCHLEVEL", "SUBLEVEL")]
    if None in found:
        raise HeadersError(f"no kernel version in {tree / 'Makefile'}")
    return ".".join(match[1] for match in found if match)


def source(names: dict[int, str], command: str, versions: Sequence[str]) -> str:
    """The text of table.py.

    :param command: the command that made it, as comment lines
    :param versions: the kernel versions of the headers
    """
    # Capital digits are the way ruff formats them.
    rows = "".join(f'    0x{index:08X}: "{name}",\n' for index, name in names.items())
    return (
        "# SPDX-License-Identifier: GPL-2.0-or-later\n"
        "# Made from the kernel's headers, do not edit. The command that makes it:\n"
        "#\n"
        f"#     {command}\n"
        "#\n"
        f"# Headers: Linux {', then '.join(versions)}.\n"
        "\n"
        '"""MSR index -> name, see `tracer.model.msr.generate` for where the names come from."""\n'
        "\n"
        f"NAMES: dict[int, str] = {{\n{rows}}}\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, or 1 after one line on stderr."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python3 -m tracer.model.msr.generate",
        description="Make the table of MSR names from kernel headers.",
    )
    parser.add_argument("headers", metavar="HEADERS_DIR", nargs="+", type=Path)
    parser.add_argument("-o", metavar="FILE", dest="output", type=Path, help="default: stdout")
    options = parser.parse_args(given)
    try:
        text = source(
            merged(options.headers),
            f"{parser.prog} \\\n#         {shlex.join(given)}",
            [kernel_version(tree) for tree in options.headers],
        )
        if options.output is None:
            sys.stdout.write(text)
        else:
            options.output.write_text(text, encoding="ascii")
    except (HeadersError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def _read(tree: Path, places: Sequence[str]) -> str:
    """The text of the first of these files that a tree has."""
    for place in places:
        try:
            return (tree / place).read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise HeadersError(f"cannot read {tree / place}: {error.strerror}") from error
    raise HeadersError(
        f"no {' or '.join(places)} in {tree}: a tree as in the Debian package linux-headers-VERSION-common is needed"
    )


def _defines(text: str) -> dict[str, str]:
    """The ``#define``s of a header that have a value and no arguments, in its order.

    The first counts where a header has alternatives under ``#if``: x86 comes first in
    those that other architectures share.
    """
    text = _COMMENT.sub(" ", text.replace("\\\n", " "))
    defines: dict[str, str] = {}
    for match in _DEFINE.finditer(text):
        defines.setdefault(match[1], match[2])
    return defines


def _candidates(tree: Path) -> Iterator[_Candidate]:
    """Every name of every index in a tree, families included."""
    defines: dict[str, str] = {}
    for places in _HEADERS:
        for name, value in _defines(_read(tree, places)).items():
            defines.setdefault(name, value)
    indices = {
        name: index
        for name in defines
        if name.startswith(("MSR_", _HYPERV)) and (index := _index(name, defines)) is not None
    }
    order = iter(range(sys.maxsize))
    for name, index in indices.items():
        if not _is_field(name, index, indices):
            short = name.removeprefix("MSR_")
            reference = _NUMBER.fullmatch(_bare(defines[name])) is None
            yield _Candidate(index, short, (_rank(short), reference, next(order)))
    for family in _FAMILIES:
        first = indices.get(family.first) if isinstance(family.first, str) else family.first
        if first is None:
            continue
        for number in range(isinstance(family.first, str), family.size):
            name = family.pattern.format(number)
            index = first + number * family.stride
            yield _Candidate(index, name, (_rank(name), False, next(order)))


def _index(name: str, defines: dict[str, str]) -> int | None:
    """The value of a define, resolved through other defines; None unless it may be an index."""
    offset = 0
    for _ in range(len(defines)):  # a longer chain is a cycle
        value = _bare(defines.get(name, ""))
        if number := _NUMBER.fullmatch(value):
            return int(number[1], 16) + offset
        reference = _REFERENCE.fullmatch(value)
        if reference is None:
            return None
        name = reference[1]
        offset += int(reference[2] or "0", 0)
    return None


def _bare(value: str) -> str:
    """A define's value without the parentheses around it; ``(A)|(B)`` is unusable either way."""
    while value.startswith("(") and value.endswith(")"):
        value = value[1:-1].strip()
    return value


def _is_field(name: str, index: int, registers: Container[str]) -> bool:
    """Whether a define of hexadecimal value is a field of a register, not a register itself.

    MSR_IA32_BNDCFGS_RSVD is one: without the suffix it is the name of a register.
    MSR_SYSCALL_MASK and MSR_IA32_RTIT_OUTPUT_MASK are registers: there is no MSR_SYSCALL.
    """
    if name.startswith(_HYPERV) and index < _HYPERV_FIRST:
        return True
    if index > _LAST_INDEX or name in _FIELDS or name.endswith(("_BIT", "_SHIFT")):
        return True
    return name.endswith(("_MASK", "_RSVD")) and name.rpartition("_")[0] in registers


def _rank(name: str) -> int:
    """Which of the four kinds in this module's docstring a name belongs to."""
    if _OTHER_VENDOR.match(name):
        return 4
    if _INTEL_MODEL.match(name) or _PENTIUM_4_STATE.fullmatch(name):
        return 3
    return 1 if name.startswith("IA32_") else 2


def _x2apic(defines: dict[str, str]) -> dict[int, str]:
    """The local APIC's registers as MSRs: 0x800 + offset / 16 (X2APIC_MSR() in KVM).

    apicdef.h mixes offsets with the values of fields. An offset is written with at most
    three digits and no suffix; the values that could be mistaken for one have five.
    """
    names: dict[int, str] = {}
    for define, value in defines.items():
        register = define.removeprefix("APIC_")
        if register == define or not re.fullmatch(r"0x[0-9a-fA-F]{1,3}", value):
            continue
        offset = int(value, 16)
        if offset not in _APIC_OFFSETS:
            continue
        first = _X2APIC_FIRST + offset // 16
        name = f"X2APIC_{_X2APIC_RENAMED.get(register, register)}"
        names[first] = name
        if register in _X2APIC_WIDE:
            names.update({first + number: f"{name}_{number}" for number in range(1, 8)})
    return names


if __name__ == "__main__":
    sys.exit(main())
