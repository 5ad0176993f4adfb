# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the running kernel has the patch "KVM: VMX: Skip filter updates for MSRs that KVM is already intercepting".

Upstream d895f28ed6da, v6.0. Without it vmx_msr_filter_changed() in arch/x86/kvm/vmx/vmx.c calls
vmx_enable_intercept_for_msr() for each MSR of vmx_possible_passthrough_msrs[] that KVM intercepts anyway; with it,
only vmx_disable_intercept_for_msr() for those that KVM passes through. Both make separate calls for reads and for
writes. Reads of the TSC are always passed through and writes to it never (vmx_vcpu_create(), 5.10 to 6.16), so every
filter update shows which of the two kernels it is.

RULES is the only place that says what follows from which counts. judge() makes a report's sentence from them,
dashboards/ the alert and the dashboard's queries; tests/dashboards/test_one_verdict.py gives all three the same counts.
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
#: 6.13. A kernel with a longer list has the TSC, too; and an enable of one of these proves the old loop in any kernel.
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
#: What else vmx_msr_filter_changed() of the same kernels enables, with the patch and without. There is nothing more:
#: only vmx_vcpu_run() updates the intercepts of LBR MSRs (vmx_update_intercept_for_lbr_msrs() in vmx/pmu_intel.c).
ALSO_ENABLED = (
    # Intel PT, by pt_update_intercept_for_msr(): STATUS, OUTPUT_BASE, OUTPUT_MASK, CR3_MATCH, ADDRn_A and ADDRn_B of
    # each address range that the guest's CPUID has. That field has three bits (num_address_ranges in
    # arch/x86/events/intel/pt.c): seven ranges, though struct pt_ctx in vmx.h has room for four. Until 5.19 that is
    # done for every vCPU, since 6.0 where guests may have PT. CTL is in the range, too; no kernel read enables it.
    range(0x560, 0x562),
    range(0x570, 0x573),
    range(0x580, 0x58E),
    # x2APIC: until 5.14 it called vmx_update_msr_bitmap_x2apic(), which rewrites whole words and then enables TMCCT,
    # which may change a bit. kvm_msr_allowed() in arch/x86/kvm/x86.c has the whole range.
    range(0x800, 0x900),
)
#: The layouts whose calls show whether the patch is there, and those newer than the code that it changed.
JUDGED = tuple(layout.name for layout in layouts() if layout.enable and layout.disable)
SUPERSEDED = tuple(layout.name for layout in layouts() if layout.set_)


@dataclass(frozen=True)
class Calls:
    """Some of the calls that filter updates made: those for `msrs` or, if `outside`, for all others."""

    action: str
    msrs: tuple[range, ...]
    outside: bool = False

    def has(self, row: Row) -> bool:
        """Whether a row of a report counts such calls."""
        listed = any(row.index in msrs for msrs in self.msrs)
        return row.cause == FILTER_CHANGE and row.action == self.action and listed != self.outside


#: The loop's enables, all of which the patch removes; any that may be the loop's; those that no kernel read makes.
ENABLES = Calls("enable", LOOP)
ANY_ENABLES = Calls("enable", ALSO_ENABLED, outside=True)
UNKNOWN_ENABLES = Calls("enable", (*LOOP, *ALSO_ENABLED), outside=True)
#: What the loop passes through, with the patch and without.
DISABLES = Calls("disable", LOOP)


class Fact(Enum):
    """A fact about a host that decides the verdict."""

    SUPERSEDED = auto()
    CALLS_UNSEEN = auto()
    #: Only in a report, which covers one trace. Over weeks a reload must not prevent every later verdict, so the alert
    #: uses the calls of the last hour, and the dashboard those of the last minutes.
    RELOADED = auto()
    #: One of ANY_ENABLES changed a bit.
    CHANGED = auto()
    #: There were ENABLES. One is proof, even while the first update is in progress, or where updates cannot be counted.
    ENABLED = auto()
    UPDATES_UNSEEN = auto()
    NO_UPDATES = auto()
    #: There were UNKNOWN_ENABLES: the kernel does what none of those read does.
    UNKNOWN = auto()
    #: A call may have been missed: a lost count, or a function without a probe. A call in progress does not matter: all
    #: calls of a finished update but the last are counted, and no loop ends with the TSC.
    LOST = auto()
    #: One direction of an MSR of the loop was passed through and the other left alone: without the patch, the other
    #: would have been enabled.
    ONE_DIRECTION = auto()
    ANYTHING = auto()


class Rule(NamedTuple):
    """What follows from a fact. `why` is a format string that names the counts."""

    fact: Fact
    patched: bool | None
    why: str


#: The first rule whose fact holds gives the verdict.
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
    Rule(Fact.LOST, None, "calls may have been missed, so that no enable was counted proves nothing"),
    Rule(
        Fact.ONE_DIRECTION,
        True,
        "{updates} disabled intercepts of MSRs that KVM passes through and left those that it intercepts alone",
    ),
    Rule(
        Fact.ANYTHING,
        None,
        "too little seen: no MSR that KVM intercepts in one direction only",
    ),
)


class Verdict(Sanitized, frozen=True, kw_only=True):
    """`patched` is null where the trace proves neither; `why` is a sentence on what was seen."""

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
        """read, write or read_write."""

    @property
    def action(self) -> str:
        """enable or disable."""

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
    """The verdict on a trace: `rows` are its calls, `updates` its filter updates (None: these could not be counted)."""

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
            unread=", or were not fully observed" if incomplete else "",
            enables=count(ENABLES),
            unknown=count(UNKNOWN_ENABLES),
            updates=_updates(updates),
            intercepted=" that were intercepted already" if seen else _UNSEEN,
        ),
    )


_UNSEEN = ", which a patched kernel never does there (whether they changed anything could not be seen)"


def _updates(count: int | None) -> str:
    return f"{count:,} filter update" + ("" if count == 1 else "s") if count else "filter updates"
