# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the running kernel has the patch "KVM: VMX: Skip filter updates for MSRs that KVM is already intercepting".

Upstream d895f28ed6da, v6.0. Without it vmx_msr_filter_changed() in arch/x86/kvm/vmx/vmx.c calls
vmx_enable_intercept_for_msr() for each MSR of vmx_possible_passthrough_msrs[] that KVM intercepts anyway; with it,
only vmx_disable_intercept_for_msr() for those that KVM passes through. Both make separate calls for reads and for
writes. Reads of the TSC are always passed through and writes to it never (vmx_vcpu_create(), 5.10 to 6.16), so every
filter update shows which of the two kernels it is. svm_msr_filter_changed() never had such a patch: before 6.17 it
makes a call for every MSR of direct_access_msrs[], whatever KVM wants.

RULES is the only place that says what follows from which counts. judge() makes a report's sentence from them,
dashboards/ the alert and the dashboard's queries; tests/dashboards/test_one_verdict.py gives all three the same counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from fractions import Fraction
from typing import NamedTuple, Protocol

from tracer.model.cause import FILTER_CHANGE
from tracer.model.quantity import rate
from tracer.model.sanitized import Sanitized, Text
from tracer.model.vendors import VENDORS, vendor_named

_VENDOR, _FILTER_LOOP = next((vendor, vendor.filter_loop) for vendor in VENDORS if vendor.filter_loop)
LOOP, ALSO_ENABLED = _FILTER_LOOP.msrs, _FILTER_LOOP.also_enabled
#: The vendors for which KVM never had the patch.
NEVER_PATCHED = tuple(vendor.name for vendor in VENDORS if not vendor.filter_loop)
#: The layouts whose calls show whether the patch is there, and those newer than the code that it changed.
JUDGED = tuple(layout.name for layout in _VENDOR.layouts if layout.enable and layout.disable)
SUPERSEDED = tuple(layout.name for layout in _VENDOR.layouts if layout.set_)


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

    #: KVM never had the patch for this vendor: there is nothing to decide.
    NEVER_PATCHED = auto()
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
    Rule(Fact.NEVER_PATCHED, None, "KVM never had this patch for {vendor}; {recomputed}{made}"),
    Rule(Fact.SUPERSEDED, None, "superseded: since 6.17 (8a056ece45d2) every update recomputes all intercepts"),
    Rule(Fact.CALLS_UNSEEN, None, "calls cannot be observed on this kernel (layout {layout})"),
    Rule(Fact.RELOADED, None, "{module} was reloaded during the trace, so the counts may be of two modules"),
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
    """`patched` is null where the trace proves neither, or KVM never had the patch; `why` says what was seen."""

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
        """enable, or what begins with disable."""

    @property
    def cause(self) -> str:
        """Why KVM called."""

    @property
    def calls(self) -> int:
        """How often."""

    @property
    def redundant(self) -> int | None:
        """How often nothing changed, if known."""


def headline(patched: bool | None, vendor: str) -> str:
    """The verdict on a host of the vendor of that name, in a few words."""
    return "patch not applicable" if patched is None and vendor in NEVER_PATCHED else PATCH[patched]


def judge(
    *,
    vendor: str,
    layout: str,
    calls_observable: bool,
    incomplete: bool,
    reloaded: bool,
    updates: int | None,
    rows: Sequence[Row],
) -> Verdict:
    """The verdict on a trace: `rows` are its calls, `updates` its filter updates (None: these could not be counted)."""

    def of(calls: Calls) -> Iterator[Row]:
        return (row for row in rows if row.calls and calls.has(row))

    def count(calls: Calls) -> int:
        return sum(row.calls for row in of(calls))

    changed = sum(row.calls - row.redundant for row in of(ANY_ENABLES) if row.redundant is not None)
    halves = {access: {row.index for row in of(DISABLES) if row.access == access} for access in ("read", "write")}
    facts = {
        Fact.NEVER_PATCHED: vendor in NEVER_PATCHED,
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
    of_vendor = vendor_named(vendor)
    made = _made(updates, rows) if calls_observable else f"calls cannot be observed on this kernel (layout {layout})"
    return Verdict(
        patched=rule.patched,
        why=rule.why.format(
            vendor=of_vendor.title,
            module=of_vendor.module,
            layout=layout,
            recomputed=_RECOMPUTED if (known := of_vendor.layout(layout)) and known.set_ else "",
            made=made + ("; calls may have been missed" if incomplete or reloaded else ""),
            changed=changed,
            any_enables=count(ANY_ENABLES),
            unread=", or were not fully observed" if incomplete else "",
            enables=count(ENABLES),
            unknown=count(UNKNOWN_ENABLES),
            updates=_updates(updates),
            intercepted=" that were intercepted already" if seen else _UNSEEN,
        ),
    )


def _made(updates: int | None, rows: Sequence[Row]) -> str:
    """What filter updates did where no patch changes it: how many calls each makes for nothing."""
    inside = [row for row in rows if row.cause == FILTER_CHANGE]
    calls = sum(row.calls for row in inside)
    if not updates or not calls:
        seen = "no calls were seen in filter updates" if updates else "no vCPU applied a changed MSR filter"
        return "filter updates could not be observed" if updates is None else seen
    each = f", {rate(Fraction(calls, updates))} each" if updates > 1 else ""
    redundant = [row.redundant for row in inside if row.redundant is not None]
    if len(redundant) < len(inside):
        nothing = "; how many of them changed nothing is unknown"
    else:
        nothing = f", of which {rate(Fraction(sum(redundant), updates))} changed nothing"
    return f"{_updates(updates)} made {calls:,} calls{each}{nothing}"


_RECOMPUTED = "since 6.17 every update recomputes all intercepts: "
_UNSEEN = ", which a patched kernel never does there (whether they changed anything could not be seen)"


def _updates(count: int | None) -> str:
    return f"{count:,} filter update" + ("" if count == 1 else "s") if count else "filter updates"
