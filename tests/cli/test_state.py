# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace state` on the command line, of VMs that are made up."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from filters import denying
from made_states import USUAL
from vcpus import FS_BASE, rw, state, vcpu

from tracer.cli import state as state_command
from tracer.doctor import examination
from tracer.kernel.machine import Machine
from tracer.kernel.symbols import Symbols
from tracer.model.errors import MsrtraceError
from tracer.model.state import State, Vm
from tracer.model.vmx import VMX
from tracer.report import file as reportfile
from tracer.report.file import STATE, decode_as, read_as
from tracer.trace import state_follower, state_reader
from tracer.trace.state_follower import StateFollower

Main = Callable[..., tuple[int, str, str]]
PID, OTHER = os.getpid(), os.getppid()
UUID = "6f1d7d5e-0c1b-4b6e-9a58-2d0a6f4f0001"


class Reader:
    """In place of a StateReader."""

    def __init__(self, found: State | MsrtraceError) -> None:
        self.found, self.closed = found, False

    def read(self, *, steady: bool = False) -> State:
        """Whatever was given."""
        assert steady
        if isinstance(self.found, MsrtraceError):
            raise self.found
        return self.found

    def close(self) -> None:
        """Note it."""
        self.closed = True


def host() -> State:
    return state(
        Vm(PID, 1, (vcpu(USUAL),), name="web"),
        Vm(PID, 2, (vcpu(USUAL - rw(FS_BASE), denying(FS_BASE)),), name="web"),
        Vm(OTHER, 3, (vcpu(USUAL - rw(0x176)),), name="db", uuid=UUID),
    )


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    made = Reader(host())

    @contextmanager
    def opened(pid: int | None) -> Iterator[StateFollower]:
        follower = StateFollower(lambda _: made, module=lambda: "loaded")
        follower.start(Symbols.of([], VMX.module, vendor=VMX))
        yield follower

    monkeypatch.setattr(state_command, "following_states", opened)
    monkeypatch.setattr(state_follower, "named", lambda found, _: found)
    return made


def shown(main: Main, *arguments: str) -> str:
    status, out, err = main("state", *arguments)
    assert (status, err) == (0, "")
    return out


def test_all_vms_as_text(main: Main, reader: Reader) -> None:
    out = shown(main)
    assert out.startswith(f"{os.uname().nodename} (Linux {os.uname().release}, Intel VMX): 3 VMs, 3 vCPUs\n")
    assert f"\nweb (pid {PID}): vCPU 0\n" in out
    assert f"\ndb (pid {OTHER}): vCPU 0\n" in out
    assert max(map(len, out.splitlines())) <= 80


def test_vms_that_are_asked_for(main: Main, reader: Reader) -> None:
    for arguments, count in (
        (["--vm", "web"], 2),
        (["--vm", "db"], 1),
        (["--vm", UUID], 1),
        (["--vm", "web", "--vm", UUID.upper()], 3),
        (["--vm", "web", "--vm", "db"], 3),
        (["--pid", str(PID)], 2),
        (["--pid", str(OTHER), "--vm", "db"], 1),
    ):
        made = decode_as(STATE, shown(main, *arguments, "--format", "json").encode())
        assert len(made.vms) == count, arguments


@pytest.mark.parametrize("given", ["0x175", "373", "IA32_SYSENTER_ESP", "sysenter_esp", "MSR_IA32_SYSENTER_ESP"])
def test_an_msr_that_is_asked_for(main: Main, reader: Reader, given: str) -> None:
    rows = [line.split() for line in shown(main, "--msr", given).splitlines() if line.startswith("  0x175 ")]
    assert rows == [["0x175", "IA32_SYSENTER_ESP", "passed", "passed"]] * 3


def test_several_msrs(main: Main, reader: Reader) -> None:
    out = shown(main, "--msr", "0xce", "--msr", "TSC", "--vm", "db")
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  0x")] == ["0x10", "0xce"]


def test_all_msrs(main: Main, reader: Reader) -> None:
    assert "IA32_XFD" not in shown(main, "--vm", "db")
    assert "IA32_XFD" in shown(main, "--vm", "db", "--all")


def test_files(main: Main, reader: Reader, tmp_path: Path) -> None:
    """JSON has all MSRs, whatever is shown."""
    files = [tmp_path / name for name in ("state.json", "state.md", "state.txt")]
    assert shown(main, *(word for file in files for word in ("-o", str(file))), "--msr", "0x20") == ""
    made = read_as(STATE, files[0])
    assert {"0x20", "0x660"} <= {row.msrs for row in made.vms[0].vcpus[0].msrs}
    assert made.host.kernel == os.uname().release
    assert "| 0x20" in files[1].read_text()
    assert json.loads(files[0].read_text())["schema"] == "msrtrace-state/1"
    assert files[2].read_text().startswith(f"{os.uname().nodename} (")


def test_one_that_is_too_large_for_a_file_is_written_as_text(
    main: Main, reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reportfile, "SIZE_LIMIT", 1 << 10)
    json_file, text_file = tmp_path / "a.json", tmp_path / "a.txt"
    status, out, err = main("state", "-o", str(json_file), "-o", str(text_file))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert re.match(r"msrtrace: error: the state takes \d+ MB as JSON, and files of more than 0 MB cannot be read", err)
    assert text_file.read_text().count("vCPU 0") == 3
    assert not json_file.exists()


def test_no_vm(main: Main, reader: Reader) -> None:
    reader.found = state()
    assert shown(main).endswith(": no VM has a vCPU\n")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--vm", "none"], "no VM is called none; there are db, web"),
        (["--vm", "db", "--pid", str(PID)], "no VM is called db; there are web"),
        (["--vm", UUID[:8]], f"no VM is called {UUID[:8]}; there are db, web"),
        (["--pid", "1"], "process 1 has no vCPU"),
        (["--pid", "4194305"], "there is no process 4194305"),
        (["-o", "/nowhere/state.json"], "cannot write /nowhere/state.json: "),
    ],
)
def test_what_is_not_there_is_one_line(main: Main, reader: Reader, arguments: list[str], error: str) -> None:
    status, out, err = main("state", *arguments)
    assert (status, out) == (1, "")
    assert err.startswith(f"msrtrace: error: {error}")
    assert err.count("\n") == 1


def test_a_thread_is_no_process(main: Main, reader: Reader) -> None:
    ready, done = threading.Event(), threading.Event()
    threads: list[int] = []

    def wait() -> None:
        threads.append(threading.get_native_id())
        ready.set()
        done.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    ready.wait()
    try:
        status, _, err = main("state", "--pid", str(threads[0]))
    finally:
        done.set()
        thread.join()
    assert (status, err) == (1, f"msrtrace: error: {threads[0]} is a thread of process {PID}; give --pid {PID}\n")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--msr", "SPEC_CTRL_"], "SPEC_CTRL_ is neither the number nor the name of an MSR; did you mean "),
        (["--msr", "zzz"], "zzz is neither the number nor the name of an MSR, such as 0x48 or IA32_SPEC_CTRL"),
        (["--msr", "0x100000000"], "0x100000000 is neither the number nor the name of an MSR"),
        (["--pid", "0"], "0 is not in the range x>=1"),
        (["--format", "html"], "'html' is not one of 'text', 'markdown', 'json'"),
        (["-o", "state.pdf"], "no format has the suffix .pdf"),
        (["web"], "unexpected extra argument (web)"),
    ],
)
def test_wrong_usage(main: Main, reader: Reader, arguments: list[str], error: str) -> None:
    status, out, err = main("state", *arguments)
    assert (status, out) == (2, "")
    assert error in err.splitlines()[-1]


def test_what_prevents_it_is_one_line(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded."""
    asked: dict[str, object] = {}

    def obstacle(_: Machine, ignore: tuple[str, ...]) -> str:
        asked["ignore"] = ignore
        return "CAP_BPF is missing: run it as root"

    monkeypatch.setattr(examination, "obstacle", obstacle)
    assert main("state") == (1, "", "msrtrace: error: CAP_BPF is missing: run it as root\n")
    assert asked["ignore"] == ("symbols", "livepatch", "library", "perf-event-paranoid", "tracefs")


def test_a_reader_is_closed_whatever_happens(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Reader(MsrtraceError("what vCPUs intercept cannot be read: Argument list too long"))
    monkeypatch.setattr(examination, "obstacle", lambda *_, **__: None)
    monkeypatch.setattr(Machine, "symbols", Symbols.of([], VMX.module, vendor=VMX))
    monkeypatch.setattr(state_reader, "StateReader", lambda *_: made)
    assert main("state") == (1, "", f"msrtrace: error: {made.found}\n")
    assert made.closed


def test_names_of_hosts_and_vms_do_nothing_to_the_terminal(main: Main, reader: Reader) -> None:
    vm = host().vms[0]
    reader.found = state(replace(vm, name="\x1b]0;owned\x07\n# x"))
    out = shown(main)
    assert not {"\x1b", "\x07"} & {*out}
    status, _, err = main("state", "--vm", "other")
    assert (status, err.count("\n")) == (1, 1)
    assert "\x1b" not in err
