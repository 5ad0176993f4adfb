# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace state --diff` on the command line: two VMs of a fake kernel, and two files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import on_standin
from made import patched
from made_vms import FS_BASE, denies, file, vcpu, vm
from standin import READ, VMS

from tracer.report.file import encode

UUID = "6f1d7d5e-0c1b-4b6e-9a58-2d0a6f4f0001"
VM_LINES = (
    f"web-01 812 2 0xc0000100\nweb-02@{UUID} 844 2\ntwin 1 1\ntwin 2 1 0x10\n"
    "same 3 1\nsame 4 1\npair 5 1\npair 5 1 0x10\n"
)
ANSWER = "web-01 exits on 2 accesses where web-02 does not (FS_BASE): the filter alone\n  denies 2\n"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files in the current directory, and what is none."""
    denied = vcpu(0, denies(FS_BASE))
    (tmp_path / "a.json").write_bytes(encode(file(vm("web", 1, denied), vm("db", 2, vcpu(0), uuid=UUID))))
    (tmp_path / "b.json").write_bytes(encode(file(vm("web", 7, vcpu(0)), vm("db", 8, denied, uuid=UUID))))
    (tmp_path / "damaged.json").write_text('{"schema": "msrtrace-state/1"}')
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "pair", [("web-01", "web-02"), ("812", "844"), ("web-01", "844"), ("812", "same"), ("812", UUID)]
)
def test_two_vms_by_name_uuid_or_pid(directory: Path, pair: tuple[str, str]) -> None:
    (directory / VMS).write_text(VM_LINES)
    done = on_standin(directory, "state", "--diff", *pair)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(ANSWER.replace("web-02", "same") if "same" in pair else ANSWER)
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_vms_that_are_alike_differ_in_nothing(directory: Path) -> None:
    (directory / VMS).write_text(VM_LINES)
    done = on_standin(directory, "state", "--diff", "web-02", "web-02")
    assert done.returncode == 0
    titles = "web-02 (pid 844)"
    assert done.stdout.startswith(f"the same accesses exit in {titles} and in {titles}")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "none",
            "none is neither a file nor the name, the UUID or the process of a VM; "
            "there are pair, same, twin, web-01, web-02",
        ),
        ("twin", "2 VMs are called twin, and differ: give one of the pids 1, 2"),
        ("5", "the 2 VMs of process 5 differ (msrtrace state --pid 5)"),
    ],
)
def test_a_vm_must_be_one(directory: Path, name: str, why: str) -> None:
    (directory / VMS).write_text(VM_LINES)
    done = on_standin(directory, "state", "--diff", "web-01", name)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"msrtrace: error: {why}\n")


@pytest.mark.usefixtures("files")
def test_two_files(directory: Path) -> None:
    done = on_standin(directory, "state", "--diff", "a.json", "b.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert " ".join(done.stdout.split()).startswith(
        "2 of 2 VMs that are in both differ: a.json exits on 2 accesses where b.json does not (FS_BASE): the filter "
        "alone denies 2; b.json exits on 2 accesses where a.json does not (FS_BASE): the filter alone denies 2"
    )
    assert not (directory / READ).exists(), "this host is not read"


@pytest.mark.usefixtures("files")
def test_some_vms_of_files(directory: Path) -> None:
    done = on_standin(directory, "state", "--diff", "a.json", "b.json", "--vm", "web", "--format", "json")
    made = json.loads(done.stdout)
    assert [found["a"]["name"] for found in made["vms"]] == ["web"]
    assert (made["a"]["vms"], made["b"]["vms"]) == (1, 1)
    by_uuid = on_standin(directory, "state", "--diff", "a.json", "b.json", "--vm", UUID, "--format", "json")
    assert [(found["a"]["name"], found["b"]["uuid"]) for found in json.loads(by_uuid.stdout)["vms"]] == [("db", UUID)]
    done = on_standin(directory, "state", "--diff", "a.json", "b.json", "--pid", "1")
    assert (done.returncode, done.stderr) == (1, "msrtrace: error: b.json has no VM of process 1\n")
    done = on_standin(directory, "state", "--diff", "a.json", "b.json", "--msr", "0x10")
    assert "for the same reasons" in done.stdout or "though their filters differ" in done.stdout


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing.json", "cannot read missing.json: No such file or directory"),
        ("./missing", "cannot read missing: No such file or directory"),
        ("damaged.json", "damaged.json is a damaged state: Object missing required field `vms`"),
        ("report.json", "report.json is not an msrtrace state but a report (msrtrace-report/1)"),
    ],
)
def test_a_file_must_be_a_state(directory: Path, name: str, why: str) -> None:
    Path("report.json").write_bytes(encode(patched()))
    done = on_standin(directory, "state", "--diff", "a.json", name)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"msrtrace: error: {why}\n")


@pytest.mark.usefixtures("files")
def test_the_result_may_go_to_a_file(directory: Path) -> None:
    assert (
        on_standin(directory, "state", "--diff", "a.json", "b.json", "-o", "diff.md", "-o", "diff.json").returncode == 0
    )
    assert Path("diff.md").read_text().startswith("**2 of 2 VMs that are in both differ")
    assert json.loads(Path("diff.json").read_text())["schema"] == "msrtrace-state-comparison/1"
