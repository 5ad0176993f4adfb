# SPDX-License-Identifier: GPL-2.0-or-later
"""How a kernel is traced: which of its functions are probed by what, and how the BPF program is configured for it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tracer.kernel.btf import Btf, BtfError
from tracer.kernel.symbols import Symbols
from tracer.model.errors import MsrtraceError
from tracer.model.options import Options
from tracer.model.vendor import Layout
from tracer.program.program import Target, Variant
from tracer.trace.reader import WITHIN_FILTER_CHANGE, WITHIN_RECALC

#: enum value of bpf/msrtrace.c
VALUES = [
    "enable_at",
    "disable_at",
    "set_at",
    "kretprobe_trampoline",
    "fgraph_trampoline",
    "wanted_pid",
    "leader_offset",
    "command_offset",
]
_RDONLY_CAST = 0x7F000001  # the number by which the program calls it
_CAST = ("bpf_rdonly_cast", "timespec64")

#: struct kvm_vcpu -> stat.exits
_EXITS = (("kvm_vcpu", "stat"), ("kvm_vcpu_stat", "exits"))
_PREEMPTION_MODEL = Path("/sys/kernel/debug/sched/preempt")


@dataclass(frozen=True)
class Point:
    """A function to probe, and the BPF functions that run at its entry and at its return."""

    function: str
    entry: str
    returned: str | None = None
    #: of tracer.reader.COUNTS, those that say that a return was missed
    unpaired: tuple[str, ...] = ()

    @property
    def programs(self) -> tuple[str, ...]:
        """The BPF functions."""
        return (self.entry, self.returned) if self.returned else (self.entry,)


def points(layout: Layout, symbols: Symbols, exact: bool) -> list[Point]:
    """What LAYOUT asks to be probed, the update function first; EXACT if the outcomes of calls are seen."""

    def present(names: tuple[str, ...]) -> str:
        return next((name for name in names if symbols.find(name)), names[0])

    vendor = symbols.vendor
    found = [Point(layout.update, "update_entered", "update_returned", ("unpaired_update",))]
    if layout.filter_set:
        found.append(Point(layout.filter_set, "filter_set_entered", "filter_set_returned"))
    found.append(Point(present(vendor.vcpu_create), "vcpu_created"))
    found.append(Point(present(vendor.vcpu_free), "vcpu_freed"))
    if exact and layout.calls:
        whole = symbols.find(vendor.direct_write) or not any(map(symbols.find, vendor.direct_write_callers))
        places = (vendor.direct_write,) if whole else vendor.direct_write_callers
        found += [Point(name, "x2apic_entered") for name in places]
    called = {"enable_entered": layout.enable, "disable_entered": layout.disable, "set_entered": layout.set_}
    return found + [Point(function, entry) for entry, function in called.items() if function]


def definitions(layout: Layout, btf: Btf | None, symbols: Symbols, options: Options) -> dict[str, int]:
    """The -D by which bpf/msrtrace.c is configured; without BTF the outcome of calls stays unknown."""
    result = {}
    if btf:
        result["BITMAP_OFFSET"] = btf.nested_offset(symbols.vendor.bitmap)
        with suppress(BtfError):
            result["EXITS_OFFSET"] = btf.nested_offset(_EXITS)
        with suppress(BtfError):
            result["CAST_TYPE"] = btf.kernel_ids(*_CAST)[1]
    if layout.filter_set and symbols.find(layout.filter_set):
        # `kvm` is the first member of struct kvm_vcpu since 2.6; BTF confirms it where there is any.
        result["FILTER_OFFSET"] = btf.offset("kvm_vcpu", "kvm") if btf else 0
    else:
        result["UPDATE_KIND"] = WITHIN_RECALC if layout.filter_set else WITHIN_FILTER_CHANGE
    if layout.set_:
        result["SETS"] = 1
    if options.pid is not None:
        result["ONE_PID"] = 1
    if options.by_vm:
        result["BY_PID"] = 1
    return result


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
    layout: Layout, symbols: Symbols, defined: Mapping[str, int], options: Options, btf: Btf | None = None
) -> list[Variant]:
    """How the program may be built, what is preferred first.

    BTF gives the ids of functions; it must be there if outcomes are seen. Raises MsrtraceError if the user's choice
    cannot be.
    """
    exact = "BITMAP_OFFSET" in defined
    # What tells filter updates apart is compiled only where its offset is defined.
    wanted = [
        p for p in points(layout, symbols, exact) if p.function != layout.filter_set or "FILTER_OFFSET" in defined
    ]
    read_by = (["settle_call"] if exact else []) + (["counter_ended", "update_ended"] if options.by_vm else [])
    reader = {name: Target("raw_tracepoint") for name in read_by}
    named = {**symbols.trampolines, "wanted_pid": options.pid or 0, **(_command_offsets(btf) if options.by_vm else {})}
    values = {VALUES.index(name): value for name, value in named.items()}
    kprobe = {name: Target("kprobe") for point in wanted for name in point.programs}
    found = [Variant("kprobe", defined, kprobe | reader, values)]
    problem = _no_fentry(layout, symbols, wanted, exact)
    if btf and not problem:
        try:
            tracing = _tracing(symbols, wanted, btf)
        except BtfError as error:
            problem = str(error)
        else:
            called = (("enable_at", layout.enable), ("disable_at", layout.disable), ("set_at", layout.set_))
            values |= {
                VALUES.index(name): symbols.find(function)[0].address
                for name, function in called
                if function and symbols.find(function)
            }
            found.insert(0, Variant("fentry", {**defined, "FENTRY": 1}, tracing | reader, values))
    if problem and options.backend == "fentry":
        raise MsrtraceError(f"the backend fentry cannot be used here: {problem}; --backend kprobe can")
    if options.backend == "auto":
        found = [v for v in found if v.backend == "kprobe" or not preemptible()]
    else:
        found = [v for v in found if v.backend == options.backend]
    if not btf or "CAST_TYPE" not in defined:
        return found
    kfuncs = {_RDONLY_CAST: btf.kernel_ids(*_CAST)[0]}
    return [faster for variant in found for faster in (replace(variant, kfuncs=kfuncs), _without_cast(variant))]


def _command_offsets(btf: Btf | None) -> dict[str, int]:
    """Where the command of a process is, if BTF tells; without it the thread's is taken."""
    try:
        kernel = btf or Btf.of_kernel()
        return {
            "leader_offset": kernel.offset("task_struct", "group_leader"),
            "command_offset": kernel.offset("task_struct", "comm"),
        }
    except BtfError:
        return {}


def _tracing(symbols: Symbols, wanted: list[Point], btf: Btf) -> dict[str, Target]:
    """What fentry and fexit programs are loaded for. Raises BtfError."""
    found = {}
    for point in wanted:
        for symbol in symbols.find(point.function)[:1]:
            if symbol.module == symbols.module:
                origin = btf
            else:  # kvm, which may be in the kernel image although kvm_intel is not
                origin = Btf.of_module(symbol.module, base=btf.base) if symbol.module else btf.base or btf
            function = origin.function_id(symbol.name)
            for kind, program in zip(("fentry", "fexit"), point.programs, strict=False):
                found[program] = Target(kind, function, symbol.module)
    return found


def _without_cast(variant: Variant) -> Variant:
    return replace(variant, definitions={k: v for k, v in variant.definitions.items() if k != "CAST_TYPE"})


def _no_fentry(layout: Layout, symbols: Symbols, wanted: list[Point], exact: bool) -> str:
    """Why fentry cannot be used, as far as can be known without trying."""
    if not exact:
        return f"it needs the BTF of {symbols.vendor.module}, and a layout whose calls can be counted"
    places = [symbol for point in wanted for symbol in symbols.find(point.function)[:1]]
    clones = [symbol.name for symbol in places if symbol.name != symbol.function]
    if clones:
        return f"BTF does not describe {', '.join(clones)}"
    # Old kernels look their addresses up by the names alone (6.1: bpf_check_attach_target(), kernel/bpf/verifier.c), or
    # cannot have a trampoline and a livepatch on one function (before 6.0: kernel/trace/ftrace.c).
    copies = {symbol.place for point in wanted for symbol in symbols.copies(point.function)}
    patches = {patch.module for point in wanted for patch in symbols.replacing(point.function)}
    if copies or patches:
        return f"livepatches or others have functions that are probed: {', '.join(sorted(copies or patches))}"
    if len({point.entry for point in wanted}) < len(wanted):
        return f"there is no {symbols.vendor.direct_write} to probe"
    return ""
