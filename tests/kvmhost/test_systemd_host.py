# SPDX-License-Identifier: GPL-2.0-or-later
"""An emulated host that boots systemd: what scenarios/systemd_host.py saw there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cache import sh
from conftest import HERE, rig
from hosts import HOSTS
from repository import repository

HOST = "trixie-amd"


@dataclass(frozen=True)
class Rebooted:
    """What a run left that rebooted its host: what each boot saw, the output, and the status."""

    boots: list[dict[str, Any]]
    run: subprocess.CompletedProcess[str]


def example_package(folder: Path) -> Path:
    """A package that needs one that no host has, which needs others."""
    tree = folder / "example"
    (tree / "DEBIAN").mkdir(parents=True)
    fields = {"Package": "kvmhost-example", "Version": "1", "Architecture": "all", "Depends": "jq"}
    fields |= {"Maintainer": "nobody <nobody@localhost>", "Description": "needs jq"}
    (tree / "DEBIAN/control").write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
    sh(["dpkg-deb", "--build", "--root-owner-group", tree, folder / "example.deb"])
    return folder / "example.deb"


def rebooted_host(folder: Path) -> Rebooted:
    sent = folder / "in"
    repository(HOSTS[HOST], [example_package(folder)], sent / "repository")
    shutil.copy(HERE / "scenarios/systemd_host.py", sent)
    options = [
        "--host",
        HOST,
        "--init",
        "systemd",
        "--fresh",
        "--in",
        str(sent),
        "--out",
        str(folder / "out"),
    ]
    run = rig(*options, "--timeout", "1200", "--", "python3", "/in/systemd_host.py")
    files = sorted((folder / "out").glob("systemd-*.json"))
    return Rebooted([json.loads(file.read_text()) for file in files], run)


on_a_rebooted_host = pytest.mark.beside(boot=rebooted_host, host=HOST)


@on_a_rebooted_host
def test_a_reboot_is_survived_and_the_command_is_run_again(beside: Rebooted) -> None:
    """The first time it may come to an end before it is stopped, and that is not the end of the run."""
    assert beside.run.returncode == 42, beside.run.stdout + beside.run.stderr
    assert beside.run.stdout in ("before the reboot\nboot 2 ends\n", "before the reboot\nboot 1 ends\nboot 2 ends\n")
    assert len(beside.boots) == 2
    assert [len(boot["health"]["boots"]) for boot in beside.boots] == [1, 2]  # the journal of the first is there


@on_a_rebooted_host
def test_a_host_with_systemd_is_in_order(beside: Rebooted) -> None:
    for boot in beside.boots:
        health = boot["health"]
        assert (health["state"], health["failed"]) == ("running", "")
        assert (health["init"], health["hostname"]) == ("systemd", HOST)
        assert re.fullmatch("[0-9a-f]{32}", health["machine-id"])
        assert "kvm_amd" in health["modules"]
        assert {"cpu", "memory", "pids"} <= set(health["controllers"])
    assert beside.boots[0]["modules"] == {"status": 0, "output": ""}


@on_a_rebooted_host
def test_sandboxes_of_services_hold(beside: Rebooted) -> None:
    found = beside.boots[0]["sandboxed"]
    said = {
        "files": "touch: cannot touch '/etc/x': Read-only file system",
        "calls": "date: cannot set date: Operation not permitted",
        "namespaces": "unshare: unshare failed: Operation not permitted",
        "processes": "ls: cannot access '/proc/1': No such file or directory",
        "addresses": "Connection timed out",
        "memory": "PermissionError",
    }
    for name, text in said.items():
        assert found[name]["status"] != 0, name
        assert text in found[name]["output"], name
    status = beside.boots[0]["user"]["output"]
    assert "CapEff:\t0000008000000000\n" in status
    assert "NoNewPrivs:\t1\n" in status
    assert int(re.findall(r"^Uid:\t(\d+)", status, re.MULTILINE)[0]) > 60000


@on_a_rebooted_host
def test_packages_are_whole_and_can_be_installed_without_a_network(beside: Rebooted) -> None:
    first = beside.boots[0]
    assert first["verified"] == {"status": 0, "output": ""}
    assert first["update"]["status"] == 0, first["update"]["output"]
    assert first["install"]["status"] == 0, first["install"]["output"]
    assert first["installed"] == {"status": 0, "output": "42\n"}
