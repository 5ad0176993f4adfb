# SPDX-License-Identifier: GPL-2.0-or-later
"""How a kernel is traced: which of its functions are probed by what, and how the BPF program is configured for it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tracer.kernel.btf import Btf, BtfError
from tracer.kernel.layout import places
from tracer.kernel.symbols import Symbol, Symbols
from tracer.model.errors import MsrtraceError
from tracer.model.options import Options
from tracer.model.vendor import VCPU_CREATED, Layout
from tracer.program.program import Target, Variant
from tracer.trace.probes import Point
from tracer.trace.reader import WITHIN_FILTER_CHANGE, WITHIN_RECALC, is_in_init_time_namespace

#: How many places there are where processes are not told apart: bpf/counters.h and updates.h make no index beyond.
_OF_ONE = {"counters": 2048, "updates": 16}
_OF_ONE["taken"] = sum(_OF_ONE.values()) + 2 * 16384  # and the vCPUs'
_RDONLY_CAST = 0x7F000001  # the number by which bpf/context.h calls it
_CAST = ("bpf_rdonly_cast", "timespec64")

#: The BPF functions that run at Layout.writers.
_WRITERS = ("writer_entered", "other_writer_entered")
#: struct kvm_vcpu -> stat.exits
_EXITS = (("kvm_vcpu", "stat"), ("kvm_vcpu_stat", "exits"))
_PREEMPTION_MODEL = Path("/sys/kernel/debug/sched/preempt")


def points(layout: Layout, symbols: Symbols, exact: bool) -> list[Point]:
    """What `layout` asks to be probed, the update function first; `exact` if the outcomes of calls are seen."""
    vendor = symbols.vendor
    found = [Point(layout.update, "update_entered", "update_returned", ("unpaired_update",))]
    if layout.filter_set:
        found.append(Point(layout.filter_set, "filter_set_entered", "filter_set_returned"))
    found.append(Point(symbols.first_of(vendor.vcpu_create), "vcpu_created"))
    found.append(Point(VCPU_CREATED, "creation_ended"))
    found.append(Point(symbols.first_of(vendor.vcpu_free), "vcpu_freed"))
    if exact:
        inlined = any(map(symbols.find, layout.inlined_into)) and not symbols.find(layout.writers[0])
        writers = layout.inlined_into if inlined else layout.writers
        found += [Point(name, entry) for name, entry in zip(writers, _WRITERS, strict=False)]
    called = _by_name(layout)
    return found + [Point(function, f"{name}_entered") for name, function in called.items()]


def _by_name(layout: Layout) -> dict[str, str]:
    """The functions whose calls are counted, by the names that they have in the BPF program."""
    found = {"enable": layout.enable, "disable": layout.disable, "set": layout.set_, "pass": layout.pass_}
    return {name: function for name, function in found.items() if function}


def values(layout: Layout, btf: Btf | None, symbols: Symbols, options: Options) -> dict[str, int]:
    """What is put into the program of bpf/values.h.

    Without BTF of the vendor's module only a call can say where the bitmap is, or else outcomes stay unknown. Raises
    BtfError if the BTF does not say it, and calls do not.
    """
    found: dict[str, int] = {**symbols.trampolines, **symbols.vendor.geometry}
    if btf:
        try:
            found["bitmap_offset"] = btf.nested_offset(symbols.vendor.bitmap)
        except BtfError:
            if not layout.pass_:
                raise
        with suppress(BtfError):
            found["exits_offset"] = btf.nested_offset(_EXITS)
        found |= cast_type(btf)
    if layout.pass_ or "bitmap_offset" in found:
        found["exact"] = 1
    if layout.filter_set and symbols.find(layout.filter_set):
        # `kvm` is the first member of struct kvm_vcpu since 2.6; BTF confirms it where there is any.
        found["filter_offset"] = btf.offset("kvm_vcpu", "kvm") if btf else 0
    else:
        found["update_kind"] = WITHIN_RECALC if layout.filter_set else WITHIN_FILTER_CHANGE
    found |= process_values(options, btf)
    if options.by_vm:
        found |= _offsets_of_task(btf, command_offset="comm")
    return found


def process_values(options: Options, btf: Btf | None) -> dict[str, int]:
    """The values of a program that say whose counts are wanted, and whether and how processes are told apart."""
    found = {} if options.pid is None else {"wanted_pid": options.pid}
    if options.by_vm:
        found["by_pid"] = 1
        if is_in_init_time_namespace():  # else /proc has other times than the kernel
            found |= _offsets_of_task(btf, start_offset="start_boottime")
    return found


def preemptible(model: Path = _PREEMPTION_MODEL, version: str | None = None) -> bool:
    """Whether kernel code, and so a BPF program at fentry, may be preempted, as far as can be known: else yes.

    One that is keeps the same program from running for others on that CPU until it goes on, and their calls are missed
    (__bpf_prog_enter_recur(), kernel/bpf/trampoline.c). Kprobes run with preemption disabled.
    """
    version = version or os.uname().version
    if "PREEMPT" not in version:
        return False
    try:
        chosen = re.search(r"\((\w+)\)", model.read_text())
    except OSError:
        return True
    return not chosen or chosen[1] not in ("none", "voluntary")


def variants(
    layout: Layout, symbols: Symbols, given: Mapping[str, int], options: Options, btf: Btf | None = None
) -> list[Variant]:
    """How the program may be loaded, what is preferred first; `given`: its `values`.

    BTF gives the ids of functions. Raises MsrtraceError if the user's choice cannot be.
    """
    exact = "exact" in given
    # Without the function that sets a filter, nothing tells filter updates apart.
    wanted = [p for p in points(layout, symbols, exact) if p.function != layout.filter_set or "filter_offset" in given]
    read_by = (["settle_call"] if exact else []) + (["counter_ended", "update_ended"] if options.by_vm else [])
    reader = {name: Target("raw_tracepoint") for name in read_by}
    kprobe = {name: Target("kprobe") for point in wanted for name in point.programs}
    found = [Variant("kprobe", {}, kprobe | reader, given, capacities={} if options.by_vm else _OF_ONE, cmpxchg=exact)]
    if exact and layout.pass_:  # of the layouts whose outcomes are seen, the only one that kernels before 5.12 have
        found.append(replace(found[0], values={**given, "claims": 1}, cmpxchg=False))
    problem = ""
    if not (exact and "bitmap_offset" in given):
        problem = f"it needs the BTF of {symbols.vendor.module}, and a layout whose calls can be counted"
    if btf and not problem:
        try:
            tracing = fentry_targets(wanted, symbols, lambda function: places(layout, symbols, function), btf)
        except BtfError as error:
            problem = str(error)
        else:
            called = _by_name(layout).items()
            at = {f"{name}_at": symbols.find(f)[0].address for name, f in called if symbols.find(f)}
            functions, filled = tracing | reader, {**given, **at}
            fentry = replace(found[0], backend="fentry", definitions={"FENTRY": 1}, functions=functions, values=filled)
            found.insert(0, fentry)
    return chosen(found, options, problem, btf)


def chosen(found: Sequence[Variant], options: Options, no_fentry: str, btf: Btf | None) -> list[Variant]:
    """Those of the user's backend, with bpf_rdonly_cast() where the kernel has it, and then without.

    :param no_fentry: why none of them is for fentry, if so
    :raises MsrtraceError: if the user's choice cannot be
    """
    if no_fentry and options.backend == "fentry":
        raise MsrtraceError(f"the backend fentry cannot be used here: {no_fentry}; --backend kprobe can")
    if options.backend == "auto":
        found = [v for v in found if v.backend == "kprobe" or not preemptible()]
    else:
        found = [v for v in found if v.backend == options.backend]
    if not btf or not any("cast_type" in v.values for v in found):
        return list(found)
    kfuncs = {_RDONLY_CAST: btf.kernel_ids(*_CAST)[0]}
    return [
        either
        for variant in found
        for either in (replace(variant, kfuncs=kfuncs), replace(variant, values={**variant.values, "cast_type": 0}))
    ]


def cast_type(btf: Btf) -> dict[str, int]:
    """The value for bpf_rdonly_cast(), where the kernel has that."""
    with suppress(BtfError):
        return {"cast_type": btf.kernel_ids(*_CAST)[1]}
    return {}


def _offsets_of_task(btf: Btf | None, **members: str) -> dict[str, int]:
    """Where a task has its process and `members`, if BTF tells; without it the command is the thread's."""
    try:
        kernel = btf or Btf.of_kernel()
        found = {"leader_offset": kernel.offset("task_struct", "group_leader")}
        return found | {name: kernel.offset("task_struct", member) for name, member in members.items()}
    except BtfError:
        return {}


def fentry_targets(
    wanted: Sequence[Point], symbols: Symbols, places: Callable[[str], list[Symbol]], btf: Btf
) -> dict[str, Target]:
    """What fentry and fexit programs are loaded for, at the first of the `places` of each function.

    Raises BtfError with the reason why fentry cannot be used, as far as that can be known without trying.
    """
    probed = [symbol for point in wanted for symbol in places(point.function)[:1]]
    clones = [symbol.name for symbol in probed if symbol.name != symbol.function]
    if clones:
        raise BtfError(f"BTF does not describe {', '.join(clones)}")
    # Old kernels look their addresses up by the names alone (6.1: bpf_check_attach_target(), kernel/bpf/verifier.c), or
    # cannot have a trampoline and a livepatch on one function (before 6.0: kernel/trace/ftrace.c).
    copies = {symbol.place for point in wanted for symbol in symbols.copies(point.function)}
    patches = {patch.module for point in wanted for patch in symbols.replacing(point.function)}
    if copies or patches:
        raise BtfError(f"livepatches or others have functions that are probed: {', '.join(sorted(copies or patches))}")
    found = {}
    for point in wanted:
        for symbol in places(point.function)[:1]:
            if symbol.module == symbols.module:
                origin = btf
            else:  # kvm, which may be in the kernel image although kvm_intel is not
                origin = Btf.of_module(symbol.module, base=btf.base) if symbol.module else btf.base or btf
            function = origin.function_id(symbol.name)
            for kind, program in zip(("fentry", "fexit"), point.programs, strict=False):
                found[program] = Target(kind, function, symbol.module)
    return found
