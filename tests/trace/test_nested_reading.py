# SPDX-License-Identifier: GPL-2.0-or-later
"""What the iterator over bitmaps for nested guests writes, as a part of the state of vCPUs."""

from __future__ import annotations

import pytest
from state_kernel import REQUEST, Kernel, nested_record, record
from vcpus import FS_BASE, TSC, bitmap, rw

from tracer.model.errors import MsrtraceError
from tracer.model.msr_filter import READ
from tracer.model.nested import MERGED, NONE, OWN, UNREADABLE, UNUSED, Nested
from tracer.model.state import State, Vcpu
from tracer.model.svm import SVM
from tracer.model.vendor import Vendor
from tracer.model.vmx import VMX

MAY = record(0x1000, bitmap(VMX), nested=0x6000)
ONE, OTHER = bitmap(VMX, rw(FS_BASE)), bitmap(VMX, {(TSC, READ)})


def vcpus(state: State) -> list[Vcpu]:
    return [one for vm in state.vms for one in vm.vcpus]


def steadily(patch: pytest.MonkeyPatch, *nested: bytes, own: bytes = MAY) -> tuple[Kernel, Vcpu]:
    """A vCPU that is read as often as it has to be; NESTED are the readings of its bitmap for nested guests."""
    kernel = Kernel(scripts=[own], nested=[*nested])
    [vcpu] = vcpus(kernel.reader(patch).read(steady=True))
    return kernel, vcpu


def only(patch: pytest.MonkeyPatch, content: bytes, vendor: Vendor = VMX, **kernel: object) -> Nested:
    own = record(0x1000, bitmap(vendor), nested=0x6000)
    found = Kernel(vendor, [own], nested=[content], **kernel)  # type: ignore[arg-type]
    [vcpu] = vcpus(found.reader(patch).read(steady=True))
    assert vcpu.nested
    return vcpu.nested


def test_without_nested_guests_there_is_no_second_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a read of a thousand vCPUs costs stays as it was."""
    kernel = Kernel(scripts=[record(0x1000) + record(0x2000, vcpu_id=1)])
    assert [vcpu.nested for vcpu in vcpus(kernel.reader(monkeypatch).read(steady=True))] == [None, None]
    assert (kernel.reads, kernel.nested_reads) == (2, 0)


def test_a_merged_bitmap_belongs_to_its_vcpu(monkeypatch: pytest.MonkeyPatch) -> None:
    own = record(0x1000, nested=0x6000) + record(0x2000, vcpu_id=1) + record(0x3000, vcpu_id=2, nested=0x6100)
    content = nested_record(0x3000, OTHER, guest_mode=1, nested=0x6100) + nested_record(0x1000, ONE)
    kernel = Kernel(scripts=[own], nested=[content])
    found = [vcpu.nested for vcpu in vcpus(kernel.reader(monkeypatch).read(steady=True))]
    assert found == [Nested(MERGED, ONE), None, Nested(MERGED, OTHER)]
    assert [one and one.running for one in found] == [False, None, True]
    assert (kernel.reads, kernel.nested_reads) == (2, 2)


def test_several_descriptors_of_a_vcpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(monkeypatch, nested_record(bits=ONE) * 3) == Nested(MERGED, ONE)


@pytest.mark.parametrize(
    ("vendor", "given", "use"),
    [
        (VMX, {"in_use": 0xB5186DFA}, MERGED),
        (VMX, {"in_use": 0xA5186DFA}, NONE),
        (VMX, {"in_use": 0}, UNUSED),
        (SVM, {"in_use": 0x5000}, MERGED),
        (SVM, {"in_use": 0xA000}, OWN),
        (SVM, {"in_use": 0, "own": 0}, UNUSED),
    ],
)
def test_which_bitmap_is_in_use(
    monkeypatch: pytest.MonkeyPatch, vendor: Vendor, given: dict[str, int], use: str
) -> None:
    """One that is not is not told: whatever is in it, vCPUs are alike."""
    bits = bitmap(vendor, rw(FS_BASE))
    found = only(monkeypatch, nested_record(bits=bits, **given), vendor)
    assert found == Nested(use, bits if use == MERGED else None)


@pytest.mark.parametrize(
    "content",
    [
        nested_record(failed=1, bits=b""),
        nested_record(nested_after=0),  # freed while it was copied
        nested_record(nested_after=0x6100),
        b"",  # its descriptor was closed in between
        nested_record(0x7000),
    ],
)
def test_what_cannot_be_read(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    found = only(monkeypatch, content)
    assert (found.use, found.bitmap) == (UNREADABLE, None)


def test_a_vcpu_that_is_new_to_the_second_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(monkeypatch, nested_record(bits=ONE) + nested_record(0x7000)) == Nested(MERGED, ONE)


# --- whether it is what KVM merges now ---


def test_two_equal_readings_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the vCPU is in L2 is not what has to be equal."""
    kernel, vcpu = steadily(monkeypatch, nested_record(bits=ONE), nested_record(bits=ONE, guest_mode=1))
    assert vcpu.nested == Nested(MERGED, ONE)
    assert vcpu.nested.running
    assert (kernel.reads, kernel.nested_reads) == (2, 2)


@pytest.mark.parametrize("change", [{"bits": OTHER}, {"in_use": 0}, {"nested_after": 0}])
def test_what_has_changed_is_read_again(monkeypatch: pytest.MonkeyPatch, change: dict[str, object]) -> None:
    changed = nested_record(**{"bits": ONE} | change)  # type: ignore[arg-type]
    kernel, vcpu = steadily(monkeypatch, nested_record(bits=ONE), changed, changed)
    assert kernel.nested_reads == 3
    assert vcpu.nested
    assert vcpu.nested.settled


def test_what_never_stops_to_change_does_not_unsettle_the_vcpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """L1 may run several guests in turn on a vCPU."""
    kernel, vcpu = steadily(monkeypatch, *(nested_record(bits=ONE), nested_record(bits=OTHER)) * 9)
    assert vcpu.nested == Nested(MERGED, ONE, settled=False)
    assert vcpu.settled
    assert kernel.reads == 7


def test_what_is_settled_is_not_given_up_for_what_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another vCPU has to be read more often."""
    other = [record(0x2000, bitmap(VMX, {(0x10 + n, READ)}), vcpu_id=1) for n in range(4)]
    steady, later = nested_record(bits=ONE), [nested_record(bits=OTHER), nested_record(bits=ONE)] * 3
    kernel = Kernel(scripts=[MAY + one for one in other], nested=[steady, steady, *later])
    one, _ = vcpus(kernel.reader(monkeypatch).read(steady=True))
    assert kernel.nested_reads > 3
    assert one.nested == Nested(MERGED, ONE)


@pytest.mark.parametrize(("before", "now", "settled"), [(0, 0, True), (1, 0, True), (0, 1, True), (1, 1, False)])
def test_a_bitmap_of_the_vcpu_that_was_changed_since(
    monkeypatch: pytest.MonkeyPatch, before: int, now: int, settled: bool
) -> None:
    """KVM notes as changed also what it writes as it was: where the bits are the same, one reading without it does."""
    _, vcpu = steadily(monkeypatch, nested_record(bits=ONE, changed=before), nested_record(bits=ONE, changed=now))
    assert vcpu.nested == Nested(MERGED, ONE, settled=settled)
    assert vcpu.settled


def test_that_matters_only_where_a_bitmap_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(monkeypatch, nested_record(changed=1, in_use=1 << 3)) == Nested(NONE)


def test_a_single_reading_settles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(scripts=[MAY], nested=[nested_record(bits=ONE)])
    [vcpu] = vcpus(kernel.reader(monkeypatch).read())
    assert vcpu.nested == Nested(MERGED, ONE, settled=False)
    assert vcpu.settled


def test_a_request_concerns_the_vcpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    own = record(0x1000, bitmap(VMX), nested=0x6000, requests=REQUEST)
    _, vcpu = steadily(monkeypatch, nested_record(bits=ONE), own=own)
    assert vcpu.nested == Nested(MERGED, ONE)
    assert not vcpu.settled


# --- what a kernel lacks, and what nobody asked for ---


@pytest.mark.parametrize("missing", ["vmcs02", "msr_bitmap", "controls_shadow"])
def test_without_what_says_where_the_bitmap_is(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    kernel = Kernel(scripts=[record(0x1000)], missing=(missing,))
    host = kernel.reader(monkeypatch).read(steady=True)
    if missing == "msr_bitmap":  # then the vCPU's own cannot be found either
        assert [note.split(":")[0] for note in host.notes] == [
            "bitmaps cannot be read, so who intercepts what is unknown"
        ]
    else:
        assert f"what is intercepted of nested guests cannot be read: there is no {missing} in struct" in host.notes[0]
        assert vcpus(host)[0].bitmap is not None
    assert "nested_listed" not in kernel.targets
    assert not [name for name in kernel.values if name.startswith("nested")]


def test_a_kernel_that_does_not_note_that_the_vcpus_own_was_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = only(monkeypatch, nested_record(bits=ONE), missing=("force_msr_bitmap_recalc",))
    assert found == Nested(MERGED, ONE, settled=False)


def test_a_kernel_that_does_not_count_where_a_vcpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(monkeypatch, nested_record(bits=ONE, guest_mode=1), missing=("guest_mode",)).running is None


def test_who_does_not_ask_for_nested_guests_does_not_pay_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    kernel.reader(monkeypatch, nested=False)
    assert kernel.targets.keys() == {"file_listed", "copy_memory"}
    assert not [name for name in kernel.values if name.startswith("nested")]


def test_a_read_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Kernel(scripts=[MAY], nested=[OSError(7, "Argument list too long")]).reader(monkeypatch)
    with pytest.raises(MsrtraceError, match=r"^what vCPUs intercept cannot be read: Argument list too long$"):
        reader.read()
