# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads the states of vCPUs for a long time: across reloads of the module, as tracer.py counts."""

from __future__ import annotations

import time
from collections.abc import Callable

from tracer.kernel.symbols import Symbols
from tracer.model.module_change import ModuleChange
from tracer.model.state import State
from tracer.model.vendors import FIRST
from tracer.trace.following import Following
from tracer.trace.state_reader import named
from tracer.trace.tracer import StateSource, loaded_module
from tracer.trace.vm_info import VmInfos


class StateFollower:
    """States of vCPUs with the names of their VMs. Without a module there is no vCPU."""

    def __init__(
        self,
        make: Callable[[Symbols], StateSource],
        *,
        symbols: Callable[[], Symbols] = Symbols.read,
        module: Callable[[], object | None] = loaded_module,
        infos: VmInfos | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Reads nothing yet.

        :param make: makes a reader; its addresses are those of the modules that are loaded then
        :param symbols: reads the symbols of the kernel
        :param module: identifies the loaded module, as `loaded_module`
        :param clock: returns seconds
        """
        self._make, self._symbols = make, symbols
        self._following = Following(module, clock)
        self._infos = infos or VmInfos()
        self._vendor = FIRST
        self._reader: StateSource | None = None

    def start(self, symbols: Symbols | None = None) -> None:
        """Make the reader for the loaded module; `symbols` are the kernel's, if already read. Raises MsrtraceError."""
        module, found = self._following.read(lambda: symbols or self._symbols())
        self._vendor = found.vendor
        self._reader = self._make(found)
        self._following.used = module

    def follow(self) -> ModuleChange | None:
        """Follow an unload or reload of the module; what changed, if anything. What cannot be read is tried again."""
        return self._following.follow(lambda: self._vendor.module, self.close, self.start)

    def read(self) -> State:
        """What every vCPU intercepts now: none where there is no module, or it cannot be read. Raises MsrtraceError."""
        if self._reader is None:
            return State(self._vendor)
        return named(self._reader.read(steady=True), self._infos)

    def close(self) -> None:
        """Release everything in the kernel."""
        if self._reader:
            self._reader.close()
            self._reader = None
