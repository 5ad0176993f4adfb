# SPDX-License-Identifier: GPL-2.0-or-later
"""What `msrtrace` alone says of a host."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import command
from machines import RELEASE, Host, status

from tracer.doctor.overview import overview
from tracer.kernel.machine import Machine

TRACING = ["top", "state", "report", "run"]


def commands(host: Host) -> list[str]:
    """The commands that it names, without what they do."""
    lines = overview(host.machine)
    assert all(line.startswith("  sudo msrtrace ") for line in lines[lines.index("") + 1 :])
    return [line.removeprefix("  sudo msrtrace ").split("  ")[0] for line in lines[lines.index("") + 1 :]]


def test_a_host_that_can_be_traced(host: Host) -> None:
    assert overview(host.machine)[:2] == [
        f"This host: Linux {RELEASE}, Intel VMX.",
        "kvm_intel is loaded: calls and filter updates can be counted (layout toggle).",
    ]
    assert commands(host) == TRACING


def test_a_host_with_an_amd_cpu(amd: Host) -> None:
    assert overview(amd.machine)[:2] == [
        f"This host: Linux {RELEASE}, AMD SVM.",
        "kvm_amd is loaded: calls and filter updates can be counted (layout pass).",
    ]


def test_who_is_not_root_is_told_what_root_could_do(host: Host) -> None:
    host.write("proc/self/status", status(0))
    host.be(euid=1000)
    assert commands(host) == TRACING


def test_rights_that_root_lacks_are_an_obstacle(host: Host) -> None:
    host.write("proc/self/status", status(0))
    assert overview(host.machine)[1].startswith("It cannot be traced now: ")
    assert commands(host) == ["doctor"]


def test_where_only_the_module_is_missing_it_can_be_waited_for(host: Host) -> None:
    host.unload()
    assert "modprobe kvm_intel" in overview(host.machine)[1]
    assert commands(host) == ["run --wait-module", "doctor"]


def test_a_cpu_without_virtualisation(host: Host) -> None:
    host.write("proc/cpuinfo", host.kind.cpuinfo.replace(" vmx", ""))
    host.unload()
    assert overview(host.machine)[1].startswith("It cannot be traced now: ")
    assert commands(host) == ["doctor"]


def test_nothing_is_raised_where_nothing_is_known(tmp_path: Path) -> None:
    assert len(overview(Machine(tmp_path))) > 2


@pytest.mark.parametrize("width", [60, 200])
def test_the_command_fits_the_terminal(width: int) -> None:
    done = command(COLUMNS=str(width))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line for line in lines if len(line) > width] == []
    assert lines[0].startswith("msrtrace: Trace what KVM does")
    assert lines[-1] == "msrtrace --help lists all commands."
    assert sum(line.startswith("This host: Linux ") for line in lines) == 1
