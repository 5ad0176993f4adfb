# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace top` without a terminal, on a made-up kernel."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import REPO, clean_environment, command


def piped(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, *command(directory, "-d", "0.2", *arguments)],
        env={**clean_environment(), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_a_pipe_gets_frames(directory: Path) -> None:
    done = piped(directory, "-n", "2", "--sort", "share")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\x1b" not in done.stdout
    found = done.stdout.decode().splitlines()
    assert len(found) == 2 * 8
    for lines in (found[:8], found[8:]):
        assert re.fullmatch(r"\d\d:\d\d:\d\d .* layout toggle, redundancy exact, over 0\.\d s", lines[0])
        assert re.fullmatch(r"filter updates .*/s, 100 µs each; calls .*/s, 66.7% redundant", lines[1])
        assert lines[2:4] == ["2 calls per filter update, 1 of them redundant", ""]
        assert lines[4].startswith("MSR ")
        assert [line.split()[0] for line in lines[5:7]] == ["IA32_SPEC_CTRL", "IA32_TSC"]
        assert lines[7] == ""
    assert (directory / "closed").exists()


def test_an_amd_host_is_shown_as_one(directory: Path) -> None:
    (directory / "vendor").touch()
    found = piped(directory, "-n", "1", COLUMNS="120").stdout.decode().splitlines()
    assert " SVM layout pass, redundancy exact, over " in found[0]
    assert found[2] == "47 calls per filter update, 46 of them redundant"


@pytest.mark.parametrize(("sort", "first"), [("filter", "FS_BASE"), ("exits", "FS_BASE"), ("msr", "PLATFORM_INFO")])
def test_exits_in_a_pipe(directory: Path, sort: str, first: str) -> None:
    done = piped(directory, "-n", "2", "--exits", "--sort", sort)
    assert (done.returncode, done.stderr) == (0, b"")
    found = done.stdout.decode().splitlines()
    assert len(found) == 2 * 9
    for lines in (found[:9], found[9:]):
        assert re.fullmatch(r"exits .*/s, 70.0% of them since a filter alone denies the access", lines[3])
        assert re.fullmatch(r"MSR .* exits/s +share +intercepted by", lines[5])
        assert lines[6].split()[0] == first
        ends = {line.split()[0]: line.split()[-2:] for line in lines[6:8]}
        assert ends == {"FS_BASE": ["70.0%", "filter"], "PLATFORM_INFO": ["30.0%", "kvm"]}
    assert (directory / "read.closed").exists()


def test_without_exits_no_state_is_read(directory: Path) -> None:
    found = piped(directory, "-n", "1").stdout.decode()
    assert "exits" not in found
    assert not (directory / "read.closed").exists()


def test_a_state_that_cannot_be_read_does_not_end_it(directory: Path) -> None:
    (directory / "vms").write_text("broken")
    done = piped(directory, "-n", "1", "--exits")
    text = " ".join(done.stdout.decode().split())
    assert (done.returncode, done.stderr) == (0, b"")
    assert "who intercepts an access is unknown: what vCPUs intercept cannot be read: broken" in text
    assert "exits" in text
    assert text.count("unknown") == 3


def test_a_pipe_has_the_width_of_columns(directory: Path) -> None:
    assert b"pid VM" in piped(directory, "-n", "1", "--by-vm", COLUMNS="200").stdout
    narrow = piped(directory, "-n", "1", COLUMNS="40").stdout.decode()
    assert max(map(len, narrow.splitlines())) <= 40


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_frames_in_a_pipe(directory: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, *command(directory, "-d", "0.2")],
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stdout.readline()
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (0, b"")
    assert (directory / "closed").exists()


def test_a_closed_pipe_ends_it(directory: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, *command(directory, "-d", "0.1")],
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stderr
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert (process.wait(30), error) == (1, b"")
    assert (directory / "closed").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        *(["-d", "0"], ["-d", "nan"], ["-d", "inf"], ["-d", "0.01"], ["-n", "0"], ["--pid", "0"]),
        *(["--sort", "name"], ["--sort", "exits"], ["--exits", "--sort", "share"]),
    ],
)
def test_wrong_usage_is_explained(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tracer.cli.main", "top", *arguments],
        cwd=REPO,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, b"")
