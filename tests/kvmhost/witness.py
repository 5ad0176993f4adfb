# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads what the kernel's own tracer recorded (scenarios/kerneltracer.py) and counts it, independently of msrtrace."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from kerneltracer import ARGUMENT, HIGH_WORDS, LOW_WORDS, SAVED
from ringbuffer import Event, read

ACCESS = {1: "read", 2: "write", 3: "read_write"}
#: The callers that the workload can reach, Linux 6.1 to 7.2.
CAUSES = {
    "vmx_vcpu_create": "vcpu_create",
    "vmx_vcpu_after_set_cpuid": "cpuid_update",
    "vmx_set_msr": "msr_write",
    "vmx_set_virtual_apic_mode": "x2apic",
    "vmx_refresh_apicv_exec_ctrl": "x2apic",
    "vmx_update_msr_bitmap_x2apic": "x2apic",
    # Callers of the above, where the call is the last thing that those do and so a jump.
    "__kvm_apic_set_base": "x2apic",
    "kvm_apic_set_base": "x2apic",
    "kvm_lapic_set_base": "x2apic",
}


def bits(words: dict[str, int], msr: int) -> int | None:
    """The two bits of MSR as MSR_TYPE_R | MSR_TYPE_W; None for an MSR without bits. Intel SDM vol. 3, 25.6.9."""
    if msr <= 0x1FFF:
        quarter, base, known = "low", 0, LOW_WORDS
    elif 0xC0000000 <= msr <= 0xC0001FFF:
        quarter, base, known = "high", 0x400, HIGH_WORDS
    else:
        return None
    word, bit = (msr & 0x1FFF) // 64, msr & 63
    assert word in known, f"the witness does not record the bitmap word of MSR {msr:#x}"
    result = 0
    for direction, value, half in (("r", 1, 0), ("w", 2, 0x800)):
        content = words[f"{quarter}_{direction}_{base + half + 8 * word:x}"]
        result |= value * (content >> bit & 1)
    return result


@dataclass
class Counts:
    """Keys are (msr, access, action, cause); `callers` are the functions seen for a cause."""

    calls: Counter[tuple[int, str, str, str]] = field(default_factory=Counter)
    redundant: Counter[tuple[int, str, str, str]] = field(default_factory=Counter)
    refused: Counter[tuple[int, str, str, str]] = field(default_factory=Counter)
    updates: int = 0
    recalcs: int = 0
    callers: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


class _Filters:
    """Whether an update applies a new filter: counted from the ioctls and the births of vCPUs."""

    def __init__(self) -> None:
        self.set_: Counter[int] = Counter()
        self.applied: dict[int, int] = {}

    def created(self, event: Event) -> None:
        self.applied[event.values["first"]] = self.set_[event.values["kvm"]]

    def update(self, event: Event) -> str:
        vcpu, now = event.values["vcpu"], self.set_[event.values["kvm"]]
        before, self.applied[vcpu] = self.applied.get(vcpu, 0), now
        return "filter_change" if now != before else "recalc"


def count(trace: Iterable[Event], updates_are_filters: bool, returns: int) -> Counts:
    """Count every call in TRACE by the bits around it; each returns in that many events (RETURNS).

    UPDATES_ARE_FILTERS: the update function runs for a new filter alone (before 6.17).
    """
    counts, filters = Counts(), _Filters()
    within: dict[int, str] = {}
    pending: dict[int, Event] = {}
    outs: dict[int, dict[str, Event]] = {}
    for event in trace:
        thread = event.thread
        if event.name.startswith("in_"):
            assert thread not in pending, f"a call without a return before {event}"
            pending[thread], outs[thread] = event, {}
        elif event.name.startswith("out_"):
            outs[thread][event.name.split("_")[1]] = event
            if len(outs[thread]) == returns:
                _settle(counts, pending.pop(thread), outs.pop(thread), within.get(thread))
        elif event.name == "update_in":
            within[thread] = "filter_change" if updates_are_filters else filters.update(event)
        elif event.name == "update_out":
            if within.pop(thread) == "filter_change":
                counts.updates += 1
            else:
                counts.recalcs += 1
        elif event.name == "vmx_vcpu_create":
            filters.created(event)
        elif event.name == "kvm_vm_ioctl_set_msr_filter":
            filters.set_[event.values["first"]] += 1
        else:
            raise ValueError(f"unknown event {event.name}")
    assert not pending, "calls that never returned"
    return counts


def _settle(counts: Counts, entry: Event, returns: dict[str, Event], within: str | None) -> None:
    """Count one call, from its entry and from its return as seen through each saved register."""
    holders = [r for r in returns if r == ARGUMENT or entry.values[r] == entry.values["vcpu"]]
    assert holders, f"no register of the caller holds the vCPU: {entry.place}"
    msr, kind = entry.values["msr"], entry.values["type"]
    function = entry.name.removeprefix("in_")
    enable = {"vmx_enable_intercept_for_msr": True, "vmx_disable_intercept_for_msr": False}.get(
        function, bool(entry.values["set"])
    )
    # Of several probes on one return only the last to run sees the caller; the others see the first's trampoline.
    [caller] = {r.place.split("+")[0] for r in returns.values() if r.place}
    cause = within or CAUSES[caller.split(".")[0]]
    key = (msr, ACCESS[kind], "enable" if enable else "disable", cause)
    before = bits(entry.values, msr)
    [after] = {bits(returns[r].values, msr) for r in holders}
    counts.calls[key] += 1
    counts.callers[cause].add(caller)
    if before is None or after is None or not (before ^ after) & kind:
        counts.redundant[key] += 1
    if not enable and after is not None and after & kind:
        counts.refused[key] += 1


def recorded(folder: Path, updates_are_filters: bool) -> Counts:
    """The counts of what a KernelTracer left in FOLDER. Fails if the kernel lost an event."""
    lost = re.findall(r"^(?:overrun|commit overrun|dropped events): (\d+)$", (folder / "stats").read_text(), re.M)
    assert lost, "the kernel's tracer left no statistics"
    assert not any(map(int, lost)), f"the kernel's tracer lost events: {lost}"
    profile = (folder / "profile").read_text()
    missed = [line for line in profile.splitlines() if line.split()[-1] != "0"]
    assert not missed, f"the kernel's tracer missed probes: {missed}"
    returns = 1 if f"out_{ARGUMENT}_" in profile else len(SAVED)
    return count(read(folder), updates_are_filters, returns)
