"""Whether the running kernel has the patch "KVM: VMX: Skip filter updates for MSRs that KVM is already intercepting".

Upstream d895f28ed6da, v6.0. Without it vmx_msr_filter_changed() in arch/x86/kvm/vmx/vmx.c calls
vmx_enable_intercept_for_msr() for each MSR of vmx_possible_passthrough_msrs[] that KVM intercepts anyway; with it,
only vmx_disable_intercept_for_msr() for those that KVM passes through. Reads of the TSC are always passed through and
writes to it never, so every filter update shows which of the two it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tracer.cause import FILTER_CHANGE
from tracer.shown import Shown, Text

#: Intel PT: pt_update_intercept_for_msr() enables and disables these in a filter update with or without the patch.
PT_MSRS = frozenset({0x560, 0x561, 0x570, 0x571, 0x572, *range(0x580, 0x588)})
#: x2APIC: until 5.14 a filter update also ran vmx_update_msr_bitmap_x2apic(), whose enables may well change a bit.
X2APIC_MSRS = frozenset(range(0x800, 0x900))
SUPERSEDED = ("set", "recalc")


class Verdict(Shown, frozen=True, kw_only=True):
    """`patched` is null where the trace proves neither; `why` says in a sentence what was seen."""

    patched: bool | None
    why: Text


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


def judge(  # noqa: PLR0911 (one return for each thing that can be the case)
    *, layout: str, calls_observable: bool, incomplete: bool, reloaded: bool, updates: int | None, rows: Sequence[Row]
) -> Verdict:
    """The verdict on ROWS, the calls of a trace with UPDATES filter updates (None: they could not be counted)."""
    if layout in SUPERSEDED:
        return _unknown("superseded: since 6.17 (8a056ece45d2) every update recomputes all intercepts")
    if not calls_observable:
        return _unknown(f"calls cannot be observed on this kernel (layout {layout})")
    if reloaded:
        return _unknown("kvm_intel was loaded anew during the trace, so the counts may be of two modules")
    inside = [row for row in rows if row.cause == FILTER_CHANGE and row.index not in PT_MSRS | X2APIC_MSRS]
    enables = [row for row in inside if row.action == "enable"]
    if updates is None:
        return _unknown("filter updates could not be observed")
    if not updates:
        return _unknown("too little seen: no vCPU applied a changed MSR filter")
    made, redundant = sum(row.calls for row in enables), [row.redundant for row in enables]
    if made and None in redundant:
        return Verdict(
            patched=False,
            why=f"{made:,} calls in {_updates(updates)} enabled the interception of MSRs, which a patched kernel never "
            "does there (whether they changed anything could not be seen)",
        )
    useless = sum(value for value in redundant if value is not None)
    if made and made == useless:
        return Verdict(
            patched=False,
            why=f"{made:,} calls in {_updates(updates)} enabled the interception of MSRs that were intercepted already",
        )
    if made:
        return _unknown(
            f"{made - useless:,} of {made:,} enables in filter updates changed a bit: neither kernel does that"
        )
    if incomplete:
        return _unknown("something was not seen, so that no enable was counted proves nothing")
    reads = {row.index for row in inside if row.calls and row.access in ("read", "read_write")}
    writes = {row.index for row in inside if row.calls and row.access in ("write", "read_write")}
    if not reads ^ writes:
        return _unknown("too little seen: no MSR of which KVM passes one direction through and intercepts the other")
    return Verdict(
        patched=True,
        why=f"{_updates(updates)} asked for the MSRs that KVM passes through and left alone those that it intercepts",
    )


def _unknown(why: str) -> Verdict:
    return Verdict(patched=None, why=why)


def _updates(count: int) -> str:
    return f"{count:,} filter update" + ("" if count == 1 else "s")
