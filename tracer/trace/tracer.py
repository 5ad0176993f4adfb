# SPDX-License-Identifier: GPL-2.0-or-later
"""Continuous tracing: attaches again when the module is reloaded, and no count ever decreases."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from tracer.kernel.btf import kernel_btf_kept
from tracer.kernel.layout import layout_of
from tracer.kernel.symbols import Symbols
from tracer.model.errors import MsrtraceError
from tracer.model.module_change import Change
from tracer.model.snapshot import Probe, Snapshot, VmInfo
from tracer.model.state import State, seen_wishes
from tracer.model.vendor import Layout
from tracer.model.vendors import FIRST, VENDORS
from tracer.trace.blindness import Blindness, Sight
from tracer.trace.following import Following
from tracer.trace.state_reader import named
from tracer.trace.vm_info import VmInfos, info_of_command

_PATIENCE_SECONDS = 0.1  # for calls in progress when counts are read for the last time

MODULES = Path("/sys/module")
#: ENODEV: of a file in sysfs that is open while it goes (kernfs_get_active(), fs/kernfs/).
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENODEV)


class Attachment(Protocol):
    """The part of `Engine` that this module needs, so that tests can replace it."""

    probes: list[Probe]

    @property
    def backend(self) -> str:
        """The backend: how functions are probed."""

    @property
    def warnings(self) -> list[str]:
        """The reasons why counts are incomplete."""

    def snapshot(self, patience: float = 0) -> Snapshot:
        """The present counts, after waiting at most `patience` seconds for calls in progress."""

    def wishes_seen(self) -> frozenset[int]:
        """The vCPUs of which all calls of an update were seen that say what KVM wants."""

    def forget(self, vmms: set[int]) -> None:
        """Move the counts of ended processes to VMM 0, where that is possible; none is lost."""

    def detach(self) -> None:
        """Remove the probes and discard the counts."""

    def reattach(self, layout: Layout, symbols: Symbols) -> bool:
        """Attach again after `detach`; False if that needs a new attachment."""

    def close(self) -> None:
        """Release everything in the kernel."""


class StateSource(Protocol):
    """The part of `StateReader` that this module needs."""

    def read(self, *, steady: bool = False) -> State:
        """What every vCPU intercepts."""

    def close(self) -> None:
        """Release everything in the kernel."""


def loaded_module(modules: Path = MODULES) -> tuple[str, int, int] | None:
    """Identifies the loaded module of a vendor; differs after a reload. None if there is none.

    One that was loaded comes before those that are built in, which may be of another vendor than the CPU. Raises
    MsrtraceError if that cannot be told, such as for lack of descriptors.
    """
    found: list[tuple[bool, tuple[str, int, int]]] = []
    for module in (modules / vendor.module for vendor in VENDORS):
        try:
            built_in = not (module / "initstate").exists()
            if built_in or (module / "initstate").read_text().strip() == "live":
                status = module.stat()
                found.append((built_in, (module.name, status.st_ino, status.st_ctime_ns)))
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise MsrtraceError(f"whether {module.name} is loaded cannot be told: {error.strerror}") from None
    return min(found)[1] if found else None


class Tracer:
    """The counts since its start, across reloads of the module. Safe to use from several threads."""

    def __init__(
        self,
        attach: Callable[[Layout, Symbols], Attachment],
        *,
        symbols: Callable[[], Symbols] = Symbols.read,
        module: Callable[[], object | None] = loaded_module,
        vms: VmInfos | None = None,
        keep_gone: bool = False,
        states: Callable[[Symbols], StateSource] | None = None,
        sight: Callable[[str], Sight] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Does not attach yet.

        :param attach: makes an engine
        :param symbols: reads the symbols of the kernel
        :param module: identifies the loaded module, as `loaded_module`
        :param keep_gone: keep VMs that are gone separate, with their names: for a trace that ends
        :param states: makes what reads the states of vCPUs; without it there are none
        :param sight: makes what knows whether the probes of a backend run; without it they are taken to
        :param clock: returns seconds
        """
        self._blindness = Blindness(sight, clock) if sight else None
        self._attach_engine, self._read_symbols = attach, symbols
        self._following = Following(module, clock)
        self._vms = vms or VmInfos()
        self._kept: dict[int, VmInfo] | None = {} if keep_gone else None
        self._lock = threading.RLock()
        self._engine: Attachment | None = None
        self._idle: Attachment | None = None  # of a module that was unloaded; usually fits the next one
        self._vendor = FIRST
        self._make_states = states
        self._states: StateSource | None = None
        self.state_problem = ""  #: why the states of vCPUs cannot be read, if so
        self._earlier: Snapshot | None = None  # the counts of earlier attachments and of VMs that are gone

    @property
    def attached(self) -> bool:
        """Whether probes are attached."""
        return self._engine is not None

    @property
    def probes(self) -> list[Probe]:
        """The probes of the current attachment."""
        return self._engine.probes if self._engine else []

    @property
    def backend(self) -> str:
        """The backend of the current attachment, or ""."""
        return self._engine.backend if self._engine else ""

    @property
    def warnings(self) -> list[str]:
        """The reasons why the counts of the current attachment are incomplete."""
        if not self._engine:
            return []
        unknown = self._blindness.problem if self._blindness else ""
        return [*self._engine.warnings, *([unknown] if unknown else [])]

    def attach(self, symbols: Symbols | None = None) -> None:
        """Attach to the loaded module; `symbols` are the kernel's, if already read. Raises MsrtraceError."""
        with self._lock, kernel_btf_kept():
            module, found = self._following.read(lambda: symbols or self._read_symbols())
            layout = layout_of(found)
            self._vendor = found.vendor
            if self._idle and self._idle.reattach(layout, found):
                self._engine = self._idle  # without compiling again, during which nothing would be counted
            else:
                self._engine = self._attach_engine(layout, found)
                if self._idle:
                    self._idle.close()
            self._idle = None
            self._following.used = module
            if self._blindness:
                self._blindness.begin(self._engine.backend)
            self._read_states(found)

    def _read_states(self, symbols: Symbols) -> None:
        """Make ready to read the states of vCPUs. Calls are counted whether that can be done or not."""
        if self._make_states is None:
            return
        try:
            self._states, self.state_problem = self._make_states(symbols), ""
        except MsrtraceError as error:
            self.state_problem = str(error)

    def state(self, *, steady: bool = False) -> State | None:
        """What every vCPU intercepts now, with the names of VMs; None if that cannot be read. See StateReader.read.

        Where the kernel does not record what KVM wants, it is taken from the calls for vCPUs that were seen.
        """
        with self._lock:
            if self._states is None:
                return State(self._vendor) if self._make_states and not self._engine else None
            found = named(self._states.read(steady=steady), self._vms)
            if found.recorded or not self._engine or not (vcpus := self._engine.wishes_seen()):
                return found
            counted = self._total()
            of_all = seen_wishes(counted.calls)
            running = [call for call in counted.calls if self._vms.alive(call.pid)] if counted.by_vm else []
            vms = []
            for vm in found.vms:
                seen = seen_wishes(running, vm.pid) if counted.by_vm else of_all
                known = tuple(replace(one, seen=seen) if one.key in vcpus else one for one in vm.vcpus)
                vms.append(replace(vm, vcpus=known))
            known_of = sum(bool(one.seen) for vm in vms for one in vm.vcpus)
            note = "this kernel does not record what KVM itself wants: it is taken from the calls that were seen"
            notes = (f"{note} ({known_of} vCPU{'s' * (known_of != 1)})",) if known_of else ()
            return replace(found, vms=tuple(vms), notes=(*found.notes, *notes))

    def follow(self) -> Change | None:
        """Follow an unload or reload of the module, and look whether probes run; returns what changed, if anything.

        Probes never fire again after their module is unloaded, so they are replaced. A module that cannot be traced is
        retried after RETRY_SECONDS, or when another one is loaded. To be called in the thread that called `attach`.
        """
        with self._lock:
            change = self._following.follow(lambda: self._vendor.module, self._detach, self.attach)
            if change or not self._engine or not self._blindness:
                return change
            return self._blindness.look()

    def _detach(self) -> None:
        if self._states:
            self._states.close()
            self._states = None
        if self._engine:
            last = self._engine.snapshot(_PATIENCE_SECONDS)
            self._engine.detach()
            self._engine, self._idle = None, self._engine
            if self._earlier:
                last = last.after(self._earlier)
            lost = tuple(replace(p, attached=False, detail=f"{self._vendor.module} was unloaded") for p in last.probes)
            maps = tuple(replace(m, entries=0) for m in last.maps)
            self._earlier = replace(last, probes=lost, maps=maps, module_unloads=last.module_unloads + 1)

    def snapshot(self, patience: float = 0) -> Snapshot:
        """All counts since the start. VMs that are gone remain only in the totals, unless `keep_gone`.

        A VM that was gone before any snapshot has the name of the command that created its first vCPU, or "".

        :param patience: how many seconds to wait for calls in progress
        """
        with self._lock:
            total = self._total(patience)
            pids = total.pids - {0}
            # So is one whose pid another process has by now.
            vms = {pid: vm for pid in pids if self._vms.alive(pid) and (vm := self._vms.info(pid))}
            if self._kept is not None:
                self._kept |= vms
                return replace(
                    total,
                    vms={pid: self._kept.get(pid) or info_of_command(total.commands.get(pid, "")) for pid in pids},
                )
            gone = pids - vms.keys()
            if gone:
                self._forget(gone)
                total = self._total()
            return replace(total, vms=vms)

    def _total(self, patience: float = 0) -> Snapshot:
        result = now = self._engine.snapshot(patience) if self._engine else None
        if self._earlier:
            result = now.after(self._earlier) if now else self._earlier
        if result is None:
            raise MsrtraceError("nothing is attached")
        return replace(result, blind_seconds=self._blindness.seconds) if self._blindness else result

    def _forget(self, gone: set[int]) -> None:
        """Merge the counts of ended processes into the totals, and free their entries in the engine's maps."""
        if self._engine:
            self._engine.forget(gone)
        if self._earlier:
            self._earlier = self._earlier.without_vms(gone)
        for pid in gone:
            self._vms.info(pid)  # drops what is known of whoever had that pid

    def close(self) -> None:
        """Detach, whatever the state of the kernel. The counts stay available, if they could be read a last time."""
        with self._lock:
            with suppress(Exception):
                self._detach()
            for engine in (self._engine, self._idle):
                if engine:
                    engine.close()
            self._engine = self._idle = None
            if self._blindness:
                self._blindness.close()
