# SPDX-License-Identifier: GPL-2.0-or-later
"""What a scrape says of the states of vCPUs: how many intercept what, and who wants that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from prometheus_client.parser import text_string_to_metric_families

from tracer.export.exposition import Families, LabelSets, exposed
from tracer.export.state_metrics import state_families
from tracer.model.msr_filter import READ, WRITE, FilterRange, MsrFilter
from tracer.model.state import State, Vcpu, Vm
from tracer.model.svm import SVM
from tracer.model.vendor import Vendor
from tracer.model.vmx import VMX

FS_BASE, TSC, PRED_CMD = 0xC0000100, 0x10, 0x49
DENIES_FS_BASE = MsrFilter(ranges=(FilterRange(READ | WRITE, FS_BASE, 1, bytes(8)),))
RECORDED = (PRED_CMD, TSC, FS_BASE)


def bitmap(vendor: Vendor, *passed: tuple[int, int]) -> bytes:
    """A bitmap with the bits of these accesses clear."""
    bits = bytearray(b"\xff" * vendor.bitmap_geometry.size)
    for msr, direction in passed:
        at = vendor.bitmap_geometry.place(msr, direction)
        assert at is not None
        bits[at >> 3] &= ~(1 << (at & 7))
    return bytes(bits)


def scraped(state: State, *, by_vm: bool = False) -> Mapping[str, float]:
    """The values of series, by their text."""
    text = exposed(Families(state_families(state, LabelSets({}), by_vm=by_vm))).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.labels.get("name", "")
            rest = ",".join(
                f"{key}={sample.labels[key]}" for key in ("access", "by", "vm", "pid") if key in sample.labels
            )
            found[" ".join(part for part in (sample.name, name, rest) if part)] = sample.value
    return found


def a_host(vendor: Vendor = VMX) -> State:
    """Two VMs of two vCPUs: the filter of the first denies FS_BASE, which its second vCPU has not applied yet.

    KVM lets both read the TSC and have FS_BASE, and intercepts PRED_CMD.
    """
    passes = ((TSC, READ), (FS_BASE, READ), (FS_BASE, WRITE))
    shadow = (0b001, 0b011)  # reads and writes that KVM intercepts: PRED_CMD; also writes of the TSC
    old = Vcpu(1, bitmap(vendor, *passes), DENIES_FS_BASE, shadow, settled=False, ran=True)
    new = Vcpu(0, bitmap(vendor, (TSC, READ)), DENIES_FS_BASE, shadow, ran=True)
    free = tuple(Vcpu(number, bitmap(vendor, *passes), shadow=shadow, ran=True) for number in (0, 1))
    return State(vendor, RECORDED, (Vm(812, 1, (new, old), name="web"), Vm(844, 2, free, name="db")))


def test_each_access_by_who_wants_it_intercepted() -> None:
    for vendor in (VMX, SVM):
        found = scraped(a_host(vendor))
        series = {key.removeprefix("msrtrace_msr_intercepted_vcpus "): v for key, v in found.items() if " " in key}
        assert series == {
            "FS_BASE access=read,by=filter": 1,
            "FS_BASE access=read,by=pending": 1,
            "FS_BASE access=write,by=filter": 1,
            "FS_BASE access=write,by=pending": 1,
            "IA32_PRED_CMD access=read,by=kvm": 4,
            "IA32_PRED_CMD access=write,by=kvm": 4,
            "IA32_TSC access=write,by=kvm": 4,
        }
        assert (found["msrtrace_vcpus"], found["msrtrace_unreadable_vcpus"]) == (4, 0)


def test_by_vm_what_kvm_alone_intercepts_is_left_out() -> None:
    found = scraped(a_host(), by_vm=True)
    assert found == {
        "msrtrace_vcpus vm=web,pid=812": 2,
        "msrtrace_vcpus vm=db,pid=844": 2,
        "msrtrace_unreadable_vcpus vm=web,pid=812": 0,
        "msrtrace_unreadable_vcpus vm=db,pid=844": 0,
        "msrtrace_msr_intercepted_vcpus FS_BASE access=read,by=filter,vm=web,pid=812": 1,
        "msrtrace_msr_intercepted_vcpus FS_BASE access=read,by=pending,vm=web,pid=812": 1,
        "msrtrace_msr_intercepted_vcpus FS_BASE access=write,by=filter,vm=web,pid=812": 1,
        "msrtrace_msr_intercepted_vcpus FS_BASE access=write,by=pending,vm=web,pid=812": 1,
    }


def test_the_vms_of_one_process_are_one_series() -> None:
    state = a_host()
    found = scraped(replace(state, vms=tuple(replace(vm, pid=812, name="web") for vm in state.vms)), by_vm=True)
    assert found["msrtrace_vcpus vm=web,pid=812"] == 4
    assert found["msrtrace_msr_intercepted_vcpus FS_BASE access=read,by=filter,vm=web,pid=812"] == 1


def test_vcpus_whose_bitmap_cannot_be_read_are_counted_as_such() -> None:
    unread = Vcpu(0, None)
    found = scraped(State(VMX, (), (Vm(812, 1, (unread, unread)),)))
    assert found == {"msrtrace_vcpus": 2, "msrtrace_unreadable_vcpus": 2}


def test_no_vm_is_no_vcpu() -> None:
    assert scraped(State()) == {"msrtrace_vcpus": 0, "msrtrace_unreadable_vcpus": 0}


def test_a_filter_of_all_msrs_makes_no_series_of_each() -> None:
    """16 ranges that deny 12,288 MSRs each, and everything else by default."""
    ranges = tuple(FilterRange(READ | WRITE, base << 16, 12288, bytes(1536)) for base in range(16))
    vcpu = Vcpu(0, bitmap(VMX), MsrFilter(default_allow=False, ranges=ranges))
    found = scraped(State(VMX, (), (Vm(812, 1, (vcpu,)),)))
    assert len(found) < 2 + 2 * len(State(VMX).candidates)
    assert found["msrtrace_msr_intercepted_vcpus FS_BASE access=read,by=filter"] == 1
    assert found["msrtrace_msr_intercepted_vcpus IA32_SPEC_CTRL access=read,by=unrecorded"] == 1


def test_the_x2apics_msrs_have_no_series() -> None:
    vcpu = Vcpu(0, bitmap(VMX, *((msr, READ) for msr in range(0x800, 0x900))))
    assert len(scraped(State(VMX, (), (Vm(812, 1, (vcpu,)),)))) == 2
