# SPDX-License-Identifier: GPL-2.0-or-later
"""What the iterator writes, as the state of vCPUs; and what a kernel lacks."""

from __future__ import annotations

from itertools import chain, repeat

import pytest
from filters import allowing, denying
from state_kernel import REQUEST, Kernel, record
from vcpus import FS_BASE, SPEC_CTRL, TSC, VMX_LIST, bitmap, rw

from tracer.model.errors import MsrtraceError
from tracer.model.msr_filter import NO_FILTER, READ, WRITE, MsrFilter
from tracer.model.snapshot import VmInfo
from tracer.model.state import FILTER, KVM, PASSED, PENDING_ALLOWED, State, Vm
from tracer.model.svm import SVM
from tracer.model.vmx import VMX
from tracer.program.program import NotPermitted
from tracer.trace import state_reader
from tracer.trace.state_reader import named
from tracer.trace.vm_info import VmInfos

MANY = MsrFilter(
    False, (allowing(0x10, 1), allowing(0x174, 70, [0x175], WRITE), allowing(0xC0000080, 12288, flags=READ))
)


def read(patch: pytest.MonkeyPatch, *records: bytes, steady: bool = False, **kernel: object) -> State:
    """What one run of the iterator says."""
    return Kernel(scripts=[b"".join(records)], **kernel).reader(patch).read(steady=steady)  # type: ignore[arg-type]


def only(state: State) -> Vm:
    [vm] = state.vms
    return vm


# --- records ---


def test_no_vcpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch).vms == ()


def test_vcpus_of_vms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted by process and id; what follows a record belongs to it, whatever its length."""
    ones = bitmap(VMX, rw(FS_BASE))
    found = read(
        monkeypatch,
        record(0x1000, ones, MANY, kvm=0x9000, tgid=300, vcpu_id=1),
        record(0x2000, b"", kvm=0x8000, tgid=200, vcpu_id=0),
        record(0x3000, ones, MANY, kvm=0x9000, tgid=300, vcpu_id=0),
    )
    one, other = found.vms
    assert (one.pid, one.key, [vcpu.id for vcpu in one.vcpus]) == (200, 0x8000, [0])
    assert (other.pid, other.key, [vcpu.id for vcpu in other.vcpus]) == (300, 0x9000, [0, 1])
    assert one.vcpus[0].bitmap == b""
    assert one.filter == NO_FILTER
    assert {vcpu.bitmap for vcpu in other.vcpus} == {ones}
    assert len({id(vcpu.bitmap) for vcpu in other.vcpus}) == 1  # thousands of vCPUs have equal ones
    assert [vcpu.filter for vcpu in other.vcpus] == [MANY, MANY]
    assert other.vcpus[0].filter is other.vcpus[1].filter


def test_several_descriptors_of_a_vcpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process may have it twice, and others may: the one that made the VM is its process."""
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        records = [record(tgid=7, owned=0), record(tgid=100), record(tgid=100, fd=30)]
        vm = only(read(monkeypatch, *(records[at] for at in order)))
        assert (vm.pid, vm.owned, len(vm.vcpus)) == (100, True, 1)


def test_a_descriptor_that_outlives_its_vm(monkeypatch: pytest.MonkeyPatch) -> None:
    vm = only(read(monkeypatch, record(0x1000, tgid=7, owned=0), record(0x2000, tgid=8, owned=0, vcpu_id=1)))
    assert (vm.pid, vm.owned, len(vm.vcpus)) == (7, False, 2)


def test_a_vm_of_which_another_process_has_one_vcpu(monkeypatch: pytest.MonkeyPatch) -> None:
    vm = only(read(monkeypatch, record(0x1000, tgid=7, owned=0, vcpu_id=0), record(0x2000, tgid=100, vcpu_id=1)))
    assert (vm.pid, vm.owned, [vcpu.id for vcpu in vm.vcpus]) == (100, True, [0, 1])


def test_two_vms_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    found = read(monkeypatch, record(0x1000, kvm=0x9000), record(0x2000, kvm=0x8000))
    assert [(vm.pid, vm.key) for vm in found.vms] == [(100, 0x8000), (100, 0x9000)]


@pytest.mark.parametrize(("failed", "known"), [(1, (False, True)), (2, (True, False)), (3, (False, False))])
def test_reads_that_failed(monkeypatch: pytest.MonkeyPatch, failed: int, known: tuple[bool, bool]) -> None:
    content = record(failed=failed, bits=b"" if failed & 1 else bytes(4096))
    vcpu = only(read(monkeypatch, content)).vcpus[0]
    assert (vcpu.bitmap is not None, vcpu.filter is not None) == known


def test_a_filter_of_which_a_range_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows the record is as long as it says, so the next record is found."""
    broken = record(0x1000, vmm_filter=MANY, failed=2, range_bytes=(8, 0, 1536))
    content = broken[: -len(MANY.ranges[1].allowed) - 1536] + broken[-1536:]
    one, other = only(read(monkeypatch, content, record(0x2000, vcpu_id=1))).vcpus
    assert (one.filter, other.filter) == (None, NO_FILTER)


def test_a_filter_that_is_replaced_while_it_is_copied_may_be_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    vcpu = only(read(monkeypatch, record(vmm_filter=MANY, filter_after=0x7700))).vcpus[0]
    assert (vcpu.filter, vcpu.settled) == (None, False)


@pytest.mark.parametrize("exits", [0, 1])
def test_whether_it_ran(monkeypatch: pytest.MonkeyPatch, exits: int) -> None:
    assert only(read(monkeypatch, record(exits=exits))).vcpus[0].ran == bool(exits)
    assert only(read(monkeypatch, record(exits=exits), missing=("exits",))).vcpus[0].ran is None


def test_tdx_has_no_bitmap_of_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, tdx = read(monkeypatch, record(0x1000), record(0x2000, b"", kvm=0xB000, vm_type=5, bitmap=0)).vms
    assert (plain.kind, tdx.kind) == ("", "TDX")
    assert plain.vcpus[0].bitmap is not None
    assert tdx.vcpus[0].bitmap is None


def test_no_kind_of_vm_is_without_a_bitmap_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    vm = only(read(monkeypatch, record(bits=bytes(6144), vm_type=5), vendor=SVM))
    assert (vm.kind, vm.vcpus[0].bitmap) == ("", bytes(6144))


# --- what KVM itself wants ---


def test_the_shadow_of_both_vendors_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 is to intercept on VMX, with ones beyond the end of the list; on SVM 1 is to pass."""
    of_vmx = record(shadow_read=~0b0010 & (1 << 64) - 1, shadow_write=~0b0100 & (1 << 64) - 1)
    vcpu = only(read(monkeypatch, of_vmx)).vcpus[0]
    assert vcpu.shadow == (0b1101, 0b1011)
    of_svm = record(bits=bytes(6144), shadow_read=0b001, shadow_write=0b100)
    host = read(monkeypatch, of_svm, vendor=SVM)
    assert host.recorded == (0xC0000081, 0x48, 0xC0000100)
    assert only(host).vcpus[0].shadow == (0b110, 0b011)


def test_who_wants_it_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = bitmap(VMX, {(TSC, READ)})
    content = record(bits=ones, vmm_filter=denying(FS_BASE), shadow_read=0b1001, shadow_write=0b1011)
    host = read(monkeypatch, content)
    [vcpu] = only(host).vcpus
    assert (host.verdict(vcpu, TSC).of(READ), host.verdict(vcpu, TSC).of(WRITE)) == (PASSED, KVM)
    assert host.verdict(vcpu, FS_BASE).of(READ) == FILTER
    assert host.verdict(vcpu, SPEC_CTRL).of(READ) == KVM


@pytest.mark.parametrize(
    ("memory", "note"),
    [
        (b"\x48\0\0\0" * 70, "what KVM itself wants is not known: vmx_possible_passthrough_msrs does not end as"),
        (b"", "what KVM itself wants is not known: vmx_possible_passthrough_msrs does not end as"),
    ],
)
def test_a_list_that_is_not_the_kernels(monkeypatch: pytest.MonkeyPatch, memory: bytes, note: str) -> None:
    host = read(monkeypatch, record(), memory=memory)
    assert (host.recorded, only(host).vcpus[0].shadow) == ((), None)
    assert host.notes[0].startswith(note)


def test_a_list_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    host = read(monkeypatch, record(), symbols=("kvm_vcpu_release",))
    assert host.recorded == ()
    assert host.notes == ("what KVM itself wants is not known: /proc/kallsyms has no vmx_possible_passthrough_msrs",)


def test_a_list_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    host = read(monkeypatch, record(), missing=("list",))
    assert host.notes == ("what KVM itself wants is not known: vmx_possible_passthrough_msrs cannot be read",)


def test_a_kernel_that_does_not_record_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """6.17: its absence is no note, but a word of the table."""
    host = read(monkeypatch, record(), missing=("shadow_msr_intercept",))
    assert (host.recorded, host.notes, only(host).vcpus[0].shadow) == ((), (), None)


# --- whether what was read fits together ---


@pytest.mark.parametrize(
    ("given", "settled"),
    [
        ({}, True),
        ({"requests": REQUEST}, False),
        ({"requests": ~REQUEST & (1 << 64) - 1}, True),
        ({"gp_seq": 41, "gp_seq_needed": 44}, False),  # under way
        ({"gp_seq": 42, "gp_seq_needed": 40}, False),
        ({"gp_seq": 40, "gp_seq_needed": 44}, False),  # asked for
        ({"gp_seq": 44, "gp_seq_needed": 40}, True),  # none since
        ({"gp_seq": (1 << 64) - 4, "gp_seq_needed": 0}, False),  # the numbers begin again
        ({"gp_seq": 0, "gp_seq_needed": (1 << 64) - 4}, True),
    ],
)
@pytest.mark.parametrize("steady", [False, True])
def test_what_is_to_be_computed_anew(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, int], settled: bool, steady: bool
) -> None:
    host = read(monkeypatch, record(bits=bitmap(VMX), shadow_read=1, **given), steady=steady)  # type: ignore[arg-type]
    assert only(host).vcpus[0].settled == settled


@pytest.mark.parametrize(
    ("missing", "values"),
    [
        ((), {"kvm_srcu": 16, "srcu_pointer": 1, "srcu_gp_seq": 8, "srcu_gp_seq_needed": 8}),
        (("srcu_sup",), {"kvm_srcu": 8, "srcu_gp_seq": 8, "srcu_gp_seq_needed": 8}),  # before 6.4
        (("srcu_sup", "srcu_gp_seq"), {}),  # CONFIG_TINY_SRCU
        (("srcu_usage",), {}),
    ],
)
def test_where_numbers_of_grace_periods_are(
    monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], values: dict[str, int]
) -> None:
    kernel = Kernel(missing=missing)
    kernel.reader(monkeypatch)
    assert {name: value for name, value in kernel.values.items() if "srcu" in name} == values


def steadily(patch: pytest.MonkeyPatch, *scripts: bytes) -> tuple[Kernel, State]:
    kernel = Kernel(scripts=[*scripts])
    return kernel, kernel.reader(patch).read(steady=True)


ONE, OTHER = record(bits=bitmap(VMX)), record(bits=bitmap(VMX, rw(FS_BASE)))


def test_two_equal_readings_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, host = steadily(monkeypatch, ONE, record(bits=bitmap(VMX), exits=8, fd=9, requests=1))
    assert only(host).vcpus[0].settled
    assert (kernel.reads, kernel.slept) == (2, 0.02)


@pytest.mark.parametrize(
    "change",
    [
        {"vmm_filter": denying(FS_BASE)},
        {"filter": 0x7700},
        {"shadow_read": 4},
        {"requests": REQUEST},
        {"failed": 2},
        {"bits": bitmap(VMX, rw(FS_BASE))},
    ],
)
def test_what_has_changed_is_read_again(monkeypatch: pytest.MonkeyPatch, change: dict[str, object]) -> None:
    changed = record(**{"bits": bitmap(VMX)} | change)  # type: ignore[arg-type]
    kernel, host = steadily(monkeypatch, ONE, changed, changed)
    assert kernel.reads == 3
    assert only(host).vcpus[0].settled == ("requests" not in change)
    assert only(host) == only(read(monkeypatch, changed))


def test_a_grace_period_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new filter is there, and the request for it only after: the bits are of the old one."""
    swapped = record(bits=bitmap(VMX), gp_seq=41, gp_seq_needed=44, shadow_read=0xF, shadow_write=0xF)
    asked = record(bits=bitmap(VMX), requests=REQUEST, gp_seq=44, gp_seq_needed=44)
    done = record(bits=bitmap(VMX, rw(FS_BASE)), gp_seq=44, gp_seq_needed=44)
    kernel, host = steadily(monkeypatch, swapped, swapped, swapped, asked, done, done)
    assert kernel.reads == 6
    assert host.verdict(only(host).vcpus[0], FS_BASE).of(READ) == PASSED


def test_what_never_stops_to_change_is_not_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, host = steadily(monkeypatch, *chain(*repeat((ONE, OTHER), 9)))
    assert not only(host).vcpus[0].settled
    assert kernel.reads == 7
    assert kernel.slept == pytest.approx(0.12)


def test_a_vcpu_that_changes_does_not_unsettle_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one that was settled when others were not, and changes afterwards: it is as it was then."""
    still = record(0x2000, bitmap(VMX), vcpu_id=1)
    _, host = steadily(monkeypatch, *(one + still for one in chain(*repeat((ONE, OTHER), 9))))
    assert [vcpu.settled for vcpu in only(host).vcpus] == [False, True]
    later = record(0x2000, bitmap(VMX, rw(TSC)), vcpu_id=1)
    changing = [*chain(*repeat((ONE, OTHER), 3)), ONE]
    _, host = steadily(monkeypatch, *(one + (still if at < 6 else later) for at, one in enumerate(changing)))
    assert [vcpu.settled for vcpu in only(host).vcpus] == [False, True]
    assert only(host).vcpus[1].bitmap == bitmap(VMX)


def test_vcpus_that_come_and_go_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    new = record(0x2000, bitmap(VMX), vcpu_id=1)
    kernel, host = steadily(monkeypatch, ONE, ONE + new, ONE + new)
    assert [(vcpu.id, vcpu.settled) for vcpu in only(host).vcpus] == [(0, True), (1, True)]
    assert kernel.reads == 3
    _, host = steadily(monkeypatch, ONE + new, ONE)
    assert [vcpu.id for vcpu in only(host).vcpus] == [0]


def test_a_vcpu_that_never_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """6.18: all ones, and a request that no one takes. It is as it is, so it is not read for ever."""
    never = record(bits=bitmap(VMX), exits=0, requests=REQUEST)
    kernel = Kernel(scripts=[never], missing=("shadow_msr_intercept",))
    host = kernel.reader(monkeypatch).read(steady=True)
    [vcpu] = only(host).vcpus
    assert (kernel.reads, vcpu.settled, vcpu.ran) == (6, False, False)
    assert host.verdict(vcpu, FS_BASE).of(READ) == PENDING_ALLOWED


# --- what a kernel lacks ---


def test_without_btf_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """5.10: vCPUs and filters are there."""
    host = read(monkeypatch, record(bits=b"", vmm_filter=MANY), module_btf=False)
    vcpu = only(host).vcpus[0]
    assert (vcpu.bitmap, vcpu.filter, vcpu.shadow) == (None, MANY, None)
    assert host.notes == (
        "bitmaps cannot be read, so who intercepts what is unknown: /sys/kernel/btf has nothing of kvm_intel",
    )


def test_in_another_pid_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    [note] = read(monkeypatch, init_pids=False).notes
    assert note.startswith("only the VMs of this pid namespace are seen")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (Kernel(missing=("private_data",)), "there is no private_data in struct file"),
        (Kernel(missing=("bpf_iter_task_file",)), "there is no function bpf_iter_task_file"),
        (Kernel(symbols=()), "/proc/kallsyms has no address of kvm_vcpu_release; root or CAP_SYSLOG, and "),
    ],
)
def test_what_is_needed(monkeypatch: pytest.MonkeyPatch, kernel: Kernel, reason: str) -> None:
    with pytest.raises(MsrtraceError, match=f"^what vCPUs intercept cannot be read: {reason}"):
        kernel.reader(monkeypatch)


def test_what_the_kernel_does_not_permit(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> None:
        raise NotPermitted

    monkeypatch.setattr(Kernel, "build", build)
    with pytest.raises(MsrtraceError, match=r"^the kernel refused: a reason$"):
        Kernel().reader(monkeypatch)


def test_a_read_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Kernel(scripts=[OSError(7, "Argument list too long")]).reader(monkeypatch)
    with pytest.raises(MsrtraceError, match=r"^what vCPUs intercept cannot be read: Argument list too long$"):
        reader.read()


def test_everything_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    kernel.reader(monkeypatch).close()
    assert kernel.closed == 3  # the iterators, and what was loaded


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    class Names(VmInfos):
        def info(self, pid: int) -> VmInfo | None:
            return {100: VmInfo("web")}.get(pid)

    host = read(monkeypatch, record(0x1000), record(0x2000, kvm=0x8000, tgid=7))
    assert [(vm.pid, vm.name) for vm in named(host, Names()).vms] == [(7, ""), (100, "web")]


def test_the_list_that_is_made_up_here_is_like_the_kernels() -> None:
    assert VMX_LIST[-1] == VMX.shadow.last
    assert state_reader._REQUEST == REQUEST
