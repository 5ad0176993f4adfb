# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads what the kernel's own tracer recorded (scenarios/kerneltracer.py) and counts it, independently of msrtrace."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from kerneltracer import KEPT, NAMED, PASSES, SAVED, VENDORS, Vendor
from ringbuffer import Event, Symbols, read

READ, WRITE = 1, 2
BOTH = READ | WRITE
ACCESS = {READ: "read", WRITE: "write", BOTH: "read_write"}
#: By what a call intercepts of the two directions, if it names both and may want them apart.
PASS_ACTIONS = {0: "disable", READ: "disable_write", WRITE: "disable_read", BOTH: "enable"}
#: The vendor of each function whose calls are recorded.
VENDOR_OF = {function: vendor for vendor in VENDORS for function in vendor.calls}
#: The callers that the workload can reach, Linux 5.10 to 7.2.
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
    "svm_create_vcpu": "vcpu_create",
    "svm_vcpu_create": "vcpu_create",
    "svm_vcpu_init_msrpm": "nested",
    "svm_vcpu_reset": "vcpu_reset",
    "svm_vcpu_after_set_cpuid": "cpuid_update",
    # Callers of that, as above.
    "kvm_vcpu_after_set_cpuid": "cpuid_update",
    "kvm_set_cpuid": "cpuid_update",
    "svm_set_msr": "msr_write",
}


def bits(vendor: Vendor, words: dict[str, int], msr: int) -> int | None:
    """The two bits of MSR as READ | WRITE; None for an MSR without bits."""
    places = vendor.bits(msr)
    if places is None:
        return None
    result = 0
    for bit, value in zip(places, (READ, WRITE), strict=True):
        word = f"w{bit // 64:x}"
        assert word in words, f"the witness does not record the bitmap word of MSR {msr:#x}"
        result |= value * (words[word] >> bit % 64 & 1)
    return result


@dataclass
class Counts:
    """Keys are (msr, access, action, cause); `callers` are the functions seen for a cause.

    The creation of a vCPU asked for `creation_recalcs` of the `recalcs`.
    """

    calls: Counter[tuple[int, str, str, str]] = field(default_factory=Counter)
    redundant: Counter[tuple[int, str, str, str]] = field(default_factory=Counter)
    refused: Counter[tuple[int, str, str, str]] = field(default_factory=Counter)
    updates: int = 0
    recalcs: int = 0
    creation_recalcs: int = 0
    vcpus: int = 0
    callers: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def without_callers(self) -> Counts:
        """The same for whom only the update function and the creation of a vCPU give a cause to a call."""
        found = Counts(updates=self.updates, recalcs=self.recalcs, vcpus=self.vcpus)
        for name in ("calls", "redundant", "refused"):
            for (msr, access, action, cause), count in getattr(self, name).items():
                seen = cause if cause in ("filter_change", "recalc", "vcpu_create") else "other"
                getattr(found, name)[msr, access, action, seen] += count
        return found


class _Updates:
    """What an update is for: counted from the ioctls and the creations of vCPUs."""

    def __init__(self, filters_alone: bool) -> None:
        self.filters_alone = filters_alone
        self.set_: Counter[int] = Counter()
        self.applied: dict[int, int] = {}
        self.creating: set[int] = set()  # the threads that are at it
        self.fresh: set[int] = set()  # the vCPUs that had no update since

    def create(self, event: Event) -> None:
        self.applied[event.values["first"]] = self.set_[event.values["kvm"]]
        self.fresh.add(event.values["first"])
        self.creating.add(event.thread)

    def update(self, event: Event) -> str:
        if self.filters_alone:
            return "filter_change"
        vcpu, now = event.values["vcpu"], self.set_[event.values["kvm"]]
        before, self.applied[vcpu] = self.applied.get(vcpu, 0), now
        first = vcpu in self.fresh
        self.fresh.discard(vcpu)
        if now != before:
            return "filter_change"
        return "vcpu_create" if first or event.thread in self.creating else "recalc"


def count(trace: Iterable[Event], updates_are_filters: bool, returns: int) -> Counts:
    """Count every call in TRACE by the bits around it; each returns in that many events (RETURNS).

    UPDATES_ARE_FILTERS: the update function runs for a new filter alone (before 6.17). Else a vCPU's first
    recalculation is its creation's, inside of that or after it.
    """
    counts, updates = Counts(), _Updates(updates_are_filters)
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
                cause = within.get(thread) or ("vcpu_create" if thread in updates.creating else None)
                _settle(counts, pending.pop(thread), outs.pop(thread), cause)
        elif event.name == "update_in":
            within[thread] = updates.update(event)
        elif event.name == "update_out":
            cause = within.pop(thread)
            counts.updates += cause == "filter_change"
            counts.recalcs += cause != "filter_change"
            counts.creation_recalcs += cause == "vcpu_create"
        elif event.name == "create_in":
            updates.create(event)
        elif event.name == "create_out":
            updates.creating.remove(thread)
            counts.vcpus += not event.values["error"]
        elif event.name == "filter_set":
            updates.set_[event.values["first"]] += 1
        else:
            raise ValueError(f"unknown event {event.name}")
    assert not pending, "calls that never returned"
    return counts


def _wish(entry: Event) -> tuple[int, int]:
    """Which directions a call names, and which of them it wants intercepted."""
    function, values = entry.name.removeprefix("in_"), entry.values
    if function == PASSES:  # it says what the guest may do itself
        return BOTH, (0 if values["read"] else READ) | (0 if values["write"] else WRITE)
    named = values["type"]
    enable = {"vmx_enable_intercept_for_msr": True, "vmx_disable_intercept_for_msr": False}
    return named, named if enable.get(function, bool(values["set"])) else 0


def _settle(counts: Counts, entry: Event, returns: dict[str, Event], within: str | None) -> None:
    """Count one call, from its entry and from its return as seen each way; WITHIN: its cause, if not its caller's."""
    ways = [KEPT, *(f"{r}{NAMED}" for r in SAVED if entry.values[r] == entry.values["bitmap"])]
    if entry.values["bitmap"] == entry.values["own"]:
        ways += [r for r in SAVED if entry.values[r] == entry.values["vcpu"]]
    holders = [way for way in ways if way in returns]
    assert holders, f"no register of the caller leads to the bitmap: {entry.place}"
    function, msr = entry.name.removeprefix("in_"), entry.values["msr"]
    named, enabled = _wish(entry)
    action = PASS_ACTIONS[enabled] if function == PASSES else "enable" if enabled else "disable"
    # Of several probes on one return only the last to run sees the caller; the others see the first's trampoline. Under
    # the function graph tracer all see one of that.
    callers = {r.place.split("+")[0] for r in returns.values() if r.place}
    assert len(callers) <= 1, callers
    cause = within or CAUSES["".join(callers).split(".")[0]]
    key = (msr, ACCESS[named], action, cause)
    before = bits(VENDOR_OF[function], entry.values, msr)
    [after] = {bits(VENDOR_OF[function], returns[r].values, msr) for r in holders}
    counts.calls[key] += 1
    counts.callers[cause] |= callers
    if before is None or after is None or not (before ^ after) & named:
        counts.redundant[key] += 1
    if after is not None and after & named & ~enabled:
        counts.refused[key] += 1


def lost_nothing(folder: Path) -> None:
    """Fail unless the kernel's tracer says of what it left in FOLDER that this is all."""
    lost = re.findall(r"^(?:overrun|commit overrun|dropped events): (\d+)$", (folder / "stats").read_text(), re.M)
    assert lost, "the kernel's tracer left no statistics"
    assert not any(map(int, lost)), f"the kernel's tracer lost events: {lost}"


def recorded(folder: Path, updates_are_filters: bool) -> Counts:
    """The counts of what a KernelTracer left in FOLDER. Fails if the kernel lost an event."""
    lost_nothing(folder)
    profile = (folder / "profile").read_text()
    # 5.10 also counts what could not be fetched (kprobe_fault_handler()), as through a register that holds anything.
    # A return that is missing is found by count().
    missed = [
        line for line in profile.splitlines() if line.split()[-1] != "0" and not line.split()[0].startswith("out_")
    ]
    assert not missed, f"the kernel's tracer missed probes: {missed}"
    ways = set(re.findall(r"^ *out_([a-z0-9]+)_", profile, re.M))
    return count(read(folder), updates_are_filters, len(ways))


@dataclass
class Tallies:
    """What a KernelCounter counted, by thread: `calls` by (thread, cause, MSR), `asked` by (MSR, access, action).

    There may be creations of vCPUs and updates for filters alone: then a call is of one or of the other.
    """

    calls: Counter[tuple[int, str, int]] = field(default_factory=Counter)
    asked: Counter[tuple[int, str, str]] = field(default_factory=Counter)
    updates: Counter[int] = field(default_factory=Counter)
    vcpus: Counter[int] = field(default_factory=Counter)

    def of_thread(self, thread: int) -> Counter[tuple[str, int]]:
        """Its calls, by cause and MSR."""
        return Counter({(cause, msr): n for (one, cause, msr), n in self.calls.items() if one == thread})


#: A row of a histogram: what it is of, and how many there were (Documentation/trace/histogram.rst).
_ROW = re.compile(r"^\{ (.*) \} hitcount: +(\d+)$", re.M)


def _rows(text: str) -> list[tuple[dict[str, int], int]]:
    """The rows of a histogram. Fails if anything was dropped, or the sum is another."""
    found = [
        ({key: int(value) for key, value in re.findall(r"(\w+): +(\d+)", row)}, int(count))
        for row, count in _ROW.findall(text)
    ]
    [hits], [dropped] = re.findall(r"^ +Hits: (\d+)$", text, re.M), re.findall(r"^ +Dropped: (\d+)$", text, re.M)
    assert int(dropped) == 0, f"the kernel's tracer has dropped {dropped} events"
    assert int(hits) == sum(count for _, count in found)
    return found


def tallied(folder: Path) -> Tallies:
    """The counts of what a KernelCounter left in FOLDER."""
    profile = (folder / "profile").read_text()
    missed = [line for line in profile.splitlines() if line.split()[-1] != "0"]
    assert not missed, f"the kernel's tracer missed probes: {missed}"
    symbols, tallies = Symbols((folder / "symbols").read_text()), Tallies()
    updates = {function for vendor in VENDORS for function in vendor.updates}
    for file in folder.glob("in_*.hist"):
        function = file.stem.removeprefix("in_")
        for text in re.split(r"(?m)^# event histogram$", file.read_text())[1:]:
            for values, count in _rows(text):
                if "caller" in values:
                    caller = symbols.name(values["caller"]).partition("+")[0].partition(".")[0]
                    cause = "filter_change" if caller in updates else "vcpu_create"
                    tallies.calls[values["common_pid"], cause, values["msr"]] += count
                else:
                    named, enabled = _wish(Event(0, 0, f"in_{function}", "", values))
                    action = PASS_ACTIONS[enabled] if function == PASSES else "enable" if enabled else "disable"
                    tallies.asked[values["msr"], ACCESS[named], action] += count
    assert tallies.calls.total() == tallies.asked.total() > 0
    for values, count in _rows((folder / "update_in.hist").read_text()):
        tallies.updates[values["common_pid"]] += count
    for values, count in _rows((folder / "create_out.hist").read_text()):
        assert not values["error"], "the creation of a vCPU has failed"
        tallies.vcpus[values["common_pid"]] += count
    return tallies
