# SPDX-License-Identifier: GPL-2.0-or-later
"""Exits of guests' RDMSR and WRMSR: which there are, and the functions of KVM that run once in each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FAST, SLOW = "fast", "slow"
OK, FILTERED, UNKNOWN, INVALID, REFLECTED = "ok", "filtered", "unknown", "invalid", "reflected"
L1, L2 = "l1", "l2"
#: What became of the access, in words.
RESULTS = {
    OK: "KVM performed it",
    FILTERED: "refused: the VM's filter denies it",
    UNKNOWN: "refused: KVM does not know the MSR",
    INVALID: "refused: KVM does not take it, such as the value written",
    REFLECTED: "left to the guest, whose own guest it is from (nested)",
}


@dataclass(frozen=True)
class Exit:
    """A kind of exit. `pid` is the VMM's, or 0 where counts are not broken down by VM.

    `msr` is msr.OTHER where guests accessed more MSRs than there are places; `pid` is then 0, too.
    """

    msr: int
    access: str  # read or write
    path: str  # fast: handled with interrupts off, right after the exit; or slow
    result: str  # one of RESULTS
    guest: str  # l1, or l2: a guest's guest
    pid: int = 0


@dataclass(frozen=True)
class ExitFunctions:
    """The functions of KVM that handle such exits, by any of their names; those that not every kernel has are `more`.

    arch/x86/kvm/x86.c (7.3: msrs.c), 5.10 to 7.3: all of kvm, called from the vendors' modules, so never inlined.
    """

    read: str = "kvm_emulate_rdmsr"
    write: str = "kvm_emulate_wrmsr"
    #: Run before `write`, with interrupts off, and handle some writes completely.
    write_fast: tuple[str, ...] = ("handle_fastpath_wrmsr", "handle_fastpath_set_msr_irqoff")
    #: With the MSR in the instruction (6.18+, Debian's 6.17).
    read_imm: str = "kvm_emulate_rdmsr_imm"
    write_imm: str = "kvm_emulate_wrmsr_imm"
    write_fast_imm: str = "handle_fastpath_wrmsr_imm"
    #: Runs where the access is refused: kvm_msr_user_space(vcpu, index, exit_reason, data, completion, r)
    refused: str = "kvm_msr_user_space"

    #: What `refused` is to have run later: of exits, and not of the instruction emulator's accesses. Before 5.11 there
    #: is no difference. By the members of struct values in bpf/exits.c.
    completions: Mapping[str, str] = field(
        default_factory=lambda: {
            "complete_read": "complete_fast_rdmsr",
            "complete_write": "complete_fast_msr_access",
            "complete_read_imm": "complete_fast_rdmsr_imm",
        }
    )

    @property
    def all(self) -> frozenset[str]:
        """Every name of them: without a probe on one that a kernel has, exits are missing, or their results."""
        return frozenset((self.read, self.write, *self.write_fast, *self.immediate, self.refused))

    @property
    def immediate(self) -> tuple[str, ...]:
        """Those for instructions that contain the MSR."""
        return (self.read_imm, self.write_imm, self.write_fast_imm)


EXIT_FUNCTIONS = ExitFunctions()
