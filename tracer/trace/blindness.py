# SPDX-License-Identifier: GPL-2.0-or-later
"""For how long the kernel ran no probes, because they had been switched off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tracer.model.module_change import ProbesSwitched
from tracer.program.canary import Canary, FtraceSwitch, remedy
from tracer.trace.capabilities import raised


class Sight(Protocol):
    """What knows whether probes run."""

    def clear(self) -> bool:
        """Whether they run now."""

    def close(self) -> None:
        """Release everything in the kernel."""


def sight_of(backend: str) -> Sight:
    """What knows whether probes of a backend run, for the thread that calls this. Raises OSError."""
    if backend == "fentry":
        return FtraceSwitch()
    with raised():
        return Canary()


class Blindness:
    """Looked for again and again while probes are attached. What is shorter than that interval may go unseen."""

    def __init__(self, sight: Callable[[str], Sight], clock: Callable[[], float]) -> None:
        """`sight` makes what knows about a backend; raises OSError. `clock` returns seconds."""
        self._make, self._clock = sight, clock
        self._sight: Sight | None = None
        self._backend = ""
        self._looked, self._before = 0.0, 0.0
        self._blind = False
        #: how long it was so at most, in seconds
        self.seconds = 0.0
        #: why that is not known, if so
        self.problem = ""

    def begin(self, backend: str) -> None:
        """Probes of this backend have just been attached."""
        if backend != self._backend:
            self.close()
            try:
                self._sight, self._backend, self.problem = self._make(backend), backend, ""
            except OSError as error:
                self.problem = f"whether the kernel's probes are switched off cannot be told: {error.strerror}"
        self._looked = self._clock()

    def look(self) -> ProbesSwitched | None:
        """Whether probes were switched off, or on again, since the last look; None if neither."""
        if self._sight is None:
            return None
        now, blind = self._clock(), not self._sight.clear()
        if blind or self._blind:
            self.seconds += now - self._looked
        self._looked = now
        if blind == self._blind:
            return None
        self._blind = blind
        if blind:
            return ProbesSwitched(problem=remedy())
        since, self._before = self._before, self.seconds
        return ProbesSwitched(seconds=self.seconds - since)

    def close(self) -> None:
        """Release everything in the kernel."""
        if self._sight:
            self._sight.close()
        self._sight, self._backend = None, ""
