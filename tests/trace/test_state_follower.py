# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading states across reloads of the module."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from made_vms import state, vm

from tracer.kernel.symbols import Symbols
from tracer.model.errors import MsrtraceError
from tracer.model.module_change import RETRY_SECONDS, ModuleChange
from tracer.model.state import State
from tracer.model.vmx import VMX
from tracer.trace.state_follower import StateFollower
from tracer.trace.vm_info import VmInfos


@dataclass
class Host:
    """A kernel whose module is replaced; each reader reads the VMs that there are if it is the newest."""

    module: str | None = "first"
    broken: bool = False
    now: float = 0.0
    made: list[Reader] = field(default_factory=list)

    def make(self, symbols: Symbols) -> Reader:
        if self.broken:
            raise MsrtraceError("no BTF")
        self.made.append(Reader(self, self.module))
        return self.made[-1]

    def follower(self, proc: Path = Path("/nonexistent")) -> StateFollower:
        return StateFollower(
            self.make,
            symbols=lambda: Symbols.of((), VMX.module, vendor=VMX),
            module=lambda: self.module,
            infos=VmInfos(proc),
            clock=lambda: self.now,
        )


@dataclass
class Reader:
    host: Host
    module: str | None
    closed: bool = False

    def read(self, *, steady: bool = False) -> State:
        assert steady
        assert not self.closed
        return state(vm("", 812)) if self.module == self.host.module else state()

    def close(self) -> None:
        self.closed = True


def test_states_have_the_names_and_uuids_of_vms(tmp_path: Path) -> None:
    uuid = "6f1d7d5e-0c1b-4b6e-9a58-2d0a6f4f0001"
    process = tmp_path / "812"
    process.mkdir()
    (process / "stat").write_text(f"812 (qemu) S {' '.join(map(str, range(30)))}")
    (process / "comm").write_text("qemu-system-x86\n")
    (process / "cmdline").write_bytes(f"qemu-system-x86_64\0-name\0web-01\0-uuid\0{uuid.upper()}\0".encode())
    follower = Host().follower(tmp_path)
    follower.start()
    assert [(vm.name, vm.uuid) for vm in follower.read().vms] == [("web-01", uuid)]


def test_a_module_that_is_loaded_again_has_a_reader_of_its_own() -> None:
    host = Host()
    follower = host.follower()
    follower.start()
    assert (follower.follow(), len(follower.read().vms)) == (None, 1)
    host.module = None
    assert follower.follow() == ModuleChange(VMX.module, traced=False)
    assert (follower.follow(), follower.read()) == (None, State(VMX)), "without a module there is no vCPU"
    host.module = "second"
    assert follower.follow() == ModuleChange(VMX.module, traced=True)
    assert len(follower.read().vms) == 1
    assert [reader.closed for reader in host.made] == [True, False]
    follower.close()
    assert host.made[1].closed


def test_a_reload_that_was_not_seen_is_followed_too() -> None:
    host = Host()
    follower = host.follower()
    follower.start()
    host.module = "second"
    assert follower.read().vms == (), "the first reader looks at the wrong addresses"
    assert follower.follow() == ModuleChange(VMX.module, traced=True)
    assert len(follower.read().vms) == 1


def test_what_cannot_be_read_is_tried_again() -> None:
    host = Host()
    follower = host.follower()
    follower.start()
    host.module, host.broken = "second", True
    assert follower.follow() == ModuleChange(VMX.module, traced=False, problem="no BTF")
    assert (follower.follow(), follower.read().vms) == (None, ())
    host.broken = False
    assert follower.follow() is None, "not before its time"
    host.now += RETRY_SECONDS
    assert follower.follow() == ModuleChange(VMX.module, traced=True)


def test_at_the_start_it_is_an_error() -> None:
    with pytest.raises(MsrtraceError, match="no BTF"):
        Host(broken=True).follower().start()
