# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs that come and go while their host is traced."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_kernel import Kernel, counts, losses, names

from tracer.model.snapshot import VmInfo
from tracer.model.vmm_id import vmm_id


def test_vms_are_counted_separately(by_vm: Kernel) -> None:
    by_vm.call(100, 7)
    by_vm.call(200, 3)
    snapshot = by_vm.tracer.snapshot()
    assert (counts(snapshot), names(snapshot)) == ({100: 7, 200: 3}, {100: "web", 200: "db"})
    assert by_vm.engines[0].forgotten == []


def test_vms_are_looked_up_only_by_vm(kernel: Kernel) -> None:
    kernel.tracer.attach()
    kernel.call(100, 7)
    assert (counts(kernel.tracer.snapshot()), names(kernel.tracer.snapshot())) == ({0: 7}, {})


def test_the_counts_of_an_ended_vm_stay_in_the_totals(by_vm: Kernel) -> None:
    by_vm.call(100, 7)
    by_vm.call(200, 3)
    by_vm.tracer.snapshot()
    by_vm.end(100)
    for _ in range(3):
        snapshot = by_vm.tracer.snapshot()
        assert (counts(snapshot), names(snapshot)) == ({0: 7, 200: 3}, {200: "db"})
    assert by_vm.engines[0].forgotten == [{100}]  # once: its entries in the maps are free
    by_vm.call(200, 2)
    assert counts(by_vm.tracer.snapshot()) == {0: 7, 200: 5}


def test_a_vm_that_ended_before_any_snapshot_is_counted(by_vm: Kernel) -> None:
    by_vm.call(300, 5)
    snapshot = by_vm.tracer.snapshot()
    assert (counts(snapshot), names(snapshot)) == ({0: 5}, {})


@pytest.mark.parametrize("seen", [False, True])
def test_vms_whose_vmms_had_one_pid_are_counted_apart(by_vm: Kernel, seen: bool) -> None:
    """Whether a snapshot was taken while the first was there, or not."""
    first, second = vmm_id(100, 1000), vmm_id(100, 2000)
    by_vm.call(first, 7)
    if seen:
        snapshot = by_vm.tracer.snapshot()
        assert (counts(snapshot), names(snapshot)) == ({first: 7}, {first: "web"})
    by_vm.start(100, "mail", started=2000)
    by_vm.call(second, 3)
    snapshot = by_vm.tracer.snapshot()
    assert (counts(snapshot), names(snapshot)) == ({0: 7, second: 3}, {second: "mail"})
    assert by_vm.engines[0].forgotten == [{first}]


def test_vms_keep_their_counts_through_a_reload(by_vm: Kernel) -> None:
    by_vm.call(100, 7)
    by_vm.call(200, 3)
    by_vm.unload()
    by_vm.tracer.follow()
    assert counts(by_vm.tracer.snapshot()) == {100: 7, 200: 3}
    by_vm.load()
    by_vm.tracer.follow()
    by_vm.call(100, 2)
    assert counts(by_vm.tracer.snapshot()) == {100: 9, 200: 3}
    by_vm.end(100)
    for _ in range(3):
        assert counts(by_vm.tracer.snapshot()) == {0: 9, 200: 3}
    assert by_vm.engines[0].forgotten == [{100}]


def test_a_vm_may_end_while_nothing_is_attached(by_vm: Kernel) -> None:
    by_vm.call(100, 7)
    by_vm.unload()
    by_vm.tracer.follow()
    by_vm.end(100)
    snapshot = by_vm.tracer.snapshot()
    assert (counts(snapshot), names(snapshot)) == ({0: 7}, {})


def test_the_end_of_a_vm_loses_no_other_count(by_vm: Kernel) -> None:
    """Earlier losses and unloads stay the same."""
    by_vm.call(100, 7)
    by_vm.lose(3)
    by_vm.reload()
    by_vm.tracer.follow()
    by_vm.call(100, 1)
    before = by_vm.tracer.snapshot()
    assert (losses(before), before.module_unloads) == ((3,) * 5, 1)
    by_vm.end(100)
    by_vm.tracer.snapshot()
    after = by_vm.tracer.snapshot()
    assert (losses(after), after.module_unloads, counts(after)) == ((3,) * 5, 1, {0: 8})


def test_calls_of_a_vm_just_before_its_end_are_not_lost(by_vm: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the snapshot in which it was gone, and before its entries are freed."""
    by_vm.call(100, 7)
    by_vm.tracer.snapshot()
    by_vm.end(100)
    [engine] = by_vm.engines
    forget = engine.forget

    def late(pids: set[int]) -> None:
        by_vm.call(100, 5)
        forget(pids)
        by_vm.call(100, 3)

    monkeypatch.setattr(engine, "forget", late)
    assert sum(counts(by_vm.tracer.snapshot()).values()) == 15
    monkeypatch.undo()
    assert counts(by_vm.tracer.snapshot()) == {0: 15}


def test_a_reused_pid_has_the_new_name(by_vm: Kernel) -> None:
    by_vm.call(100, 7)
    by_vm.tracer.snapshot()
    by_vm.start(100, "new", started=2000)
    by_vm.tracer.snapshot()  # what it finds was counted before it could know of another VM
    by_vm.call(100, 3)
    snapshot = by_vm.tracer.snapshot()
    assert (counts(snapshot), names(snapshot)) == ({0: 7, 100: 3}, {100: "new"})


def test_a_reused_pid_does_not_inherit_counts(by_vm: Kernel) -> None:
    """Neither the counts of another VM before a reload, nor those before its end."""
    by_vm.call(100, 7)
    by_vm.reload()
    by_vm.tracer.follow()
    by_vm.tracer.snapshot()
    by_vm.end(100)
    by_vm.tracer.snapshot()
    by_vm.start(100, "new", started=2000)
    by_vm.call(100, 3)
    snapshot = by_vm.tracer.snapshot()
    assert (counts(snapshot), names(snapshot)) == ({0: 7, 100: 3}, {100: "new"})


@pytest.fixture
def kept(tmp_path: Path) -> Kernel:
    kernel = Kernel(tmp_path, by_vm=True, keep_gone=True)
    kernel.start(100, "web")
    kernel.start(200, "db")
    kernel.tracer.attach()
    return kernel


def test_ended_vms_keep_their_names_in_a_report(kept: Kernel) -> None:
    kept.call(100, 7)
    kept.call(200, 3)
    kept.tracer.snapshot()
    kept.end(100)
    for _ in range(2):
        snapshot = kept.tracer.snapshot()
        assert (counts(snapshot), names(snapshot)) == ({100: 7, 200: 3}, {100: "web", 200: "db"})
    assert kept.engines[0].forgotten == []


def test_a_vm_that_ended_unnamed_has_the_name_of_its_command(kept: Kernel) -> None:
    kept.call(100, 7)
    kept.call(300, 5)
    kept.end(100)
    kept.call(400, 1)
    kept.engines[0].commands = {100: "qemu", 300: "q\x1b[2Jemu"}
    snapshot = kept.tracer.snapshot()
    assert (counts(snapshot), names(snapshot)) == (
        {100: 7, 300: 5, 400: 1},
        {100: "qemu", 300: "q\N{REPLACEMENT CHARACTER}[2Jemu", 400: ""},
    )


def test_what_is_known_of_vms_is_in_the_snapshot(kept: Kernel) -> None:
    uuid = "6f1d7d5e-0c1b-4b6e-9a58-2d0a6f4f0001"
    (kept.proc / "100" / "cmdline").write_text(f"qemu\0-name\0web\0-uuid\0{uuid}\0")
    for pid in (100, 300):
        kept.call(pid)
    kept.engines[0].commands = {300: "firecracker"}
    found = {100: VmInfo("web", uuid, "qemu"), 300: VmInfo("firecracker", "", "firecracker")}
    assert kept.tracer.snapshot().vms == found
    kept.end(100)
    assert kept.tracer.snapshot().vms == found


def test_kept_names_survive_a_reload_and_closing(kept: Kernel) -> None:
    kept.call(100, 7)
    kept.tracer.snapshot()
    kept.end(100)
    kept.reload()
    kept.tracer.follow()
    kept.call(200, 3)
    kept.tracer.snapshot()
    kept.tracer.close()
    snapshot = kept.tracer.snapshot()
    assert (counts(snapshot), names(snapshot)) == ({100: 7, 200: 3}, {100: "web", 200: "db"})
    assert counts(snapshot.since(snapshot)) == {}


def test_no_names_are_kept_without_by_vm(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, keep_gone=True)
    kernel.tracer.attach()
    kernel.call(100, 7)
    assert (counts(kernel.tracer.snapshot()), names(kernel.tracer.snapshot())) == ({0: 7}, {})
