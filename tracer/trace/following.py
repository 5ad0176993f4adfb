# SPDX-License-Identifier: GPL-2.0-or-later
"""Follows unloads and reloads of KVM's module, for whatever depends on the one that is loaded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from tracer.model.errors import MsrtraceError
from tracer.model.module_change import RETRY_SECONDS, ModuleChange

_T = TypeVar("_T")
_TRIES = 5  #: of reading what a module has while modules come and go


class Following:
    """Which module is in use, and which one could not be used and when to try it again."""

    def __init__(self, module: Callable[[], object | None], clock: Callable[[], float]) -> None:
        """`module` identifies the loaded module, as `loaded_module`; `clock` returns seconds."""
        self.module, self._clock = module, clock
        #: the module that is in use
        self.used: object | None = None
        self._refused: object | None = None  # is not tried again before:
        self._retry_at = 0.0

    def read(self, symbols: Callable[[], _T]) -> tuple[object | None, _T]:
        """The module that is loaded, and what `symbols` reads of it; as long as modules change meanwhile, once more."""
        module, found = self.module(), symbols()
        for _ in range(_TRIES):
            before, module = module, self.module()
            if module == before:
                break
            found = symbols()
        return module, found

    def follow(
        self, name: Callable[[], str], leave: Callable[[], None], use: Callable[[], None]
    ) -> ModuleChange | None:
        """What changed, if anything; a module that cannot be used is tried again after RETRY_SECONDS.

        Where it cannot be told which module is loaded, nothing has changed.

        :param name: of the module, once `use` has found it
        :param leave: let go of the module that was in use
        :param use: use the one that is loaded, and set `used`; raises MsrtraceError
        """
        try:
            module = self.module()
        except MsrtraceError:
            return None
        if module == self.used:
            return None
        if module is not None and module == self._refused and self._clock() < self._retry_at:
            return None
        leave()
        self.used = self._refused = None
        if module is None:
            return ModuleChange(name(), traced=False)
        try:
            use()
        except MsrtraceError as error:
            return ModuleChange(name(), traced=False, problem="" if self._gone(module) else str(error))
        return ModuleChange(name(), traced=True)

    def _gone(self, module: object) -> bool:
        """Whether a module that could not be used went meanwhile. Else it is refused, for a while."""
        with suppress(MsrtraceError):
            if self.module() != module:
                return True
        self._refused, self._retry_at = module, self._clock() + RETRY_SECONDS
        return False
