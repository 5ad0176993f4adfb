# SPDX-License-Identifier: GPL-2.0-or-later
"""Probes that are switched off while they are attached."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tracer.model.module_change import ProbesSwitched
from tracer.program import canary
from tracer.trace.blindness import Blindness


class Switch:
    """Probes that are on, until `on` is False."""

    def __init__(self) -> None:
        self.on, self.closed, self.now = True, False, 100.0

    def clear(self) -> bool:
        return self.on

    def close(self) -> None:
        self.closed = True


def blindness(switch: Switch) -> Blindness:
    return Blindness(lambda _: switch, lambda: switch.now)


@pytest.fixture
def ftrace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for /proc/sys/kernel/ftrace_enabled."""
    monkeypatch.setattr(canary, "_FTRACE", tmp_path / "ftrace")
    return tmp_path / "ftrace"


def test_all_the_time_in_which_probes_may_have_been_off_is_counted(ftrace: Path) -> None:
    """From the last look at which they ran to the first at which they do again: a lower bound of counts is true."""
    switch = Switch()
    found = blindness(switch)
    found.begin("kprobe")
    switch.now += 0.25
    assert (found.look(), found.seconds) == (None, 0)
    switch.on = False
    switch.now += 0.25
    off = found.look()
    assert off
    assert "echo 1 | sudo tee /sys/kernel/debug/kprobes/enabled" in str(off)
    switch.now += 2
    assert (found.look(), found.seconds) == (None, 2.25)
    switch.on = True
    switch.now += 0.25
    assert found.look() == ProbesSwitched(seconds=2.5)
    switch.now += 9
    assert (found.look(), found.seconds) == (None, 2.5)
    switch.on = False
    switch.now += 1
    found.look()
    switch.on = True
    switch.now += 1
    assert (found.look(), found.seconds) == (ProbesSwitched(seconds=2), 4.5)


def test_without_a_module_nothing_is_missed() -> None:
    switch = Switch()
    found = blindness(switch)
    found.begin("kprobe")
    switch.now += 60  # unloaded
    found.begin("kprobe")
    switch.on = False
    switch.now += 0.5
    found.look()
    assert found.seconds == 0.5
    assert not switch.closed
    found.close()
    assert switch.closed


def refused(_: str) -> Switch:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_where_it_cannot_be_told_that_is_said() -> None:
    found = Blindness(refused, lambda: 0.0)
    found.begin("kprobe")
    assert found.problem == "whether the kernel's probes are switched off cannot be told: Too many open files"
    assert found.look() is None


@pytest.mark.parametrize(("text", "clear"), [("1\n", True), ("0\n", False), (None, True)])
def test_fentry_depends_on_ftrace_alone(ftrace: Path, text: str | None, clear: bool) -> None:
    if text:
        ftrace.write_text(text)
    assert canary.FtraceSwitch().clear() is clear


@pytest.mark.parametrize(
    ("text", "command"),
    [("0\n", "sudo sysctl -w kernel.ftrace_enabled=1"), ("1\n", "echo 1 | sudo tee /sys/kernel/debug/kprobes/enabled")],
)
def test_the_command_is_for_what_was_switched_off(ftrace: Path, text: str, command: str) -> None:
    ftrace.write_text(text)
    assert canary.remedy() == command


def test_a_filter_of_system_calls_is_no_sign_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is refused before it comes to the function with the probe."""
    bird = object.__new__(canary.Canary)
    bird._file = os.open("/dev/zero", os.O_RDONLY)  # a count that stays
    try:
        assert not bird.clear()

        def refuse(_: int) -> float:
            raise PermissionError

        monkeypatch.setattr(os, "sched_rr_get_interval", refuse)
        assert bird.clear()
    finally:
        bird.close()
