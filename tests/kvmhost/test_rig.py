# SPDX-License-Identifier: GPL-2.0-or-later
"""The emulated host itself: exit statuses, what goes in and out, trouble in the guest, the cache of built things."""

from __future__ import annotations

import multiprocessing
import os
import pty
import re
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cache
import pytest
from conftest import PACKED, RUN, STATUS, Collected, rig
from dispositions import as_begun
from machine import TIMED_OUT, TROUBLE


def test_the_status_of_the_command_comes_through(collected: Collected) -> None:
    assert collected.status == STATUS, collected.log[-3000:]


def test_the_hosts_kernel_is_the_one_that_its_suite_ships(collected: Collected) -> None:
    """And `--in` and `--out` work: the answer came that way."""
    series = {"bookworm": "6.1.", "trixie": "6.12.", "filter-only": "5.10.", "backports": "6.17."}
    disk = collected.host.removesuffix("-amd")
    release = collected.scenario("host")["release"]
    assert release.startswith(series.get(disk, "")), release
    assert disk != "sid" or int(release.split(".")[0]) >= 7
    assert f"{collected.host}: Linux {release} up after " in collected.log


def test_a_kernel_runs_as_debian_packed_it(collected: Collected) -> None:
    """With KASLR where it was asked for; elsewhere where direct.py puts it."""
    kernel = collected.scenario("host")["kernel"]
    unmoved = {"virtual": 0xFFFFFFFF81000000, "physical": 0x1000000, "kaslr": False}
    if collected.host not in PACKED:
        assert kernel == unmoved
        return
    assert kernel["kaslr"]
    # Of the two addresses that KASLR chooses, one in some 500 is what it would be without.
    assert (kernel["virtual"], kernel["physical"]) != (unmoved["virtual"], unmoved["physical"])


@dataclass(frozen=True)
class TimedOut:
    """A run that was ended, and the directory in which it was."""

    run: subprocess.CompletedProcess[str]
    work: Path


def _timed_out(folder: Path, host: str) -> TimedOut:
    run = rig("--host", host, "--timeout", "3", "--keep-log", str(folder / "log"), "--", "sleep", "60")
    found = re.search(r"(/[^\s=]*/runs/[^/\s]+)/", (folder / "log/emulator.command").read_text())
    assert found
    return TimedOut(run, Path(found[1]))


def timeout_of_three_seconds(folder: Path) -> TimedOut:
    return _timed_out(folder, "bookworm")


def timeout_in_qemu(folder: Path) -> TimedOut:
    return _timed_out(folder, "bookworm-amd")


def _assert_nothing_left(ended: TimedOut) -> None:
    assert ended.run.returncode == TIMED_OUT, ended.run.stderr
    assert "timed out after 3 s" in ended.run.stderr
    assert not ended.work.exists()
    assert subprocess.run(["pgrep", "-f", str(ended.work)], capture_output=True, check=False).stdout == b""


@pytest.mark.beside(boot=timeout_of_three_seconds)
def test_a_timeout_is_124_and_leaves_nothing(beside: TimedOut) -> None:
    _assert_nothing_left(beside)


@pytest.mark.beside(boot=timeout_in_qemu)
def test_a_timeout_in_qemu_is_124_and_leaves_nothing(beside: TimedOut) -> None:
    _assert_nothing_left(beside)


@dataclass(frozen=True)
class Seen:
    """What a command printed in a guest, and this machine's clock when it was over."""

    run: subprocess.CompletedProcess[str]
    clock: float

    @property
    def words(self) -> list[str]:
        assert self.run.returncode == 0, self.run.stderr
        return self.run.stdout.split()


def two_cpus_of_amd(folder: Path) -> Seen:
    inside = (
        "nproc; for variant in nobtf unpatched; do kvm-module $variant; ls /sys/module | grep kvm_; done; date +%s.%N"
    )
    run = rig("--host", "trixie-amd", "--cpus", "2", "--", "sh", "-e", "-c", inside)
    return Seen(run, time.time())


@pytest.mark.beside(boot=two_cpus_of_amd)
def test_an_amd_host_has_the_cpus_asked_for_and_loads_every_variant(beside: Seen) -> None:
    assert beside.words[:-1] == ["2", "kvm_amd", "kvm_amd"]


@pytest.mark.beside(boot=two_cpus_of_amd)
def test_time_passes_on_an_amd_host_as_it_does_here(beside: Seen) -> None:
    """Its kernel measured the TSC well: it started with this clock, as whole seconds, and ran for some."""
    assert float(beside.words[-1]) == pytest.approx(beside.clock, abs=3)


def counted_instructions(folder: Path) -> Seen:
    measure = "workload --updates 11 --initial-run --ticks | sed -n 's/^ticks: n=11 min=//p'"
    run = rig("--host", "trixie-amd", "--count-instructions", "--", "sh", "-c", f"{measure}; {measure}")
    return Seen(run, time.time())


@pytest.mark.beside(boot=counted_instructions)
def test_costs_on_an_amd_host_repeat_to_the_tick_when_instructions_are_counted(beside: Seen) -> None:
    """But for the most, where the host's timer may have come in between."""
    least, *percentiles, most = beside.words[:4]
    assert beside.words[4:7] == [least, *percentiles]
    # The first update of a run finds caches of KVM's empty, no more.
    assert all(int(one.partition("=")[2]) < int(least) * 1.01 for one in percentiles)
    assert int(most.removeprefix("max=")) >= int(least)


def panic(folder: Path) -> subprocess.CompletedProcess[str]:
    return rig("--", "sh", "-c", "echo c >/proc/sysrq-trigger")


@pytest.mark.beside(boot=panic)
def test_a_guest_that_panics_is_125_and_the_log_says_why(beside: subprocess.CompletedProcess[str]) -> None:
    assert beside.returncode == 125, beside.stderr
    assert "the guest's kernel died" in beside.stderr
    assert "Kernel panic - not syncing: sysrq triggered crash" in beside.stderr
    assert "Call Trace:" in beside.stderr
    assert beside.stdout == ""


@dataclass(frozen=True)
class Typed:
    """What a shell showed before and after something was typed, and its status."""

    prompt: str
    answer: str
    status: int


def typed_into_a_shell(folder: Path) -> Typed:
    terminal, side = pty.openpty()
    with (folder / "log").open("w") as log:
        run = subprocess.Popen(as_begun([sys.executable, RUN, "--shell"]), stdin=side, stdout=side, stderr=log)
    os.close(side)
    try:
        prompt = _shown(terminal, until="# ")
        os.write(terminal, b'echo "it is $((6*7))"; exit 5\r')
        answer = _shown(terminal)
        return Typed(prompt, answer, run.wait(60))
    finally:
        run.terminate()
        run.wait()
        os.close(terminal)


def _shown(terminal: int, until: str | None = None) -> str:
    """What TERMINAL shows, until the text UNTIL or its end. The test fails after ten minutes."""
    seen, deadline = "", time.monotonic() + 600
    while until is None or until not in seen:
        if not select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0]:
            pytest.fail(f"a shell showed no more than {seen!r}", pytrace=False)
        try:
            seen += os.read(terminal, 4096).decode(errors="replace")
        except OSError:  # EIO: nobody has the other side any more
            assert until is None, seen
            break
    return seen


@pytest.mark.beside(boot=typed_into_a_shell)
def test_a_shell_answers_and_its_status_comes_through(beside: Typed) -> None:
    assert "root@bookworm" in beside.prompt
    assert "it is 42\r\n" in beside.answer
    assert beside.status == 5


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "a COMMAND (after --), --shell or --build is needed"),
        (["--shell"], "--shell needs a terminal"),
        (["--cpus", "0", "--", "true"], "--cpus: expected a number above 0"),
        (["--in", "/nonexistent", "--", "true"], "--in /nonexistent: no such directory"),
        (["--stock", "--module", "unpatched", "--", "true"], "--stock leaves out the unpatched module"),
        (["--host", "sid", "--module", "unpatched", "--", "true"], "--module unpatched: sid has patched, nobtf"),
        (["--host", "sid-amd", "--module", "patched", "--", "true"], "--module patched: sid-amd has unpatched, nobtf"),
        (["--host", "sid-amd", "--count-instructions", "--cpus", "2", "--", "true"], "needs --cpus 1 in QEMU"),
        (["--fresh", "--", "true"], "--fresh needs --init systemd"),
    ],
)
def test_wrong_use_of_the_rig_is_said(words: list[str], said: str) -> None:
    done = rig(*words)
    assert done.returncode == 2
    assert said in done.stderr
