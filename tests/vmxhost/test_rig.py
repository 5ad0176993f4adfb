"""The emulated host itself: exit statuses, what goes in and out, trouble in the guest, the cache of built things."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import cache
import pytest
from conftest import RUN, STATUS, Collected
from machine import TIMED_OUT, TROUBLE


def test_the_status_of_the_command_comes_through(collected: Collected) -> None:
    assert collected.status == STATUS, collected.log[-3000:]


def test_the_hosts_kernel_is_the_one_that_its_suite_ships(collected: Collected) -> None:
    """And `--in` and `--out` work: the answer came that way."""
    series = {"bookworm": "6.1.", "trixie": "6.12.", "filter-only": "5.10."}
    release = collected.scenario("host")["release"]
    assert release.startswith(series.get(collected.host, "")), release
    assert collected.host != "sid" or int(release.split(".")[0]) >= 7
    assert f"{collected.host}: Linux {release} up after " in collected.log


def test_a_timeout_is_124_and_leaves_nothing(tmp_path: Path) -> None:
    runs = cache.BUILD / "runs"
    before = set(runs.iterdir()) if runs.is_dir() else set()
    done = subprocess.run(
        [sys.executable, RUN, "--timeout", "3", "--", "true"], capture_output=True, text=True, check=False
    )
    assert done.returncode == TIMED_OUT, done.stderr
    assert "timed out after 3 s" in done.stderr
    started = set(runs.iterdir()) - before
    mine = [run for run in started if run.name.startswith("bookworm-") and not _in_use(run)]
    assert not mine
    assert tmp_path.exists()


def _in_use(run: Path) -> bool:
    """Whether a Bochs of another run works there."""
    found = subprocess.run(["pgrep", "-f", str(run)], capture_output=True, check=False)
    return found.returncode == 0


@pytest.mark.parametrize(
    "line",
    [
        "[   12.3] Kernel panic - not syncing: sysrq triggered crash",
        "[   12.3] WARNING: CPU: 0 PID: 77 at arch/x86/kvm/vmx/vmx.c:1 vmx_vcpu_run+0x1/0x2 [kvm_intel]",
        "[   12.3] BUG: kernel NULL pointer dereference, address: 0000000000000008",
        "[   12.3] Oops: 0000 [#1] PREEMPT SMP NOPTI",
        "[   12.3] watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [python3:123]",
        "[   12.3] rcu: INFO: rcu_preempt self-detected stall on CPU",
        "[   12.3] general protection fault, probably for non-canonical address 0xdead000000000108",
        "[   12.3] WARNING: possible circular locking dependency detected",
    ],
)
def test_trouble_in_the_guests_kernel_is_found(line: str) -> None:
    assert TROUBLE.search(f"[    0.1] Linux version 6.1\n{line}\n[   13.0] more\n")


def test_a_healthy_kernel_log_is_no_trouble(collected: Collected) -> None:
    log = (collected.folder / "log/back/dmesg").read_text(errors="replace")
    assert "Linux version" in log
    assert not TROUBLE.search(log)


def _slow_build(root: str, log: str, name: str) -> None:
    cache.BUILD = Path(root)

    def make(work: Path) -> None:
        with Path(log).open("a") as file:
            file.write("built\n")
        time.sleep(0.5)
        (work / "file").write_text("whole")

    assert (cache.cached("thing", [name], make) / "file").read_text() == "whole"


def test_two_builds_at_once_are_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_slow_build, args=(str(tmp_path), str(log), "x")) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert log.read_text() == "built\n"


def test_an_interrupted_build_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "BUILD", tmp_path)
    pid = os.fork()
    if not pid:

        def killed(work: Path) -> None:
            (work / "file").write_text("ha")
            os.kill(os.getpid(), 9)

        cache.cached("thing", ["y"], killed)
    os.waitpid(pid, 0)
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".thing-")]

    def whole(work: Path) -> None:
        (work / "file").write_text("whole")

    made = cache.cached("thing", ["y"], whole)
    assert (made / "file").read_text() == "whole"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".thing-")]


def test_a_build_that_fails_leaves_nothing_to_be_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "BUILD", tmp_path)

    def fails(work: Path) -> None:
        (work / "file").write_text("ha")
        raise cache.RigError("no disk")

    with pytest.raises(cache.RigError, match="no disk"):
        cache.cached("thing", ["z"], fails)
    assert [p.suffix for p in tmp_path.iterdir()] == [".lock"]


def test_other_inputs_are_another_thing(tmp_path: Path) -> None:
    file = tmp_path / "recipe"
    file.write_text("a")
    one = cache.digest("x", [1, "2"], file)
    assert one == cache.digest("x", [1, "2"], file)
    assert one != cache.digest("x", [1, "3"], file)
    file.write_text("b")
    assert one != cache.digest("x", [1, "2"], file)


def test_a_download_is_retried_and_then_fails_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    failures = ["503", "reset"]

    def action() -> str:
        if failures:
            raise cache.RigError(failures.pop())
        return "here"

    assert cache.retried("it", action) == "here"

    def never() -> str:
        raise cache.RigError("404")

    with pytest.raises(cache.RigError, match="404"):
        cache.retried("it", never, attempts=3)


def test_wrong_use_of_the_rig_is_said() -> None:
    done = subprocess.run([sys.executable, RUN], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "a COMMAND (after --), --shell or --build is needed" in done.stderr
