# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace state` says what is so of guests of guests: the whole bitmap that the CPU has while L2 runs, and why.

Bitmaps are held against those that the kernel's own tracer recorded at the end of the last ioctl of each vCPU, on SVM
also against the address that the CPU was given; and both against what follows from the cases of scenarios/nesting.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from answers import AMD, LAYOUTS
from conftest import Collected
from kerneltracer import AMD as ON_AMD
from kerneltracer import INTEL as ON_INTEL
from kerneltracer import Vendor
from nesting import CASES, FS_BASE, GS_BASE, KERNEL_GS_BASE, SYSENTER_CS, TSC, Case
from ringbuffer import Event, read
from vmm import READ, WRITE

DIRECTIONS = {READ: "read", WRITE: "write"}
SYSENTER = range(0x174, 0x177)
BASES = (FS_BASE, GS_BASE, KERNEL_GS_BASE)
#: What L1 has of its own on every host, but for what a filter denies; without CPUID's and hardware's options.
VMX_OWN = {(TSC, READ), *((msr, way) for msr in (*SYSENTER, *BASES) for way in DIRECTIONS)}
SVM_OWN = {(msr, way) for msr in (*SYSENTER, *range(0xC0000081, 0xC0000085), *BASES) for way in DIRECTIONS}
#: Of these what KVM lets L2 have: nested_vmx_prepare_msr_bitmap() of 6.1 to 7.2; of SVM all.
VMX_MERGED = {(msr, way) for msr in BASES for way in DIRECTIONS}


def of_vendor(host: str) -> Vendor:
    return ON_AMD if host in AMD else ON_INTEL


def is_clear(vendor: Vendor, bitmap: bytes, msr: int, way: int) -> bool:
    places = vendor.bits(msr)
    assert places
    bit = places[way == WRITE]
    return not bitmap[bit // 8] >> bit % 8 & 1


def bitmap_said(vendor: Vendor, passed: dict[str, list[str]]) -> bytes:
    """The bitmap in which the bits of these are clear, and no others."""
    bits = (1 << vendor.bitmap_bytes * 8) - 1
    for way, name in DIRECTIONS.items():
        for msr in numbers(passed[name]):
            places = vendor.bits(msr)
            assert places, f"{msr:#x} has no bit that could be clear"
            bits &= ~(1 << places[way == WRITE])
    return bits.to_bytes(vendor.bitmap_bytes, "little")


def numbers(runs: list[str]) -> Iterator[int]:
    for run in runs:
        first, _, last = run.partition("-")
        yield from range(int(first, 16), int(last or first, 16) + 1)


@cache
def recorded(collected: Collected) -> tuple[Event, ...]:
    return tuple(read(collected.folder / "witness-nesting"))


def witnessed(collected: Collected, pid: int, what: str) -> bytes:
    """A bitmap of a process' vCPU as the kernel's tracer saw it last: its own (part), or that for L2 (nested)."""
    parts: dict[int, bytes] = {}
    for event in recorded(collected):
        if event.thread == pid and event.name.startswith(f"{what}_"):
            parts |= {int(name.removeprefix("at")): content for name, content in event.arrays.items()}
    found = b"".join(part for _, part in sorted(parts.items()))
    assert len(found) == of_vendor(collected.host).bitmap_bytes
    return found


def each(collected: Collected) -> Iterator[tuple[str, Case, int, dict[str, Any]]]:
    """Each case, the process, and what is said of its vCPU."""
    found = collected.scenario("nested")
    assert (found["state"]["status"], found["state"]["stderr"]) == (0, "")
    state = json.loads(found["state"]["stdout"])
    assert state["notes"] == []
    vms = {vm["pid"]: vm for vm in state["vms"]}
    assert vms.keys() == {*found["pids"].values()}
    for name, case in CASES.items():
        pid = found["pids"][name]
        [group] = vms[pid]["vcpus"]
        assert group["ids"] == [0]
        yield name, case, pid, group


def use(host: str, case: Case) -> str:
    """Which bitmap the CPU has while L2 runs."""
    if not case.enters:
        return "unused"
    if not case.bitmap:
        return "own" if host in AMD else "none"
    return "merged"


def test_which_bitmap_is_in_use_and_who_is_in_l2(with_bitmaps: Collected) -> None:
    for name, case, _, group in each(with_bitmaps):
        assert group["nested"]["bitmap"] == use(with_bitmaps.host, case), name
        assert group["nested"]["running"] == ([0] if case.stays else []), name
        # A filter that was set since was applied to the vCPU's own bitmap, and not to that for L2.
        if case.stays:
            assert group["nested"]["settled"] == (not case.denied_in_l2), name
        assert group["settled"], name


def test_both_bitmaps_are_the_kernels_own(with_bitmaps: Collected) -> None:
    vendor, seen = of_vendor(with_bitmaps.host), set()
    for name, case, pid, group in each(with_bitmaps):
        assert bitmap_said(vendor, group["passed"]) == witnessed(with_bitmaps, pid, "part"), name
        if use(with_bitmaps.host, case) == "merged":
            theirs = witnessed(with_bitmaps, pid, "nested")
            assert bitmap_said(vendor, group["nested"]["passed"]) == theirs, name
            seen.add(theirs)
        else:
            assert group["nested"]["passed"] is None
    assert len(seen) >= 5  # they differ


def test_it_is_the_bitmap_that_the_cpu_was_given(with_bitmaps: Collected) -> None:
    """By its physical address; on VMX that is in the VMCS, which nobody but the CPU can read."""
    if with_bitmaps.host not in AMD:
        assert not [event for event in recorded(with_bitmaps) if event.name == "place"]
        return
    checked = set()
    for name, case, pid, _ in each(with_bitmaps):
        last = [event.values for event in recorded(with_bitmaps) if event.thread == pid and event.name == "place"][-1]
        theirs = last["nested"] - (last["ptr"] - last["pa"])
        if case.stays:
            assert (last["in_use"] == theirs) == case.bitmap, name
            checked.add(case.bitmap)
    assert checked == {True, False}


def passing(host: str, case: Case, *, own: bool) -> set[tuple[int, int]]:
    """The accesses that L1, or L2, has of those that KVM of every kernel lets L1 have."""
    merged = SVM_OWN if host in AMD else VMX_MERGED
    found = (SVM_OWN if host in AMD else VMX_OWN) if own else merged
    denied = {*case.denied, *(case.denied_in_l2 if own else ())}
    return {one for one in found if one[0] not in denied and (own or one[0] not in case.reflected)}


def test_the_bits_are_those_that_follow_from_filter_and_l1(with_bitmaps: Collected) -> None:
    host, vendor = with_bitmaps.host, of_vendor(with_bitmaps.host)
    known = SVM_OWN if host in AMD else VMX_OWN
    for name, case, pid, _ in each(with_bitmaps):
        for own in (True, False):
            if not own and use(host, case) != "merged":
                continue
            bitmap = witnessed(with_bitmaps, pid, "part" if own else "nested")
            found = {one for one in known if is_clear(vendor, bitmap, *one)}
            assert found == passing(host, case, own=own), (name, own)


def expected(host: str, case: Case, msr: int, way: int, own: str) -> str:
    """What must be said of an access of L2, of those that KVM of every kernel lets L1 have; OWN is said of L1's."""
    l1_has, merged = (msr, way) in passing(host, case, own=True), host in AMD or msr in BASES
    if use(host, case) == "own" or not l1_has:
        if use(host, case) == "merged" and (msr, way) in passing(host, case, own=False):
            return "pending_denied"
        return own
    if use(host, case) == "none":
        return "l1"
    if not merged:
        return "unmerged"
    if msr not in case.reflected:
        return "passed"
    return "l1_or_unmerged" if case.denied_in_l2 else "l1"


def test_of_every_msr_is_said_why_it_exits(with_bitmaps: Collected) -> None:
    host, said = with_bitmaps.host, set()
    for name, case, _, group in each(with_bitmaps):
        rows = {msr: row for row in group["msrs"] for msr in numbers([row["msrs"]])}
        for msr, way in sorted(SVM_OWN if host in AMD else VMX_OWN):
            row, access = rows[msr], DIRECTIONS[way]
            denied = msr in (*case.denied, *case.denied_in_l2)
            # ESP and EIP of SYSENTER: SVM passes them on a condition, which no kernel from 6.17 on records.
            unknown = host in AMD and LAYOUTS[host] in ("set", "recalc") and msr in SYSENTER[1:]
            assert row[access] == ("passed" if not denied else "unrecorded" if unknown else "filter"), (name, hex(msr))
            if use(host, case) == "unused":
                assert "nested" not in row
                continue
            right = expected(host, case, msr, way, row[access])
            assert row["nested"][access] == right, f"{access} of {msr:#x}: {name}"
            said.add(right)
    assert said >= {"passed", "pending_denied", "filter", "l1", "l1_or_unmerged"}
    assert ("unmerged" in said) == (host not in AMD)


def test_what_exits_for_l1_is_said_of_l2_too(with_bitmaps: Collected) -> None:
    """Of all MSRs that are listed, whatever a kernel passes on a condition."""
    vendor = of_vendor(with_bitmaps.host)
    for name, case, pid, group in each(with_bitmaps):
        if use(with_bitmaps.host, case) != "merged":
            continue
        own, theirs = (witnessed(with_bitmaps, pid, what) for what in ("part", "nested"))
        for row in group["msrs"]:
            for msr in numbers([row["msrs"]]):
                for way, access in DIRECTIONS.items():
                    word = row["nested"][access]
                    if vendor.bits(msr) is None or not (
                        is_clear(vendor, own, msr, way) or is_clear(vendor, theirs, msr, way)
                    ):
                        assert word == row[access], f"{access} of {msr:#x}: {name}"
                    elif is_clear(vendor, theirs, msr, way):
                        assert word in ("passed", "pending_denied"), f"{access} of {msr:#x}: {name}"
                    else:
                        assert word in ("l1", "unmerged", "l1_or_unmerged"), f"{access} of {msr:#x}: {name}"


def test_it_is_shown_beside_what_is_said_of_l1(with_bitmaps: Collected) -> None:
    text = with_bitmaps.scenario("nested")["text"]["stdout"]
    assert "  nested guests (L2): in one just now: vCPU 0\n" in text
    [row] = [line.split() for line in text.splitlines() if line.startswith(f"  {SYSENTER_CS:#x}")][:1]
    word = "l1" if with_bitmaps.host in AMD else "unmerged"
    assert row[-4:] == ["passed", "passed", word, word]


def test_guests_that_go_in_and_out_of_l2_all_the_time(with_bitmaps: Collected) -> None:
    """GS_BASE passes for L1, which has its guests' accesses intercepted."""
    found = with_bitmaps.scenario("nested")["busy"]
    assert found["status"] == 0
    assert found["uses"].get("merged", 0) > sum(found["uses"].values()) / 2
    assert found["said"].keys() <= {"passed, l1", "passed, l1_or_unmerged"}
    assert found["said"]
    assert found["longest"] < 30  # of the guest's seconds


def test_bitmaps_that_are_made_and_freed_while_they_are_read(with_bitmaps: Collected) -> None:
    found = with_bitmaps.scenario("nested")["toggled"]
    if with_bitmaps.host not in AMD:
        assert found is None
        return
    assert found["uses"].keys() <= {"none yet", "unused", "unreadable"}
    assert found["longest"] < 30
