# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine: BPF programs on the kernel's functions, and what they counted as a Snapshot. Needs BCC and rights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from tracer.kernel.btf import Btf, BtfError
from tracer.kernel.copies import holders
from tracer.kernel.headers import header_settings
from tracer.kernel.layout import layout_of, places
from tracer.kernel.symbols import Symbols
from tracer.model.errors import MsrtraceError
from tracer.model.options import Options
from tracer.model.snapshot import Probe, Snapshot
from tracer.model.vendor import VCPU_CREATED, Layout
from tracer.program.compiler import PROGRAMS, Built, build, is_compiled
from tracer.program.program import NotPermitted
from tracer.program.resources import resource
from tracer.trace.capabilities import raised
from tracer.trace.exits import ExitCounter
from tracer.trace.plan import points, preemptible, values, variants
from tracer.trace.probes import Probes, joined
from tracer.trace.reader import Reader

SOURCE = "bpf/msrtrace.c"


def compiled_backends() -> frozenset[str]:
    """The backends whose BPF program is already compiled, for this msrtrace on this machine."""
    source = resource(SOURCE)
    ours = (definitions for name, definitions in PROGRAMS if name == source.name)
    return frozenset("fentry" if "FENTRY" in one else "kprobe" for one in ours if is_compiled(source, one))


def expected_backends(symbols: Symbols, options: Options) -> tuple[str, ...]:
    """The backends that a trace with these options would try, in this order. Raises MsrtraceError if it would."""
    layout = layout_of(symbols)
    given, _, btf = _planned(layout, symbols, options)
    return tuple(dict.fromkeys(variant.backend for variant in variants(layout, symbols, given, options, btf)))


class Engine:
    """Attached probes. Closing it, or the death of its process, removes them: they hang on file descriptors."""

    def __init__(
        self, layout: Layout, symbols: Symbols, options: Options, explain: Callable[[], str] = lambda: "not permitted"
    ) -> None:
        """Compile, load and attach. `explain` says in a line why the kernel probably did not permit it.

        Raises MsrtraceError when nothing can be counted.
        """
        self._layout, self._symbols, self._options, self._explain = layout, symbols, options, explain
        self._values, self._btf_problem, btf = _planned(layout, symbols, options)
        wanted = variants(layout, symbols, self._values, options, btf)
        try:
            self._built: Built = build(resource(SOURCE), wanted, header_settings)
        except NotPermitted:
            raise MsrtraceError(explain()) from None
        loaded = self._built.loaded
        self._reader = Reader(loaded.arrays, loaded.functions, exact=self.redundancy == "exact", by_vm=options.by_vm)
        self._probes = Probes(self._built, explain)
        self._exits: ExitCounter | None = None
        self.probes: list[Probe] = []
        try:
            if options.exits:
                self._exits = ExitCounter(symbols, options, explain)
            self._attach_all()
        except MsrtraceError:
            self.close()
            raise

    def reattach(self, layout: Layout, symbols: Symbols) -> bool:
        """Attach to a module that was loaded again; False if the program does not fit it.

        Raises MsrtraceError when nothing can be counted. `detach` went before, so counts start from 0.
        """
        given, problem, _ = _planned(layout, symbols, self._options)
        if self._built.backend != "kprobe" or (layout, given) != (self._layout, self._values):
            return False
        if self._exits and not self._exits.fits(symbols):
            return False
        self._symbols, self._btf_problem = symbols, problem
        self._attach_all()
        return True

    def _attach_all(self) -> None:
        layout, symbols = self._layout, self._symbols
        with raised():
            # Calls come last: whatever settles them is there by then.
            wanted = points(layout, symbols, exact="exact" in self._values)
            self.probes = self._probes.attach(wanted, symbols, lambda function: places(layout, symbols, function))
            counted = (layout.update, *layout.calls)
            if not self._attached(*counted):
                reasons = "; ".join(f"{p.function}: {p.detail}" for p in self.probes if p.function in counted)
                self._probes.remove()
                raise MsrtraceError(f"no probe could be attached ({reasons})")
            if self._exits:
                try:
                    self.probes = joined(self.probes + self._exits.attach(symbols))
                except MsrtraceError:
                    self._probes.remove()
                    raise
        if self._creations_observable:
            self._reader.follow_creations()
        self._uncounted = tuple(holder.loss for holder in holders(self._symbols) if holder.loss)
        self._reader.reset("unpaired_return")  # functions that were being run while their probes were attached

    def detach(self) -> None:
        """Remove the probes and forget what they counted; the program stays loaded, for `reattach`."""
        self._probes.remove()
        self._reader.clear()
        self._built.loaded.free_places()
        if self._exits:
            self._exits.detach()

    @property
    def backend(self) -> str:
        """By which of BACKENDS functions are probed."""
        return self._built.backend

    @property
    def redundancy(self) -> str:
        """Whether outcomes are seen: `exact`, or `unknown` where calls are counted without them."""
        return "exact" if "exact" in self._values or not self._layout.calls else "unknown"

    @property
    def _filter_known(self) -> bool:
        return not self._layout.filter_set or "filter_offset" in self._values

    @property
    def warnings(self) -> list[str]:
        """What keeps the numbers from being complete, one line each."""
        lines = [f"{p.function} is not probed: {p.detail}" for p in self.probes if not p.attached]
        if not self._filter_known:
            lines.append("filter updates cannot be told from other recalculations, so they are not counted")
        if self._btf_problem:
            lines.append(f"which calls are redundant is unknown: {self._btf_problem}")
        if self.backend == "fentry" and preemptible():
            lines.append(
                "this kernel may preempt what runs at fentry; what is missed by that is counted as missed "
                "(--backend kprobe misses nothing)"
            )
        if not self._creations_observable:
            lines.append("creations of vCPUs cannot be followed, so they are not counted")
        lines += self._uncounted
        if not self._layout.calls:
            lines.append(
                f"this kernel (layout {self._layout.name}) has no function to count MSR-intercept calls at: "
                "only filter updates are counted"
            )
        return lines

    @property
    def _updates_observable(self) -> bool:
        needed = [f for f in (self._layout.update, self._layout.filter_set) if f]
        return self._filter_known and all(map(self._attached, needed))

    @property
    def _creations_observable(self) -> bool:
        begin_and_end = [
            p.attached for p in self.probes if p.function in (VCPU_CREATED, *self._symbols.vendor.vcpu_create)
        ]
        return self._updates_observable and all(begin_and_end)

    def _attached(self, *functions: str) -> bool:
        return any(p.attached for p in self.probes if p.function in functions)

    def snapshot(self, patience: float = 0) -> Snapshot:
        """The counts of now. `vms` is left empty: names are not the kernel's.

        A call is counted when its outcome is known; `patience`: how many seconds to wait for those that are open.
        """
        counted = self._reader.read(self._symbols, patience)
        taken = Snapshot(
            layout=self._layout.name,
            vendor=self._symbols.vendor.name,
            backend=self.backend,
            redundancy=self.redundancy,
            calls=counted.calls,
            updates=counted.updates,
            recalcs=counted.recalcs,
            probes=self._probes.counted(counted.counts),
            maps=counted.maps,
            unpaired_returns=counted.counts["unpaired_return"],
            read_failures=counted.counts["read_failed"],
            open_calls=counted.open_calls,
            uncounted=self._uncounted,
            vcpus_seen=counted.counts["vcpus_seen"],
            vmms_seen=counted.counts["vmms_seen"],
            vcpus_created=counted.counts["vcpus_created"],
            creation_recalcs=counted.creation_recalcs,
            commands=counted.commands,
            calls_observable=self._attached(*self._layout.calls),
            updates_observable=self._updates_observable,
            creations_observable=self._creations_observable,
            by_vm=self._options.by_vm,
        )
        return self._exits.added_to(taken, patience) if self._exits else taken

    def wishes_seen(self) -> frozenset[int]:
        """The vCPUs of which all calls of an update were seen, where calls say what KVM wants and not the filter."""
        if not self._layout.set_ or not self._attached(self._layout.set_):
            return frozenset()
        return self._reader.updated_vcpus()

    def forget(self, vmms: set[int]) -> None:
        """Make room: the counts of `vmms`, processes that have ended, become those of VMM 0. None is lost."""
        if self._options.by_vm:
            self._reader.forget(vmms)
            if self._exits:
                self._exits.forget(vmms)

    def close(self) -> None:
        """Detach everything."""
        self._probes.remove()
        self._built.loaded.close()
        if self._exits:
            self._exits.close()


def _planned(layout: Layout, symbols: Symbols, options: Options) -> tuple[dict[str, int], str, Btf | None]:
    """What the program must be given for a kernel; why it cannot see outcomes there, if so; the BTF, if any."""
    if not layout.calls:
        return values(layout, None, symbols, options), "", None
    try:
        btf = Btf.of_module(symbols.module) if symbols.module else Btf.of_kernel()
        return values(layout, btf, symbols, options), "", btf
    except BtfError as error:
        problem, kernel = str(error), None
    if layout.pass_:  # whose calls say where the bitmap is
        problem = ""
        with suppress(BtfError):
            kernel = Btf.of_kernel()
    return values(layout, kernel, symbols, options), problem, kernel
