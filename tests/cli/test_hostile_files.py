# SPDX-License-Identifier: GPL-2.0-or-later
"""What is given as a file of a report or a state, and is something else."""

from __future__ import annotations

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
from command import ON_STANDIN
from faults import Figures
from made import patched, report, toggle
from made_vms import FS_BASE, denies, file, vcpu, vm

from tracer.report.file import SIZE_LIMIT, encode

Main = Callable[..., tuple[int, str, str]]

REPORT, STATE = encode(patched()), encode(file(vm("web", 1, vcpu(0, denies(FS_BASE)))))
#: Each command that reads such files, with a good one, and the bad one in place of FILE.
COMMANDS = {
    "show": (REPORT, ["show", "FILE"]),
    "compare": (REPORT, ["compare", "FILE", "good.json"]),
    "compare, the other": (REPORT, ["compare", "good.json", "FILE"]),
    "state --diff": (STATE, ["state", "--diff", "FILE", "good.json"]),
    "state --diff, the other": (STATE, ["state", "--diff", "good.json", "FILE"]),
}


@contextmanager
def fed(path: Path, content: bytes, pause: float = 0) -> Iterator[None]:
    """A pipe that somebody writes this into, again and again unless there is a `pause`; then once, in two pieces."""
    os.mkfifo(path)
    opened = threading.Event()

    def feed() -> None:
        with path.open("wb", buffering=0) as pipe:
            opened.set()
            try:
                if pause:
                    pipe.write(content[:100])
                    time.sleep(pause)
                    pipe.write(content[100:])
                while not pause:
                    pipe.write(content)
            except OSError:
                pass

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        yield
    finally:
        if not opened.is_set():
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        thread.join(20)


@contextmanager
def growing(path: Path, content: bytes) -> Iterator[None]:
    """A file that grows while it is read."""
    path.write_bytes(content)
    stop = threading.Event()

    def grow() -> None:
        with path.open("ab", buffering=0) as more:
            while not stop.is_set():
                more.write(b" " * 4096)

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(20)


def sparse(path: Path) -> None:
    with path.open("wb") as made:
        made.truncate(1 << 40)


def bomb(path: Path) -> None:
    path.write_bytes(gzip.compress(bytes(64 << 20)))


TOO_LARGE, NOT_ONE = "is larger than any", "is not JSON"
#: What is given, how it is made, and what the error says.
THINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a directory": (Path.mkdir, "Is a directory"),
    "/dev/zero": (lambda path: path.symlink_to("/dev/zero"), TOO_LARGE),
    "/dev/null": (lambda path: path.symlink_to("/dev/null"), "is empty"),
    "/proc/self/mem": (lambda path: path.symlink_to("/proc/self/mem"), "cannot read"),
    "a loop of links": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "a file of 1 TB": (sparse, TOO_LARGE),
    "a gzip bomb": (bomb, "is compressed (gzip): use gunzip first"),
    "a pipe without end": (lambda path: fed(path, b" " * 65536), TOO_LARGE),
    "a pipe of nonsense": (lambda path: fed(path, b"nonsense" * 20, 0.1), NOT_ONE),
}


@pytest.mark.fault(
    "hostile",
    "what is no file of a report or a state",
    f"{', '.join(THINGS)}; in show, compare, state --diff",
    dear=True,
)
def test_what_is_no_file_is_refused_in_one_line(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: Figures
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tried = 0
    for name, (good, arguments) in COMMANDS.items():
        for thing, (make, why) in THINGS.items():
            directory = tmp_path / f"{tried}"
            directory.mkdir()
            monkeypatch.chdir(directory)
            (directory / "good.json").write_bytes(good)
            path = directory / "bad.json"
            context = make(path)
            with context if isinstance(context, AbstractContextManager) else nullcontext():
                status, out, err = main(*("bad.json" if part == "FILE" else part for part in arguments))
            assert (status, out, err.count("\n")) == (1, "", 1), (name, thing, err)
            assert why in err, (name, thing, err)
            assert err.startswith("msrtrace: error: ")
            tried += 1
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert used < 6 * (SIZE_LIMIT >> 20)
    figures["refused in one line"] = f"{tried} of {tried}"
    figures["memory"] = f"{used} MB more at most"


@pytest.mark.fault(
    "hostile", "a report in a pipe, or that grows while it is read", "in pieces; with spaces after it, without end"
)
def test_a_slow_or_growing_file_is_read_or_refused(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: Figures
) -> None:
    monkeypatch.chdir(tmp_path)
    with fed(tmp_path / "pipe", REPORT, 0.2):
        assert main("show", "pipe") == main("show", str(saved(tmp_path, REPORT)))
    with growing(tmp_path / "grows", REPORT):
        status, out, err = main("show", "grows")
    assert (status == 0 and "patch present" in out) or TOO_LARGE in err
    figures["the pipe"] = "read as the file"
    figures["the one that grows"] = "read" if status == 0 else "refused in one line"


def saved(directory: Path, content: bytes) -> Path:
    (directory / "saved.json").write_bytes(content)
    return directory / "saved.json"


@pytest.mark.fault("hostile", "a pipe that nobody writes into", "Ctrl-C")
def test_waiting_for_a_pipe_ends_with_ctrl_c(tmp_path: Path, figures: Figures) -> None:
    os.mkfifo(tmp_path / "pipe")
    code = "from tracer.cli.main import main; import sys; sys.argv[0] = 'msrtrace'; print('up', flush=True); main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "show", str(tmp_path / "pipe")],
        env=ON_STANDIN,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "Traceback" not in err
    figures["ended"] = f"after {time.monotonic() - started:.1f} s, in a line"


#: File names, which are titles of the sides of a comparison.
NAMES = ("\x1b[2Jowned.json", "two\nlines.json", "\u202egpj.json", "<script>alert(1)<.json", "a|b`c`.json")


@pytest.mark.fault(
    "hostile", "names of files with terminal sequences and line breaks", "in compare and state --diff, in every format"
)
def test_names_of_files_are_shown_safely(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: Figures
) -> None:
    monkeypatch.chdir(tmp_path)
    tried = 0
    nothing = encode(file(vm("web", 1, vcpu(0))))
    for name in (*NAMES, os.fsdecode(b"\xff\xfe.json")):
        Path(name).write_bytes(encode(report(toggle(patched=False))))
        Path("other.json").write_bytes(encode(report(toggle())))
        for fmt in ("text", "markdown", "json", "html", "changelog"):
            status, out, err = main("compare", name, "other.json", "--format", fmt)
            assert (status, err) == (0, ""), (name, fmt)
            assert out.replace("\n", "").isprintable(), (name, fmt)
            assert "<script>alert" not in out or fmt != "html"
            tried += 1
        Path(name).write_bytes(STATE)
        Path("other.json").write_bytes(nothing)
        for fmt in ("text", "markdown", "json"):
            status, out, err = main("state", "--diff", name, "other.json", "--format", fmt)
            assert (status, err) == (0, ""), (name, fmt, err)
            assert out.replace("\n", "").isprintable(), (name, fmt, out)
            if fmt == "json":
                json.loads(out)
            tried += 1
    figures["texts without a control character"] = f"{tried} of {tried}"
