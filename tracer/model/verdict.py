# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the running kernel has the patch "KVM: VMX: Skip filter updates for MSRs that KVM is already intercepting".

Upstream d895f28ed6da, v6.0. Without it vmx_msr_filter_changed() in arch/x86/kvm/vmx/vmx.c calls
vmx_enable_intercept_for_msr() for each MSR of vmx_possible_passthrough_msrs[] that KVM intercepts anyway; with it,
only vmx_disable_intercept_for_msr() for those that KVM passes through. Both ask for reads and for writes by calls of
their own. Reads of the TSC are always passed through and writes to it never (vmx_vcpu_create(), 5.10 to 6.16), so every
filter update shows which of the two it is.

RULES is the one place that says what follows from which counts. judge() makes a report's sentence of them; dashboards/
makes the alert and the dashboard's queries of the same, and tests/dashboards/test_one_verdict.py gives all three the
same counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple, Protocol

from tracer.model.cause import FILTER_CHANGE
from tracer.model.sanitized import Sanitized, Text
from tracer.model.vendors import layouts

#: Every vmx_possible_passthrough_msrs[] there has been, arch/x86/kvm/vmx/vmx.c. Read: 5.10.13, 5.12.9, 5.14.2, 5.15.16,
#: 5.17, 5.19, 6.0, 6.3.8, 6.4.6, 6.8.1, 6.14, 6.16.1, Debian's 6.1 and 6.12, a Rocky Linux vendor's with KVM of about
#: 6.13. A kernel whose list has more has the TSC, too; and that one of these was enabled proves the old loop in any.
LOOP = (
    range(0x10, 0x11),  # TSC
    range(0x48, 0x4A),  # SPEC_CTRL, PRED_CMD
    range(0x10B, 0x10C),  # FLUSH_CMD: since 6.4
    range(0x174, 0x177),  # SYSENTER_CS, _ESP, _EIP
    range(0x1C4, 0x1C6),  # XFD, XFD_ERR: since 5.17
    range(0x3FC, 0x3FF),  # CORE_C3_, C6_, C7_RESIDENCY
    range(0x660, 0x661),  # CORE_C1_RES
    range(0xC0000100, 0xC0000103),  # FS_BASE, GS_BASE, KERNEL_GS_BASE
)
#: What vmx_msr_filter_changed() of the same kernels enables besides, with the patch and without. There is nothing else:
#: the MSRs of LBRs are asked for by vmx_vcpu_run() alone (vmx_update_intercept_for_lbr_msrs() in vmx/pmu_intel.c).
BESIDES = (
    # Intel PT, by pt_update_intercept_for_msr(): STATUS, OUTPUT_BASE, OUTPUT_MASK, CR3_MATCH, ADDRn_A and ADDRn_B of
    # each address range that the guest's CPUID has. That field has three bits (num_address_ranges in
    # arch/x86/events/intel/pt.c): seven ranges, though struct pt_ctx in vmx.h has room for four. Until 5.19 that is
    # done for every vCPU, since 6.0 where guests may have PT. CTL, among them, no kernel that was read asks for.
    range(0x560, 0x562),
    range(0x570, 0x573),
    range(0x580, 0x58E),
    # x2APIC: until 5.14 it ran vmx_update_msr_bitmap_x2apic(), which enables TMCCT after it rewrote the words: that may
    # well change a bit. kvm_msr_allowed() in arch/x86/kvm/x86.c has the whole range.
    range(0x800, 0x900),
)
#: The layouts whose calls show the patch, and those of which it is no longer a question.
JUDGED = tuple(layout.name for layout in layouts() if layout.enable and layout.disable)
SUPERSEDED = tuple(layout.name for layout in layouts() if layout.set_)


@dataclass(frozen=True)
class Calls:
    """Some of the calls that filter updates made: those for MSRS or, if `outside`, for all others."""

    action: str
    msrs: tuple[range, ...]
    outside: bool = False

    def has(self, row: Row) -> bool:
        """Whether a row of a report is of these."""
        listed = any(row.index in msrs for msrs in self.msrs)
        return row.cause == FILTER_CHANGE and row.action == self.action and listed != self.outside


#: The loop's enables, of which the patch leaves none; every enable that may be of a loop; what no kernel read asks for.
ENABLES = Calls("enable", LOOP)
ANY_ENABLES = Calls("enable", BESIDES, outside=True)
UNKNOWN_ENABLES = Calls("enable", (*LOOP, *BESIDES), outside=True)
#: What the loop passes through, with the patch and without.
DISABLES = Calls("disable", LOOP)


class Fact(Enum):
    """What can be the case on a host."""

    SUPERSEDED = auto()
    CALLS_UNSEEN = auto()
    #: Of a report alone, which is of one trace. Over weeks a reload must not be the end of all verdicts: the alert then
    #: goes by the calls of the last hour, the dashboard by those of the last minutes.
    RELOADED = auto()
    #: One of ANY_ENABLES changed a bit.
    CHANGED = auto()
    #: There were ENABLES. One is proof, even if the first update is not over yet, or updates cannot be counted.
    ENABLED = auto()
    UPDATES_UNSEEN = auto()
    NO_UPDATES = auto()
    #: There were UNKNOWN_ENABLES: a kernel that does what none does that was read.
    UNKNOWN = auto()
    #: A call can have escaped: a lost count, or a function without a probe. Not so a call that is under way: of an
    #: update that is over all calls but the last are counted, and no loop ends with the TSC.
    LOST = auto()
    #: Of an MSR of the loop one direction was passed through and the other was not: without the patch that one had been
    #: enabled.
    ONE_DIRECTION = auto()
    ANYTHING = auto()


class Rule(NamedTuple):
    """What follows from a fact. `why` is a sentence with names of the counts in it."""

    fact: Fact
    patched: bool | None
    why: str


#: The first whose fact is the case is the verdict.
RULES = (
    Rule(Fact.SUPERSEDED, None, "superseded: since 6.17 (8a056ece45d2) every update recomputes all intercepts"),
    Rule(Fact.CALLS_UNSEEN, None, "calls cannot be observed on this kernel (layout {layout})"),
    Rule(Fact.RELOADED, None, "kvm_intel was reloaded during the trace, so the counts may be of two modules"),
    Rule(
        Fact.CHANGED,
        None,
        "{changed:,} of {any_enables:,} enables in filter updates changed a bit{unread}: neither kernel does that",
    ),
    Rule(Fact.ENABLED, False, "{enables:,} calls in {updates} enabled the interception of MSRs{intercepted}"),
    Rule(Fact.UPDATES_UNSEEN, None, "filter updates could not be observed"),
    Rule(Fact.NO_UPDATES, None, "too little seen: no vCPU applied a changed MSR filter"),
    Rule(
        Fact.UNKNOWN,
        None,
        "{unknown:,} calls in {updates} enabled the interception of MSRs for which no known kernel does so",
    ),
    Rule(Fact.LOST, None, "something was not seen, so that no enable was counted proves nothing"),
    Rule(
        Fact.ONE_DIRECTION,
        True,
        "{updates} asked for the MSRs that KVM passes through and left alone those that it intercepts",
    ),
    Rule(
        Fact.ANYTHING,
        None,
        "too little seen: no MSR of which KVM passes one direction through and intercepts the other",
    ),
)


class Verdict(Sanitized, frozen=True, kw_only=True):
    """`patched` is null where the trace proves neither; `why` says in a sentence what was seen."""

    patched: bool | None
    why: Text


#: `patched` in words.
PATCH = {True: "patch present", False: "patch missing", None: "patch undecided"}


class Row(Protocol):
    """The part of a report's row that a verdict needs."""

    @property
    def index(self) -> int:
        """The MSR's number."""

    @property
    def access(self) -> str:
        """Of read, write and read_write."""

    @property
    def action(self) -> str:
        """Of enable and disable."""

    @property
    def cause(self) -> str:
        """Why KVM called."""

    @property
    def calls(self) -> int:
        """How often."""

    @property
    def redundant(self) -> int | None:
        """How often nothing changed, if known."""


def judge(
    *, layout: str, calls_observable: bool, incomplete: bool, reloaded: bool, updates: int | None, rows: Sequence[Row]
) -> Verdict:
    """The verdict on ROWS, the calls of a trace with UPDATES filter updates (None: they could not be counted)."""

    def of(calls: Calls) -> Iterator[Row]:
        return (row for row in rows if row.calls and calls.has(row))

    def count(calls: Calls) -> int:
        return sum(row.calls for row in of(calls))

    changed = sum(row.calls - row.redundant for row in of(ANY_ENABLES) if row.redundant is not None)
    halves = {access: {row.index for row in of(DISABLES) if row.access == access} for access in ("read", "write")}
    facts = {
        Fact.SUPERSEDED: layout in SUPERSEDED,
        Fact.CALLS_UNSEEN: not calls_observable or layout not in JUDGED,
        Fact.RELOADED: reloaded,
        Fact.CHANGED: changed > 0,
        Fact.ENABLED: count(ENABLES) > 0,
        Fact.UPDATES_UNSEEN: updates is None,
        Fact.NO_UPDATES: updates == 0,
        Fact.UNKNOWN: count(UNKNOWN_ENABLES) > 0,
        Fact.LOST: incomplete,
        Fact.ONE_DIRECTION: halves["read"] != halves["write"],
        Fact.ANYTHING: True,
    }
    rule = next(rule for rule in RULES if facts[rule.fact])
    seen = all(row.redundant is not None for row in of(ENABLES))
    return Verdict(
        patched=rule.patched,
        why=rule.why.format(
            layout=layout,
            changed=changed,
            any_enables=count(ANY_ENABLES),
            unread=", or could not be seen to its end" if incomplete else "",
            enables=count(ENABLES),
            unknown=count(UNKNOWN_ENABLES),
            updates=_updates(updates),
            intercepted=" that were intercepted already" if seen else _UNSEEN,
        ),
    )


_UNSEEN = ", which a patched kernel never does there (whether they changed anything could not be seen)"


def _updates(count: int | None) -> str:
    return f"{count:,} filter update" + ("" if count == 1 else "s") if count else "filter updates"
