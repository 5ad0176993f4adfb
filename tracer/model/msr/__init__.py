# SPDX-License-Identifier: GPL-2.0-or-later
"""Names of model-specific registers, as the kernel's own headers give them."""

from tracer.model.msr.table import NAMES

__all__ = ["NAMES", "OTHER", "hexadecimal", "name", "number"]

#: In an MSR's place where all further MSRs are counted together.
OTHER = -1


def name(index: int) -> str:
    """The kernel's name of an MSR without its leading ``MSR_``, or `hexadecimal` of it.

    :param index: the 32-bit number that RDMSR and WRMSR take in ECX

    ``name(0x48)`` is ``IA32_SPEC_CTRL``. KVM's own registers are ``KVM_*``
    (asm/kvm_para.h), Hyper-V's keep their whole name ``HV_X64_MSR_*``, the local
    APIC's in x2APIC mode are ``X2APIC_*``. Where the headers give several names,
    `tracer.model.msr.generate` says which one is taken.
    """
    return NAMES.get(index) or hexadecimal(index)


def hexadecimal(index: int) -> str:
    """An MSR index as in the ``msr`` label of the metrics: ``0x48``, ``0xc0000100``; ``other`` for OTHER."""
    return "other" if index == OTHER else f"{index:#x}"


def number(text: str) -> int | None:
    """The index of an MSR given as a number (``0x48``, ``72``) or by its name, in either case, or None.

    Names are those of `name`, with or without their beginnings ``MSR_`` and ``IA32_``.
    """
    try:
        found = int(text, 0)
    except ValueError:
        wanted = text.upper().removeprefix("MSR_")
        names = {name.upper(): index for index, name in NAMES.items()}
        return next((names[one] for one in (wanted, f"IA32_{wanted}") if one in names), None)
    return found if 0 <= found < 1 << 32 else None
