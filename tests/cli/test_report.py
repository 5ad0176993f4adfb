# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace report` on the command line, on a fake kernel."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from command import on_standin
from made_vms import state, vm
from standin import ATTACHED, CLOSED, COUNTED, MODULE, NESTED, READ, VENDOR, VMS

from tracer.cli import report as report_command
from tracer.model.snapshot import VmInfo
from tracer.model.state import State
from tracer.report.file import decode, read

ROOT = Path(__file__).parents[2]
VERDICT = "patch present: 101 filter updates disabled intercepts of MSRs that KVM passes"

ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"}


class Done(NamedTuple):
    """The result of a command, and the names of the files that the stand-in left."""

    returncode: int
    stdout: str
    stderr: str
    left: set[str]


def command(directory: str | Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "standin", str(directory), "report", *arguments]


def run(*arguments: str, given: str = "", **files: str) -> Done:
    """`msrtrace report` with arguments, on a kernel that is files (see standin.py)."""
    with tempfile.TemporaryDirectory() as directory:
        for name, content in {MODULE: "1", **files}.items():
            (Path(directory) / name).write_text(content)
        done = subprocess.run(
            command(directory, *arguments),
            env=ENVIRONMENT,
            input=given,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return Done(done.returncode, done.stdout, done.stderr, {file.name for file in Path(directory).iterdir()})


# --- report ---


def test_a_trace_of_a_duration() -> None:
    done = run("-d", "0.2")
    assert (done.returncode, done.stderr) == (0, "")
    assert CLOSED in done.left
    assert done.stdout.startswith(VERDICT)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\n13 calls per filter update, 11 of them redundant" in done.stdout


def test_the_json_of_a_trace() -> None:
    done = run("-d", "0.2", "--format", "json", "--label", "mine")
    made = decode(done.stdout.encode())
    assert (done.returncode, done.stderr) == (0, "")
    assert (made.label, made.command, made.exit_status, made.totals.filter_updates) == ("mine", None, None, 101)
    assert (made.host.name, made.host.kernel) == (os.uname().nodename, os.uname().release)
    assert made.duration_seconds >= 0.2


def test_a_trace_of_an_amd_host() -> None:
    done = run("-d", "0.2", **{VENDOR: "AMD"})
    assert (done.returncode, done.stderr) == (0, "")
    assert " ".join(done.stdout.split()).startswith(
        "patch not applicable: KVM never had this patch for AMD SVM; 10 filter updates made 470 calls, 47 each, of "
        "which 46 changed nothing "
    )
    made = decode(run("-d", "0.2", "--format", "json", **{VENDOR: "AMD"}).stdout.encode())
    assert (made.host.vendor, made.host.layout, made.totals.calls) == ("svm", "pass", 470 + 11)


def test_the_suffix_selects_the_format_unless_the_option_does(tmp_path: Path) -> None:
    starts = {
        "a.json": '{\n "schema": "msrtrace-report/1"',
        "b.JSON": '{\n "schema": "msrtrace-report/1"',
        "a.txt": "patch present: ",
        "a": "patch present: ",
        "a.md": "**patch present: ",
        "a.html": "<!doctype html>",
        "a.htm": "<!doctype html>",
    }
    outputs = [word for name in starts for word in ("-o", str(tmp_path / name))]
    done = run("-d", "0.01", *outputs)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for name, start in starts.items():
        assert (tmp_path / name).read_text().lower().startswith(start), name
    run("-d", "0.01", *outputs, "--format", "markdown")
    for name in starts:
        assert (tmp_path / name).read_text().startswith("**patch present: "), name


def test_an_unknown_suffix_is_wrong_usage(tmp_path: Path) -> None:
    done = run("-d", "99", "-o", str(tmp_path / "x.pdf"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "no format has the suffix .pdf (.txt, .md, .json, .html, .htm); set --format" in done.stderr
    assert ATTACHED not in done.left
    done = run("-d", "0.01", "-o", str(tmp_path / "x.pdf"), "--format", "text")
    assert (done.returncode, (tmp_path / "x.pdf").read_text()[:13]) == (0, "patch present")


def test_several_files_are_written(tmp_path: Path) -> None:
    done = run("-d", "0.01", "-o", str(tmp_path / "a.json"), "-o", "-", "-o", str(tmp_path / "a.md"))
    assert done.stdout.startswith(VERDICT)
    assert read(tmp_path / "a.json").totals.filter_updates == 101
    assert (tmp_path / "a.md").read_text().startswith("**patch present")


@pytest.mark.parametrize("status", [0, 7, 255])
def test_a_command_is_traced(status: int) -> None:
    """Its output is separate from the report, and msrtrace exits with its status."""
    done = run("--", "sh", "-c", f"cat; exit {status}", given="text\n")
    assert (done.returncode, done.stdout) == (status, "text\n")
    assert done.stderr.startswith(VERDICT)
    assert f"ran: sh -c 'cat; exit {status}'" in done.stderr
    assert ("which ended with status" in done.stderr) == bool(status)


def test_options_after_the_command_belong_to_it() -> None:
    done = run("-o", "-", "--label", "x", "echo", "-d", "1", "--label", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"-d 1 --label --help\n{VERDICT}")
    assert done.stderr == ""


def test_a_killed_command_is_reported(tmp_path: Path) -> None:
    done = run("-o", str(tmp_path / "a.json"), "sh", "-c", "kill -KILL $$")
    assert (done.returncode, done.stdout, done.stderr) == (137, "", "")
    assert read(tmp_path / "a.json").exit_status == 137


def test_a_missing_command_is_an_error() -> None:
    done = run("no-such-command")
    expected = "msrtrace: error: cannot run no-such-command: No such file or directory\n"
    assert (done.returncode, done.stdout, done.stderr) == (127, "", expected)
    assert ATTACHED not in done.left
    assert run("/").returncode == 126


def test_a_command_may_have_arguments_that_are_not_utf_8(tmp_path: Path) -> None:
    done = run("-o", str(tmp_path / "a.json"), os.fsdecode(b"true"), os.fsdecode(b"\xff\x1b[2J\n"))
    assert (done.returncode, done.stderr) == (0, "")
    assert read(tmp_path / "a.json").command == ["true", r"\udcff\x1b[2J\n"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_trace(number: signal.Signals, tmp_path: Path) -> None:
    counting = tmp_path / COUNTED
    (tmp_path / MODULE).write_text("1")
    with subprocess.Popen(
        command(tmp_path, "--format", "json"),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        end = time.monotonic() + 30
        while not counting.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, b"")
    assert decode(out).notes == []


def test_by_vm_has_a_row_for_each_vm() -> None:
    made = decode(run("-d", "0.5", "--by-vm", "--format", "json").stdout.encode())
    assert made.vms
    assert made.vms[0].name.startswith("python")


def test_warnings_are_shown_and_in_the_report() -> None:
    done = run("-d", "0.01", "--format", "json", warning="something is not as it should be")
    assert done.stderr == "msrtrace: warning: something is not as it should be\n"
    assert decode(done.stdout.encode()).notes == ["something is not as it should be"]


def test_what_prevents_tracing_is_the_error() -> None:
    done = run("-d", "9", obstacle="kvm_intel is not loaded")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "msrtrace: error: kvm_intel is not loaded\n")


@pytest.mark.parametrize("arguments", [["--", "true"], ["-o", "/none/a.json", "true"], ["--pid", "4194305", "true"]])
def test_with_a_command_a_failure_of_the_tracer_has_a_status_of_its_own(arguments: list[str]) -> None:
    """As with env(1) and timeout(1), so that it is not taken for the command's."""
    done = run(*arguments, obstacle="kvm_intel is not loaded")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (125, "", 1)
    assert done.stderr.startswith("msrtrace: error: ")


def test_an_internal_error_with_a_command_has_that_status_too() -> None:
    done = run("echo", "own", broken="")
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith("msrtrace: internal error: OSError: broken map")


def test_a_file_that_cannot_be_written_is_found_before_tracing(tmp_path: Path) -> None:
    done = run("-d", "99", "-o", str(tmp_path / "none/a.json"), obstacle="not asked")
    expected = f"msrtrace: error: cannot write {tmp_path}/none/a.json: there is no directory {tmp_path}/none\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)
    assert run("-d", "99", "-o", str(tmp_path)).returncode == 2


def test_a_report_that_cannot_be_written_is_printed(tmp_path: Path) -> None:
    done = run("-d", "0.01", "-o", "/dev/full", "-o", str(tmp_path / "a.txt"))
    error = "msrtrace: error: cannot write /dev/full: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, error)
    assert done.stdout.startswith(VERDICT)
    assert (tmp_path / "a.txt").read_text().startswith(VERDICT)
    done = run("-o", "/dev/full", "echo", "own")
    assert (done.returncode, done.stdout) == (125, "own\n")
    assert done.stderr.startswith(VERDICT)
    assert done.stderr.endswith(error)


Main = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "1", "true"], "give either -d or COMMAND"),
        (["-d", "0"], "0.0 is not in the range"),
        (["-d", "-1"], "-1.0 is not in the range"),
        (["-d", "nan"], "nan is no number of seconds"),
        (["-d", "inf"], "inf is not in the range"),
        (["-d", "1e9"], "1000000000.0 is not in the range"),
        (["-d", "soon"], "'soon' is not a valid float"),
        (["--format", "changelog"], "'changelog' is not one of"),
        (["--pid", "0"], "0 is not in the range"),
    ],
)
def test_wrong_usage_is_explained(main: Main, arguments: list[str], message: str) -> None:
    status, out, err = main("report", *arguments)
    assert (status, out) == (2, "")
    assert message in err


# --- report, on a terminal ---


def on_a_terminal(*arguments: str, term: str = "xterm") -> tuple[str, str]:
    """The output of `msrtrace report` to a terminal on standard error, and to standard output."""
    directory = tempfile.mkdtemp()
    (Path(directory) / MODULE).write_text("1")
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        command(directory, *arguments),
        env={**ENVIRONMENT, "TERM": term},
        stdout=subprocess.PIPE,
        stderr=end,
        start_new_session=True,
    )
    os.close(end)
    shown = b""
    if "-d" not in arguments and "true" not in arguments:
        while b"Ctrl-C" not in shown:
            shown += os.read(terminal, 9999)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    try:
        while got := os.read(terminal, 9999):
            shown += got
    except OSError:  # nobody has the other end open any more
        pass
    out, _ = process.communicate(timeout=30)
    os.close(terminal)
    assert process.returncode == 0
    return shown.decode(), out.decode()


def test_progress_is_shown_on_a_terminal() -> None:
    shown, out = on_a_terminal("-d", "0.7")
    assert "tracing for 0.7 s" in shown
    assert "100%" in shown
    assert out.startswith(VERDICT)
    assert "tracing" not in out
    shown, _ = on_a_terminal()
    assert "msrtrace: tracing until Ctrl-C" in shown
    shown, _ = on_a_terminal("true")
    assert shown.startswith(VERDICT)  # a command has the terminal for itself


def test_the_progress_on_a_dumb_terminal_has_no_escape_sequences() -> None:
    assert on_a_terminal("-d", "0.3", term="dumb")[0] == "msrtrace: tracing for 0.3 s\r\n"


# --- what vCPUs intercept when the trace ends ---

TWO_VMS = f"web-01 {os.getpid()} 2 0xc0000100\nweb-02 1 1\n"


def test_the_state_at_the_end_is_in_the_report() -> None:
    done = run("-d", "0.1", "--format", "json", **{VMS: TWO_VMS})
    made = decode(done.stdout.encode())
    assert (done.returncode, done.stderr, made.notes) == (0, "", [])
    assert made.state
    assert [(vm.name, vm.count) for vm in made.state.vms] == [("web-01", 2), ("web-02", 1)]
    assert {READ, NESTED, f"{READ}.{CLOSED}"} <= done.left
    text = run("-d", "0.1", **{VMS: TWO_VMS}).stdout
    assert "Intercepted at the end\n  2 VMs, 3 vCPUs\n" in text


def test_the_state_of_a_process_alone() -> None:
    made = decode(run("-d", "0.1", "--pid", str(os.getpid()), "--format", "json", **{VMS: TWO_VMS}).stdout.encode())
    assert made.state
    assert [vm.name for vm in made.state.vms] == ["web-01"]


def test_without_a_module_there_is_no_vcpu() -> None:
    command = ("sh", "-c", "rm $0/module; sleep 0.5")
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / MODULE).write_text("1")
        (Path(directory) / VMS).write_text(TWO_VMS)
        done = on_standin(Path(directory), "report", "-o", "-", "--format", "json", "--", *command, directory)
    made = decode(done.stdout.encode())
    assert made.state
    assert (made.state.vms, made.state.notes) == ([], [])


def test_a_state_that_cannot_be_read_is_a_note() -> None:
    done = run("-d", "0.1", "--format", "json", **{VMS: "broken"})
    made = decode(done.stdout.encode())
    assert (done.returncode, done.stderr, made.state) == (0, "", None)
    why = "what vCPUs intercept cannot be read: broken"
    assert made.notes == [f"what vCPUs intercepted at the end is not in this report: {why}"]
    assert made.totals.filter_updates == 101


@pytest.mark.parametrize("options", [(), ("--by-vm",)])
def test_exits_are_joined_with_the_state_at_the_end(options: tuple[str, ...]) -> None:
    done = run("-d", "0.2", "--exits", "--format", "json", *options)
    made = decode(done.stdout.encode())
    assert (done.returncode, done.stderr) == (0, "")
    assert made.totals.exits
    assert made.exits
    readings = made.totals.exits // 100  # with --by-vm they are read in between, too
    assert made.totals.exits_by_filter == 70 * readings
    assert [(row.name, row.exits, row.interceptors) for row in made.exits] == [
        ("FS_BASE", 70 * readings, "filter"),
        ("PLATFORM_INFO", 30 * readings, "kvm"),
    ]
    of_vms = [(vm.exits, vm.exits_by_filter) for vm in made.vms or ()]
    assert of_vms == ([(made.totals.exits, made.totals.exits_by_filter)] if options else [])
    text = run("-d", "0.2", "--exits", *options).stdout
    assert " exits/s on FS_BASE (0xc0000100), write: the VM's filter alone denies it\n" in " ".join(text.split(" "))
    assert "Exits\n  MSR " in text


def test_of_a_state_that_cannot_be_read_exits_are_unknown() -> None:
    made = decode(run("-d", "0.1", "--exits", "--format", "json", **{VMS: "broken"}).stdout.encode())
    assert (made.totals.exits, made.totals.exits_by_filter, made.totals.exits_perhaps_by_filter) == (100, 0, 70)
    assert made.exits
    assert {row.interceptors for row in made.exits} == {"unknown"}


def test_exits_of_a_vm_that_ended_are_joined_with_what_was_read_of_it_last() -> None:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / MODULE).write_text("1")
        (Path(directory) / VMS).write_text(f"guarded {os.getpid()} 2 0xc0000100\n")
        command = ("sh", "-c", "sleep 0.7; : > $0/vms", directory)
        done = on_standin(Path(directory), "report", "--exits", "-o", "-", "--format", "json", "--", *command)
    made = decode(done.stdout.encode())
    assert made.state
    assert made.state.vms == []
    assert made.exits
    assert [(row.name, row.intercepted_by) for row in made.exits] == [
        ("FS_BASE", {"filter": 2}),
        ("PLATFORM_INFO", {"kvm": 2}),
    ]


def test_without_the_option_exits_are_not_counted() -> None:
    made = decode(run("-d", "0.1", "--format", "json").stdout.encode())
    assert (made.exits, made.totals.exits) == (None, None)


def test_vms_are_named_as_in_the_trace() -> None:
    class Traced:
        state_problem = ""

        def state(self, *, steady: bool = False) -> State:
            assert steady
            return state(vm("renamed", 812), vm("unseen", 5))

    whole, found, notes = report_command._state_at_end(Traced(), {812: VmInfo("web-01"), 6: VmInfo("gone")})  # type: ignore[arg-type]
    assert found
    assert whole
    assert [vm.name for vm in whole.vms] == ["web-01", "unseen"]
    assert ([vm.name for vm in found.vms], notes) == (["web-01", "unseen"], ())
