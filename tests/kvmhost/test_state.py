# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace state` says what is so: of every vCPU, its whole bitmap, and who wants what of it.

Bitmaps are held against those that the kernel's own tracer recorded at the end of the last ioctl of each vCPU; what is
said of each MSR, against the filters of scenarios/states.py, of which a VM without one says what KVM itself wants.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from answers import AMD, LAYOUTS, RECALCULATING, SVM, SVM_ALWAYS, TSC, VMX_INTERCEPTED, VMX_PASSED
from conftest import Collected
from kerneltracer import AMD as ON_AMD
from kerneltracer import INTEL as ON_INTEL
from kerneltracer import Vendor
from ringbuffer import read
from states import (
    MANY,
    NEVER_RUN,
    NO_CPUID,
    SPEC_CTRL,
    SPEC_CTRL_ALLOWED,
    SPEC_CTRL_DENIED,
    VCPUS,
    WITH_CPUID,
    Case,
    cases,
)
from vmm import READ, WRITE, Filter, Range

BOTH = READ | WRITE
ACCESS = {0: "none", READ: "read", WRITE: "write", BOTH: "read_write"}
X2APIC = range(0x800, 0x900)
#: What KVM may pass through without a record of it: VMX, of any kernel; and SPEC_CTRL, which a check for LBRs takes for
#: one of those from 6.9 on (vmx_get_passthrough_msr_slot(), vmx.c: MSR_LBR_CORE_FROM + 8).
UNLISTED_VMX = [
    *(0x560, 0x561, 0x571, 0x572, *range(0x580, 0x58E)),  # PT
    *(*range(0x40, 0x48), *range(0x60, 0x68), 0x1C8, 0x1C9, *range(0x680, 0x6A0), *range(0x6C0, 0x6E0)),  # LBR
    *(*range(0xDC0, 0xDE0), SPEC_CTRL, *X2APIC),
]
#: What kernels without any record pass on a condition: 6.17 to 7.3.
ON_CONDITION_VMX = {
    READ: [0xE7, 0xE8, 0x1C5, 0x3FC, 0x3FD, 0x3FE, 0x660],
    WRITE: [0x49, 0x10B],
    BOTH: [
        *(0x1C4, 0x6A0, 0x6A2, *range(0x6A4, 0x6A8)),  # XFD, CET
        *(*range(0xC1, 0xC9), *range(0x4C1, 0x4C9), *range(0x309, 0x30D), *range(0x38E, 0x391)),  # PMU
        *UNLISTED_VMX,
    ],
}
ON_CONDITION_SVM = {
    READ: [0xE7, 0xE8, 0xC0010134],
    WRITE: [0x49, 0x10B],
    BOTH: [
        *(SPEC_CTRL, 0x175, 0x176, 0x1D9, *range(0x1DB, 0x1DF), *X2APIC),
        *(0x6A0, 0x6A2, *range(0x6A4, 0x6A8)),  # CET
        *(0x277, 0xDA0, 0xC0000080, 0xC0000103, 0xC0010130),  # SEV-ES
        *(*range(0xC0000300, 0xC0000304), *range(0xC0010004, 0xC0010008), *range(0xC0010201, 0xC001020C, 2)),  # PMU
    ],
}
#: Recorded as intercepted, whatever KVM wants.
MISTAKEN = {("trixie", SPEC_CTRL)}
INTERCEPTS, PASSES, ALWAYS_PASSES, NOT_RECORDED = "intercepts", "passes", "always passes", "not recorded"


def of_vendor(host: str) -> Vendor:
    return ON_AMD if host in AMD else ON_INTEL


def recorded(host: str) -> set[int]:
    """The MSRs of which the host's kernel records what KVM wants."""
    if LAYOUTS[host] == "toggle":
        return {TSC, *VMX_PASSED, *VMX_INTERCEPTED[host]}
    if LAYOUTS[host] == "pass":
        svm = SVM[host]
        return {*svm.passed, *svm.intercepted, *svm.reset_passed, *svm.reset_intercepted}
    return set()


def on_condition(host: str) -> set[tuple[int, int]]:
    """The accesses that KVM may pass without a record of it."""
    table = {"toggle": {BOTH: UNLISTED_VMX}, "pass": {}}.get(
        LAYOUTS[host], ON_CONDITION_SVM if host in AMD else ON_CONDITION_VMX
    )
    pairs = ((msr, direction, flags) for flags, msrs in table.items() for msr in msrs for direction in (READ, WRITE))
    return {(msr, direction) for msr, direction, flags in pairs if flags & direction}


def always(host: str) -> set[tuple[int, int]]:
    """The accesses that KVM always passes."""
    msrs = SVM_ALWAYS if host in AMD else VMX_PASSED
    found = {(msr, direction) for msr in msrs for direction in (READ, WRITE)}
    return found | ({(TSC, READ)} if host not in AMD else set())


def by_range(wanted: Filter, msr: int, direction: int) -> bool | None:
    """Whether a range of the filter allows an access; None if none decides (Documentation/virt/kvm/api.rst)."""
    if msr in X2APIC:
        return True
    for one in wanted.ranges:
        at = msr - one.base
        if one.flags & direction and 0 <= at < one.nmsrs:
            return bool(one.bitmap[at // 8] >> at % 8 & 1)
    return None


def accesses(wanted: Filter) -> Iterator[tuple[int, int]]:
    """The accesses that a filter has a bit for; of long ranges some."""
    for one in wanted.ranges:
        msrs = range(one.base, one.base + one.nmsrs)
        for msr in {*msrs[:64], *msrs[64::61], *msrs[-1:]}:
            yield from ((msr, direction) for direction in (READ, WRITE) if one.flags & direction)


def is_set(vendor: Vendor, bitmap: bytes, msr: int, direction: int) -> bool:
    """Whether the access exits."""
    places = vendor.bits(msr)
    if places is None:
        return True
    bit = places[direction == WRITE]
    return bool(bitmap[bit // 8] >> bit % 8 & 1)


def expected(*, exits: bool, allowed: bool, wish: str, settled: bool) -> str:
    """What must be said: DESIGN.md's table, plainly."""
    if not exits:
        return "passed" if allowed else "pending_denied"
    if not allowed:
        return {INTERCEPTS: "both", PASSES: "filter", ALWAYS_PASSES: "filter", NOT_RECORDED: "unrecorded"}[wish]
    if wish == INTERCEPTS or (wish != PASSES and settled):
        return "kvm"
    return "unrecorded" if wish == NOT_RECORDED else "pending_allowed"


def numbers(runs: list[str]) -> Iterator[int]:
    """The MSRs of `0x10` and `0x174-0x176`."""
    for run in runs:
        first, _, last = run.partition("-")
        yield from range(int(first, 16), int(last or first, 16) + 1)


def stated(collected: Collected) -> dict[int, dict[str, Any]]:
    """The VMs that `msrtrace state` found, by the process."""
    done = collected.scenario("state")["state"]
    assert (done["status"], done["stderr"]) == (0, "")
    found = {vm["pid"]: vm for vm in json.loads(done["stdout"])["vms"]}
    assert len(found) == len(json.loads(done["stdout"])["vms"])  # each process has one
    return found


def groups(vm: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What is said of each vCPU, by its id."""
    return {id_: group for group in vm["vcpus"] for id_ in group["ids"]}


def bitmap_said(vendor: Vendor, group: dict[str, Any]) -> bytes:
    """The bitmap that a vCPU has by what is said to pass."""
    bits = (1 << vendor.bitmap_bytes * 8) - 1
    for direction, name in ((READ, "read"), (WRITE, "write")):
        for msr in numbers(group["passed"][name]):
            places = vendor.bits(msr)
            assert places, f"{msr:#x} has no bit that could be clear"
            bits &= ~(1 << places[direction == WRITE])
    return bits.to_bytes(vendor.bitmap_bytes, "little")


@cache
def witnessed(collected: Collected) -> dict[tuple[int, int], bytes]:
    """The bitmap of each vCPU as the kernel's tracer saw it last, by the process and the id."""
    parts: dict[tuple[int, int], dict[int, bytes]] = {}
    folder = collected.folder / "witness-states"
    assert not any(
        map(
            int, re.findall(r"^(?:overrun|commit overrun|dropped events): (\d+)$", (folder / "stats").read_text(), re.M)
        )
    )
    for event in read(folder):
        arrays = {int(name.removeprefix("at")): content for name, content in event.arrays.items()}
        parts.setdefault((event.thread, event.values["id"]), {}).update(arrays)
    return {vcpu: b"".join(part for _, part in sorted(its.items())) for vcpu, its in parts.items()}


def owners(found: dict[str, Any]) -> dict[int, int]:
    """The process that made the VM of each that was found, where that has ended."""
    pids = found["wandering"]
    return {
        pids["passed, VMM ended: holder"]: pids["passed, VMM ended"],
        pids["forked, VMM ended: child"]: pids["forked, VMM ended"],
    }


def test_every_bitmap_is_the_kernels_own(with_bitmaps: Collected) -> None:
    vendor, found = of_vendor(with_bitmaps.host), with_bitmaps.scenario("state")
    bitmaps, compared = witnessed(with_bitmaps), set()
    for pid, vm in stated(with_bitmaps).items():
        for id_, group in groups(vm).items():
            own = bitmaps[owners(found).get(pid, pid), id_]
            assert len(own) == vendor.bitmap_bytes
            assert bitmap_said(vendor, group) == own, f"vCPU {id_} of process {pid}"
            compared.add((pid, id_))
    assert compared >= {(pid, id_) for pid in found["cases"].values() for id_ in VCPUS}
    assert compared >= {(pid, 0) for pid in found["many"]}
    assert len({bitmaps[vcpu] for vcpu in compared if vcpu in bitmaps}) > len(found["cases"]) / 2  # they differ


def each_case(collected: Collected) -> Iterator[tuple[Case, dict[int, dict[str, Any]], Callable[[int], bytes]]]:
    """Each case, what is said of its vCPUs, and what KVM itself wants of each: the bitmap of one without a filter."""
    found, vms, bitmaps = collected.scenario("state"), stated(collected), witnessed(collected)
    for name, case in cases("svm" if collected.host in AMD else "vmx").items():
        yield case, groups(vms[found["cases"][name]]), lambda id_: bitmaps[found["cases"]["none"], id_]


def test_of_every_msr_is_said_who_has_it_intercepted(with_bitmaps: Collected) -> None:
    host, vendor = with_bitmaps.host, of_vendor(with_bitmaps.host)
    kept, perhaps, ever = recorded(host), on_condition(host), always(host)
    listed = {(msr, direction) for msr in kept for direction in (READ, WRITE)}
    candidates = {msr for msr, _ in perhaps | ever if msr not in X2APIC} | (kept - {*X2APIC})
    said: set[str] = set()
    for case, vcpus, unfiltered in each_case(with_bitmaps):
        assert set(vcpus) == set(VCPUS)
        for id_, group in vcpus.items():
            settled = not (case.unapplied or (id_ == NEVER_RUN and (case.filters or LAYOUTS[host] == "recalc")))
            assert group["settled"] == settled
            assert group["ran"] == (id_ != NEVER_RUN)
            rows = {msr: row for row in group["msrs"] for msr in numbers([row["msrs"]])}
            # What is not listed exits in any case, and no range denies it.
            assert candidates <= rows.keys()
            assert {*numbers(group["passed"]["read"]), *numbers(group["passed"]["write"])} <= rows.keys()
            assert {
                msr for msr, direction in accesses(case.filter) if by_range(case.filter, msr, direction) is False
            } <= rows.keys()
            bitmap, plain = bitmap_said(vendor, group), unfiltered(id_)
            for msr, row in rows.items():
                for direction, name in ((READ, "read"), (WRITE, "write")):
                    decided = by_range(case.filter, msr, direction)
                    if vendor.bits(msr) is None:
                        wish = INTERCEPTS
                    elif msr in kept and not is_set(vendor, plain, msr, direction) and (host, msr) not in MISTAKEN:
                        wish = PASSES
                    elif (msr, direction) in ever - listed:
                        wish = ALWAYS_PASSES
                    else:
                        wish = NOT_RECORDED if (msr, direction) in perhaps else INTERCEPTS
                    right = expected(
                        exits=is_set(vendor, bitmap, msr, direction),
                        allowed=case.filter.default_allow if decided is None else decided,
                        wish=wish,
                        settled=settled,
                    )
                    assert row[name] == right, f"{name} of {msr:#x}, vCPU {id_}, {case}"
                    said.add(right)
    wanted = {"passed", "kvm", "filter", "both", "pending_denied", "pending_allowed"}
    assert said >= wanted | ({"unrecorded"} if host in RECALCULATING else set())


def test_filters_do_not_reach_spec_ctrl_where_it_is_taken_for_an_lbr(both: Collected) -> None:
    """vmx_msr_filter_changed() goes by a record that has it as intercepted: 6.12, and not 6.1."""
    found, vms, bitmaps = both.scenario("state"), stated(both), witnessed(both)
    said, exits = {}, {}
    for name in ("none", SPEC_CTRL_DENIED, SPEC_CTRL_ALLOWED):
        pid = found["cases"][name]
        group = groups(vms[pid])[WITH_CPUID]
        [row] = [row for row in group["msrs"] if SPEC_CTRL in numbers([row["msrs"]])]
        assert group["settled"], "each filter was applied"
        assert row["read"] == row["write"]
        said[name] = row["read"]
        own = bitmaps[pid, WITH_CPUID]
        exits[name] = {is_set(of_vendor(both.host), own, SPEC_CTRL, direction) for direction in (READ, WRITE)}
    mistaken = (both.host, SPEC_CTRL) in MISTAKEN
    assert exits == {"none": {False}, SPEC_CTRL_DENIED: {not mistaken}, SPEC_CTRL_ALLOWED: {mistaken}}
    right = {"none": "passed", SPEC_CTRL_DENIED: "filter", SPEC_CTRL_ALLOWED: "passed"}
    assert said == (right | {SPEC_CTRL_DENIED: "pending_denied", SPEC_CTRL_ALLOWED: "kvm"} if mistaken else right)


def shown(one: Range) -> tuple[int, int, str, list[int]]:
    """A range of a filter: its MSRs, the accesses, and those that it denies."""
    denied = [one.base + at for at in range(one.nmsrs) if not one.bitmap[at // 8] >> at % 8 & 1]
    return one.base, one.nmsrs, ACCESS[one.flags], denied


def test_filters_are_shown_as_they_were_set(collected: Collected) -> None:
    found, vms = collected.scenario("state"), stated(collected)
    for name, case in cases("svm" if collected.host in AMD else "vmx").items():
        said = vms[found["cases"][name]]["filter"]
        assert said["default"] == ("allow" if case.filter.default_allow else "deny")
        ranges = []
        for row in said["ranges"]:
            msrs = [*numbers([row["msrs"]])]
            ranges.append((msrs[0], len(msrs), row["access"], [*numbers(row["denied"])]))
        assert ranges == [shown(one) for one in case.filter.ranges], name


def test_a_vm_is_that_of_the_process_that_made_it_wherever_its_descriptors_are(collected: Collected) -> None:
    pids, vms = collected.scenario("state")["wandering"], stated(collected)
    found = {name: (vms[pid]["owned"], sorted(groups(vms[pid]))) for name, pid in pids.items() if pid in vms}
    assert found == {
        "passed": (True, [*VCPUS]),
        "passed, VMM ended: holder": (False, [WITH_CPUID]),
        "forked": (True, [*VCPUS]),
        "forked, VMM ended: child": (False, [*VCPUS]),
    }
    others = [vm for pid, vm in vms.items() if pid not in pids.values()]
    assert all(vm["owned"] for vm in others)
    scenario = collected.scenario("state")
    assert {vm["pid"] for vm in others} == {*scenario["cases"].values(), *scenario["many"]}


def test_where_bitmaps_cannot_be_read_that_is_said(without_bitmaps: Collected) -> None:
    done = json.loads(without_bitmaps.scenario("state")["state"]["stdout"])
    [note] = done["notes"]
    assert re.match(
        r"bitmaps cannot be read, so who intercepts what is unknown: /sys/kernel/btf has nothing of kvm_", note
    )
    for vm in done["vms"]:
        for id_, group in groups(vm).items():
            assert group["passed"] is None
            assert not group["msrs"]
            assert id_ in VCPUS
    vms = stated(without_bitmaps)
    for pid in without_bitmaps.scenario("state")["cases"].values():
        assert {id_: group["ran"] for id_, group in groups(vms[pid]).items()} == {
            NO_CPUID: True,
            WITH_CPUID: True,
            NEVER_RUN: False,
        }


def test_vms_may_close_while_they_are_read(of_amd: Collected) -> None:
    found = of_amd.scenario("closing")
    assert found["status"] == 0
    assert max(found["vcpus"]) >= MANY
    assert len(set(found["vcpus"])) > 2
    assert found["left"] == 0
    assert found["longest"] < 10
