# SPDX-License-Identifier: GPL-2.0-or-later
"""The functions of the kernel that a loaded BPF program probes: attached, detached, and what they missed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tracer.kernel.symbols import Symbol, Symbols
from tracer.model.errors import MsrtraceError
from tracer.model.snapshot import Probe
from tracer.program import syscalls
from tracer.program.bcc_library import attach_tracing
from tracer.program.compiler import Built
from tracer.program.program import not_permitted, shortage
from tracer.trace.kprobe import attach_kprobe


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


def joined(probes: Iterable[Probe]) -> list[Probe]:
    """One probe for each function: attached if all those of its are, and with all that they missed."""
    found: dict[str, Probe] = {}
    for probe in probes:
        before = found.setdefault(probe.function, probe)
        if before is not probe:
            worse = probe if before.attached else before
            found[probe.function] = replace(worse, missed=before.missed + probe.missed)
    return list(found.values())


class Probes:
    """Those of one program. They hang on file descriptors, so the death of the process removes them, too."""

    def __init__(self, built: Built, explain: Callable[[], str]) -> None:
        """`explain` says in a line why the kernel probably did not permit a probe."""
        self._built, self._explain = built, explain
        self._functions = built.loaded.functions
        self._links: dict[str, list[int]] = {}
        self._missed_before: dict[str, int] = {}
        self._points: Sequence[Point] = ()
        self._probes: list[Probe] = []

    def attach(self, points: Sequence[Point], symbols: Symbols, places: Callable[[str], list[Symbol]]) -> list[Probe]:
        """Probe the functions of `points`, in this order; `places` gives the symbols of a function, the best first.

        Raises MsrtraceError where descriptors or memory do not suffice; then nothing is attached.
        """
        self._points = points
        try:
            self._probes = [self._attach(point, symbols, places(point.function)) for point in points]
        except MsrtraceError:
            self.remove()
            raise
        return self._probes

    def _attach(self, point: Point, symbols: Symbols, places: list[Symbol]) -> Probe:
        if not places:
            return Probe(point.function, None, False, "no such function in this kernel")
        symbol = places[0]
        where = symbol.place
        links: list[int] = []
        try:
            for program in reversed(point.programs):  # the return first: then nothing is seen half
                links.append(self._link(symbol, symbols, program, at_return=program == point.returned))
        except (OSError, KeyError) as error:
            for fd in links:
                os.close(fd)
            if too_little := shortage(error):
                raise MsrtraceError(f"{where} is not probed: {too_little}") from None
            reason = self._explain() if not_permitted(error) else str(error)
            return Probe(point.function, symbol.name, False, f"{where}: {reason}")
        self._links[point.function] = links
        others = f", not on its clones {', '.join(s.name for s in places[1:])}" if places[1:] else ""
        if copies := symbols.copies(point.function):
            others += f", not on {', '.join(s.place for s in copies)}"
        return Probe(point.function, symbol.name, True, where + others)

    def _link(self, symbol: Symbol, symbols: Symbols, program: str, *, at_return: bool) -> int:
        fd = self._functions[program]
        if self._built.backend == "fentry":
            return attach_tracing(fd)
        return attach_kprobe(symbol, symbols, fd, at_return=at_return)

    def remove(self) -> None:
        """Detach all. The programs stay loaded; what they missed until now is not counted again."""
        for fd in (fd for links in self._links.values() for fd in links):
            os.close(fd)
        self._links = {}
        self._missed_before = {name: self._misses(name) for name in self._functions}

    def counted(self, counts: Mapping[str, int]) -> tuple[Probe, ...]:
        """The probes, with the runs of their functions that were missed: `counts` has those of Point.unpaired."""
        return tuple(
            replace(probe, missed=sum(counts[count] for count in point.unpaired) + self._recursions(point))
            for point, probe in zip(self._points, self._probes, strict=True)
        )

    def _recursions(self, point: Point) -> int:
        """Runs of `point`'s programs that the kernel skipped because another BPF program ran on that CPU."""
        return sum(self._misses(name) - self._missed_before.get(name, 0) for name in point.programs)

    def _misses(self, program: str) -> int:
        fd = self._functions.get(program)
        return 0 if fd is None else syscalls.misses(fd)
