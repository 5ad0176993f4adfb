# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest of accesses/ counts its RDMSR and WRMSR as KVM's own tracepoints count their exits (scenarios/exits.py)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import Collected
from exits import CASES, FS_BASE, PASSED, SLOW_WRITE, Case, Fate, Op, deny
from ringbuffer import Event, read
from witness import lost_nothing

VMX, SVM = "vmx", "svm"
#: Of an event, isa (KVM_ISA_VMX, KVM_ISA_SVM: arch/x86/kvm/trace.h).
ISA = {1: VMX, 2: SVM}
VMX_ACCESS = {31: "read", 32: "write"}
#: Where nested_vmx_prepare_msr_bitmap() lets L2 have FS_BASE whether or not KVM lets L1: 5.10 reads no filter there.
FILTER_IGNORED_FOR_L2 = ["filter-only"]


@dataclass
class Exits:
    """Exits of RDMSR and WRMSR, by access; `emulated` by MSR, access, and whether that raised #GP."""

    all: Counter[str] = field(default_factory=Counter)
    of_l2: Counter[str] = field(default_factory=Counter)
    to_l1: Counter[str] = field(default_factory=Counter)
    emulated: Counter[tuple[int, str, bool]] = field(default_factory=Counter)
    slow_writes: int = field(default=0, compare=False)

    @classmethod
    def seen(cls, folder: Path) -> Exits:
        """What the tracepoints saw, as an ExitTracer left it in FOLDER."""
        lost_nothing(folder)
        found = cls()
        by_name = {
            "kvm_exit": found.all,
            "kvm_nested_vmexit": found.of_l2,
            "kvm_nested_vmexit_inject": found.to_l1,
        }
        for event in read(folder):
            values = event.values
            if event.name == SLOW_WRITE:
                found.slow_writes += 1
            elif event.name == "kvm_msr":
                key = (values["ecx"], "write" if values["write"] else "read", bool(values["exception"]))
                found.emulated[key] += 1
            else:
                by_name[event.name][_access(event)] += 1
        return found

    @classmethod
    def expected(cls, case: Case, host: str, vendor: str) -> Exits:
        found = cls()
        for op in case.ops:
            fate, count = fate_of(op, case, host, vendor), case.times * op.count
            if not fate.exits:
                continue
            found.all[op.access] += count
            if op.level == 2:
                found.of_l2[op.access] += count
            if fate.reflected:
                found.to_l1[op.access] += count
            elif not fate.user:
                found.emulated[op.msr, op.access, fate.gp] += count
        return found


def _access(event: Event) -> str:
    """Whether an exit is one of RDMSR or WRMSR: SVM says so in EXITINFO1 (APM vol. 2, 15.11)."""
    inject = event.name == "kvm_nested_vmexit_inject"
    reason, info = ("exit_code", "exit_info1") if inject else ("exit_reason", "info1")
    if ISA[event.values["isa"]] == VMX:
        return VMX_ACCESS[event.values[reason]]
    return "write" if event.values[info] else "read"


def fate_of(op: Op, case: Case, host: str, vendor: str) -> Fate:
    denied = deny(op.msr) in case.options
    if host in FILTER_IGNORED_FOR_L2 and op.level == 2 and op.msr == FS_BASE and denied:
        return PASSED
    return op.fate(vendor)


@pytest.mark.parametrize("name", CASES)
def test_the_guest_counts_what_was_to_become_of_its_accesses(collected: Collected, name: str) -> None:
    found, case = collected.scenario("exits"), CASES[name]
    expected = []
    for number, op in enumerate(case.ops):
        fate, count = fate_of(op, case, collected.host, found["vendor"]), case.times * op.count
        completed = not (fate.gp or fate.reflected)
        by_reason = {reason: count * (fate.user == reason) for reason in ("filter", "unknown", "invalid")}
        expected.append(
            {"op": number, "level": op.level, "access": op.access, "msr": op.msr}
            | {"executed": count, "completed": count * completed, "gp": count * fate.gp}
            | {"reflected": count * fate.reflected, "user": count * bool(fate.user)}
            | by_reason
        )
    assert found["counted"][name] == expected


@pytest.mark.parametrize("name", CASES)
def test_the_tracepoints_see_the_exits_of_as_many(collected: Collected, name: str) -> None:
    vendor = collected.scenario("exits")["vendor"]
    seen = Exits.seen(collected.folder / "exits" / name)
    assert seen == Exits.expected(CASES[name], collected.host, vendor)


def test_the_tracer_is_gone(collected: Collected) -> None:
    assert not collected.scenario("exits")["left"]
