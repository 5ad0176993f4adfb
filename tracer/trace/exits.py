# SPDX-License-Identifier: GPL-2.0-or-later
"""Counts the exits of guests' RDMSR and WRMSR, with a BPF program of its own (bpf/exits.c)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from tracer.kernel.btf import Btf, BtfError
from tracer.kernel.headers import header_settings
from tracer.kernel.symbols import Symbols
from tracer.model import msr
from tracer.model.errors import MsrtraceError
from tracer.model.exits import EXIT_FUNCTIONS, FAST, FILTERED, INVALID, L1, L2, OK, REFLECTED, SLOW, UNKNOWN, Exit
from tracer.model.options import Options
from tracer.model.snapshot import Map, Probe, Snapshot
from tracer.program.compiler import build
from tracer.program.program import NotPermitted, Target, Variant
from tracer.program.resources import resource
from tracer.program.syscalls import MappedArray, run_program
from tracer.trace.plan import cast_type, chosen, fentry_targets, process_values
from tracer.trace.probes import Point, Probes, joined
from tracer.trace.reader import SETTLE_PAUSE_SECONDS, TakenPlaces, is_at_rest, reads_init_pids

SOURCE = "bpf/exits.c"
#: How many places there are where processes are not told apart: first_place() makes no index beyond. OTHERS and the
#: vCPUs of bpf/exits.c come on top.
_PLACES_OF_ONE = 2048
_OF_ONE = {"exits": _PLACES_OF_ONE + 64, "taken": _PLACES_OF_ONE + 16384}
_ACCESS = {1: "read", 2: "write"}
#: Of an array, the member that is not 0 where a value is in use, and the count that grows when another comes into use.
_EXITS, _VCPUS = ("key", "places_taken"), ("vcpu", "vcpus_seen")
#: enum result of bpf/exits.c
_RESULTS = (OK, FILTERED, UNKNOWN, INVALID, REFLECTED)
_RCX = 8  # bytes: enum kvm_reg, arch/x86/include/asm/kvm_host.h
_HF_GUEST_MASK = 1 << 5  # the same, before 5.15
_FAILED = "exits cannot be counted"


def exit_points(symbols: Symbols) -> list[Point]:
    """What is probed: what ends an exit before what begins one."""
    functions, vendor = EXIT_FUNCTIONS, symbols.vendor
    found = [
        Point(symbols.first_of(vendor.vcpu_free), "vcpu_freed"),
        Point(functions.refused, "access_refused"),
        Point(functions.write, "write_entered"),
        Point(symbols.first_of(functions.write_fast), "fast_write_entered"),
        Point(functions.read, "read_entered"),
        Point(symbols.first_of(vendor.nested_exit), f"nested_{vendor.name}_exit_entered"),
    ]
    in_instruction = [
        Point(functions.write_imm, "write_imm_entered"),
        Point(functions.write_fast_imm, "fast_write_imm_entered"),
        Point(functions.read_imm, "read_imm_entered"),
    ]
    return found + [point for point in in_instruction if symbols.find(point.function)]


def exit_values(symbols: Symbols, options: Options) -> tuple[dict[str, int], Btf]:
    """What is put into the program of bpf/exits.c, and the BTF of the vendor's module or else of the kernel.

    Raises MsrtraceError if it cannot be had.
    """
    vendor = symbols.vendor
    try:
        btf = Btf.of_kernel()
        if symbols.module:
            with suppress(BtfError):
                btf = Btf.of_module(symbols.module, base=btf)
        found = {
            "rcx_offset": btf.nested_offset((("kvm_vcpu", "arch"), ("kvm_vcpu_arch", "regs"))) + _RCX,
            "exits_offset": btf.nested_offset((("kvm_vcpu", "stat"), ("kvm_vcpu_stat", "exits"))),
            **_nested(btf),
        }
        if vendor.control_block:
            # The second member of its struct; the first is the vCPU.
            found |= vendor.control_block_values
            with suppress(BtfError):
                found["control_offset"] = btf.size("kvm_vcpu")
                found["control_offset"] = btf.offset(*vendor.control_block)
    except BtfError as error:
        raise MsrtraceError(f"{_FAILED}: {error}") from None
    found |= cast_type(btf)
    completions = {name: symbols.find(function) for name, function in EXIT_FUNCTIONS.completions.items()}
    if completions["complete_read"] and completions["complete_write"]:
        found |= {name: places[0].address for name, places in completions.items() if places}
    found |= process_values(options, btf)
    if not options.by_vm:
        found["places"] = _PLACES_OF_ONE
    return found, btf


def _nested(btf: Btf) -> dict[str, int]:
    """Where a vCPU says that a nested guest runs. Raises BtfError."""
    try:
        offset = btf.nested_offset((("kvm_vcpu", "stat"), ("kvm_vcpu_stat", "guest_mode")))
    except BtfError:
        offset = btf.nested_offset((("kvm_vcpu", "arch"), ("kvm_vcpu_arch", "hflags")))
        return {"nested_offset": offset, "nested_bits": _HF_GUEST_MASK}
    return {"nested_offset": offset, "nested_bits": (1 << 64) - 1}


def exit_variants(symbols: Symbols, given: Mapping[str, int], options: Options, btf: Btf) -> list[Variant]:
    """How the program may be loaded, what is preferred first. Raises MsrtraceError if the user's choice cannot be."""
    wanted = exit_points(symbols)
    reader = {"exits_of_vcpu": Target("raw_tracepoint"), "exit_ended": Target("raw_tracepoint")}
    kprobe = {point.entry: Target("kprobe") for point in wanted}
    found = [Variant("kprobe", {}, kprobe | reader, given, capacities={} if options.by_vm else _OF_ONE)]
    problem = ""
    try:
        tracing = fentry_targets(wanted, symbols, symbols.find, btf)
    except BtfError as error:
        problem = str(error)
    else:
        found.insert(0, replace(found[0], backend="fentry", definitions={"FENTRY": 1}, functions=tracing | reader))
    return chosen(found, options, problem, btf)


@dataclass(frozen=True)
class CountedExits:
    """Exits by their kind; how many are in progress; `counts` by the members of struct counts; what maps hold."""

    exits: Mapping[Exit, int]
    open_exits: int
    counts: Mapping[str, int]
    maps: tuple[Map, ...]


class ExitCounter:
    """Attached probes and what they count."""

    def __init__(self, symbols: Symbols, options: Options, explain: Callable[[], str]) -> None:
        """Compile and load. `explain` says why the kernel probably did not permit it. Raises MsrtraceError."""
        self._options = options
        self._values, btf = exit_values(symbols, options)
        try:
            self._built = build(resource(SOURCE), exit_variants(symbols, self._values, options, btf), header_settings)
        except NotPermitted:
            raise MsrtraceError(explain()) from None
        loaded = self._built.loaded
        self._probes = Probes(self._built, explain)
        self.reader = ExitReader(loaded.arrays, loaded.functions)

    def fits(self, symbols: Symbols) -> bool:
        """Whether the program fits the modules that are loaded now."""
        return exit_values(symbols, self._options)[0] == self._values

    def attach(self, symbols: Symbols) -> list[Probe]:
        """Attach, with all the rights that there are. Raises MsrtraceError when nothing can be counted."""
        probes = self._probes.attach(exit_points(symbols), symbols, symbols.find)
        counting = [p for p in probes if p.function in (EXIT_FUNCTIONS.read, EXIT_FUNCTIONS.write)]
        if not any(p.attached for p in counting):
            self._probes.remove()
            raise MsrtraceError(f"{_FAILED} ({'; '.join(f'{p.function}: {p.detail}' for p in counting)})")
        self.reader.reset_unpaired()  # of accesses that were under way
        return probes

    def detach(self) -> None:
        """Remove the probes and forget what they counted."""
        self._probes.remove()
        self.reader.clear()
        self._built.loaded.free_places()

    def added_to(self, snapshot: Snapshot, patience: float) -> Snapshot:
        """The snapshot with what is counted now; `patience`: the seconds to wait for exits that are in progress."""
        counted = self.reader.read(patience)
        return replace(
            snapshot,
            exits=counted.exits,
            open_exits=counted.open_exits,
            unpaired_refusals=counted.counts["unpaired_refusal"],
            probes=tuple(joined(snapshot.probes + self._probes.counted(counted.counts))),
            maps=snapshot.maps + counted.maps,
        )

    def forget(self, vmms: set[int]) -> None:
        """Make room: the counts of processes that have ended become those of VMM 0."""
        self.reader.forget(vmms)

    def close(self) -> None:
        """Detach everything."""
        self._probes.remove()
        self._built.loaded.close()


@dataclass(frozen=True)
class _Open:
    """The exit that was begun last on a vCPU.

    `left`: how often that had left its guest when it was first seen not to be over; None: it was not.
    """

    seq: int
    key: int
    vmm: int
    left: int | None
    over: bool = False


class ExitReader:
    """Reads the arrays of the program. No count ever decreases, and none is above the truth."""

    def __init__(self, arrays: Mapping[str, MappedArray], functions: Mapping[str, int]) -> None:
        """`arrays` and `functions` (descriptors) are by name."""
        self._exits, self._vcpus, self._counts = arrays["exits"], arrays["vcpus"], arrays["counts"]
        self._functions = functions
        self._open: dict[int, _Open] = {}
        self._last: dict[tuple[int, int], int] = {}
        self._kinds: dict[tuple[int, int], Exit] = {}
        self._taken = TakenPlaces(self._counts)
        self._sees_threads = reads_init_pids()

    def read(self, patience: float = 0) -> CountedExits:
        """What is counted now. `patience`: the seconds to wait for exits that are in progress.

        An exit is counted by the program when the next one of its vCPU begins. The last one of each vCPU is added here
        once it is over, unless the program does that at the same time: then the next reading has it.
        """
        in_progress = self._look(patience)
        counts = {name: self._counts.get(0, name) for name in self._counts.members}
        found: Counter[tuple[int, int]] = Counter()
        taken = self._taken.of(self._exits, *_EXITS)
        for place in taken:
            found[self._exits.get(place, "key"), self._exits.get(place, "vmm")] += self._exits.get(place, "count")
        for index, one in self._open.items():
            if one.over and self._vcpus.get(index, "seq") == one.seq:
                found[one.key, one.vmm] += 1
        self._last = {kind: max(found[kind], self._last.get(kind, 0)) for kind in found.keys() | self._last.keys()}
        vcpus = self._taken.of(self._vcpus, *_VCPUS)
        return CountedExits(
            exits={self._kind(*kind): count for kind, count in self._last.items() if kind[0] and count},
            open_exits=in_progress,
            counts=counts,
            maps=(
                Map("exits", len(taken), self._exits.entries, counts["dropped_exits"]),
                Map("exits_vcpus", len(vcpus), self._vcpus.entries, counts["dropped_vcpus"]),
            ),
        )

    def _kind(self, key: int, vmm: int) -> Exit:
        """A key as the reader of a snapshot wants it: struct kind of bpf/exits.c."""
        if (key, vmm) not in self._kinds:
            index, access, fast, result, nested, other = (key >> at & mask for at, mask in _FIELDS)
            self._kinds[key, vmm] = Exit(
                msr.OTHER if other else index,
                _ACCESS[access],
                FAST if fast else SLOW,
                _RESULTS[result],
                L2 if nested else L1,
                vmm,
            )
        return self._kinds[key, vmm]

    def _look(self, patience: float) -> int:
        """Look which exits are open, and which of them are over; how many are not."""
        deadline = time.monotonic() + patience
        indices = self._taken.of(self._vcpus, *_VCPUS)
        self._open = {index: one for index in indices if (one := self._open_of(index))}
        while True:
            unsure = [index for index, one in self._open.items() if not one.over]
            if not unsure or time.monotonic() >= deadline:
                return len(unsure)
            time.sleep(SETTLE_PAUSE_SECONDS)
            self._open |= {index: one for index in unsure if (one := self._open_of(index))}

    def _open_of(self, index: int) -> _Open | None:
        """The open exit of the vCPU in a slot: over if its thread is elsewhere, or has been in the guest since."""
        vcpus, before = self._vcpus, self._open.get(index)
        seq, key = vcpus.get(index, "seq"), vcpus.get(index, "key")
        if before and (before.seq, before.key) == (seq, key) and before.over:
            return before
        if not key:
            return None
        vmm = vcpus.get(index, "vmm")
        over = self._sees_threads and is_at_rest(vcpus.get(index, "tid"))
        left = before.left if before and (before.seq, before.key) == (seq, key) else None
        if not over:
            now = run_program(self._functions["exits_of_vcpu"], index)
            over, left = left not in (None, now), now if left is None else left
        # What was read first still stands, or it was not of one moment.
        over = over and (seq, key) == (vcpus.get(index, "seq"), vcpus.get(index, "key"))
        return _Open(seq, key, vmm, left, over)

    def reset_unpaired(self) -> None:
        """Forget refused accesses whose exit was not seen."""
        self._counts.set(0, "unpaired_refusal", 0)

    def clear(self) -> None:
        """Make everything 0, while no program counts."""
        self._taken.forget()
        self._open, self._last = {}, {}
        for array in (self._exits, self._vcpus, self._counts):
            array.clear()

    def forget(self, vmms: set[int]) -> None:
        """The counts of processes that have ended become those of VMM 0, in the kernel, where none is lost.

        Those of a process with a vCPU that is still there stay, to be asked for again.
        """
        vcpus = self._taken.of(self._vcpus, *_VCPUS)
        ended = vmms - {self._vcpus.get(index, "vmm") for index in vcpus}
        for place in self._taken.of(self._exits, *_EXITS):
            if self._exits.get(place, "vmm") in ended:
                run_program(self._functions["exit_ended"], place)
        self._last = {kind: count for kind, count in self._last.items() if kind[1] not in ended}


#: Of struct kind: from which bit of the key on, and how many as a mask.
_FIELDS = ((0, 0xFFFFFFFF), (32, 0xFF), (40, 0xFF), (48, 0xFF), (56, 0x7F), (63, 1))
