"""Tracing that goes on: attaches when kvm_intel comes, again when it comes back, and never counts backwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from tracer.errors import MsrtraceError
from tracer.layout import LAYOUTS, Layout, Symbols, choose
from tracer.snapshot import Probe, Snapshot
from tracer.vms import VmNames

MODULE = Path("/sys/module/kvm_intel")


class Attachment(Protocol):
    """What `Engine` is to this module, and a stand-in for it in tests."""

    probes: list[Probe]

    @property
    def warnings(self) -> list[str]:
        """What keeps the numbers from being complete."""

    def snapshot(self) -> Snapshot:
        """The counts of now."""

    def forget(self, pids: set[int]) -> None:
        """Drop the counts of ended processes from the maps."""

    def close(self) -> None:
        """Detach."""


def loaded_module(module: Path = MODULE) -> tuple[int, int] | None:
    """What identifies this loading of kvm_intel, another one after a reload; None while it is not loaded."""
    try:
        if (module / "initstate").exists() and (module / "initstate").read_text().strip() != "live":
            return None
        status = module.stat()
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns


def layout_of(symbols: Symbols) -> Layout:
    """The layout of the running kernel. Raises MsrtraceError, naming what was looked for, if there is none."""
    layout = choose(symbols)
    if layout is None:
        names = sorted({name for known in LAYOUTS for name in (*known.calls, known.update)})
        raise MsrtraceError(
            f"this kernel's kvm_intel has none of the functions that msrtrace knows ({', '.join(names)}); "
            "run `msrtrace doctor` and report its output"
        )
    return layout


class Tracer:
    """The counts since its start, across reloads of kvm_intel. Safe to use from several threads."""

    def __init__(
        self,
        attach: Callable[[Layout, Symbols], Attachment],
        *,
        symbols: Callable[[], Symbols] = Symbols.read,
        module: Callable[[], object | None] = loaded_module,
        names: VmNames | None = None,
    ) -> None:
        """ATTACH makes an engine; SYMBOLS and MODULE say what the kernel is like, NAMES what a VM is called."""
        self._attach_engine, self._read_symbols, self._module = attach, symbols, module
        self._names = names or VmNames()
        self._lock = threading.RLock()
        self._engine: Attachment | None = None
        self._traced_module: object | None = None
        self._earlier: Snapshot | None = None  # the counts of earlier attachments and of VMs that are gone

    @property
    def attached(self) -> bool:
        """Whether probes are in place now."""
        return self._engine is not None

    @property
    def probes(self) -> list[Probe]:
        """The probes of the present attachment."""
        return self._engine.probes if self._engine else []

    @property
    def warnings(self) -> list[str]:
        """What keeps the numbers of the present attachment from being complete."""
        return self._engine.warnings if self._engine else []

    def attach(self) -> None:
        """Attach to the kvm_intel that is loaded. Raises MsrtraceError if that cannot be done."""
        with self._lock:
            module = self._module()
            symbols = self._read_symbols()
            self._engine = self._attach_engine(layout_of(symbols), symbols)
            self._traced_module = module

    def follow(self) -> bool:
        """Follow an unload or reload of kvm_intel; True if that changed what is attached.

        Probes of a module that was unloaded stay silent for good, so they are replaced. Raises MsrtraceError
        when the kvm_intel that came back cannot be traced.
        """
        with self._lock:
            module = self._module()
            if module == self._traced_module:
                return False
            self._detach()
            self._traced_module = None
            if module is not None:
                self.attach()
            return True

    def _detach(self) -> None:
        if self._engine:
            last = self._engine.snapshot()
            self._engine.close()
            self._engine = None
            if self._earlier:
                last = last.after(self._earlier)
            silent = tuple(replace(p, attached=False, detail="kvm_intel was unloaded") for p in last.probes)
            maps = tuple(replace(m, entries=0) for m in last.maps)
            self._earlier = replace(last, probes=silent, maps=maps, reattached=last.reattached + 1)

    def snapshot(self) -> Snapshot:
        """All counts since the start. VMs that are gone are in the totals, but no longer apart."""
        with self._lock:
            now = self._engine.snapshot() if self._engine else None
            if now and self._earlier:
                now = replace(now.after(self._earlier), reattached=self._earlier.reattached)
            result = now or self._earlier
            if result is None:
                raise MsrtraceError("nothing is attached")
            return self._with_vms(result) if result.by_vm else result

    def _with_vms(self, snapshot: Snapshot) -> Snapshot:
        pids = {pid for call in snapshot.calls if (pid := call.pid)}
        pids |= {pid for pid in (*snapshot.updates, *snapshot.recalcs) if pid}
        names = {pid: name for pid in pids if self._names.alive(pid) and (name := self._names.name(pid))}
        gone = pids - names.keys()
        if gone:
            self._forget(gone)
        return replace(snapshot.without_vms(gone), vms=names)

    def _forget(self, gone: set[int]) -> None:
        """Move the counts of ended processes out of the engine's maps, which have an end, into `_earlier`."""
        if not self._engine:
            return
        live = self._engine.snapshot()
        kept = {call: outcome for call, outcome in live.calls.items() if call.pid in gone}
        moved = Snapshot(
            layout=live.layout,
            calls=kept,
            updates={pid: value for pid, value in live.updates.items() if pid in gone},
            recalcs={pid: value for pid, value in live.recalcs.items() if pid in gone},
        ).without_vms(gone)
        self._engine.forget(gone)
        self._earlier = moved.after(self._earlier) if self._earlier else moved

    def close(self) -> None:
        """Detach. The counts stay readable."""
        with self._lock:
            self._detach()
