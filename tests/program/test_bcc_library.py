# SPDX-License-Identifier: GPL-2.0-or-later
"""What BCC's library is asked for, and what is made of its answers: errors in one line, nothing printed."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tracer.model.errors import MsrtraceError
from tracer.program import bcc_library
from tracer.program.bcc_library import FunctionRefused, attach_kprobe, attach_tracing

PMU = 8
FALLBACK = b"create_probe_event: open(/sys/kernel/debug/tracing/kprobe_events): Permission denied\n"
TOO_LONG = b"Event name (" + b"-" * 256 + b") is too long for buffer\n"
Answer = tuple[int, int, bytes]  # the result, errno, and what is printed


class Library:
    """BCC's, with an ANSWER for each of its functions."""

    def __init__(self, **answers: Answer) -> None:
        self.answers, self.asked = answers, list[tuple[str, tuple[int | bytes, ...]]]()

    def __getattr__(self, name: str) -> Callable[..., int]:
        def function(*arguments: int | bytes) -> int:
            self.asked.append((name, arguments))
            result, number, text = self.answers[name]
            os.write(2, text)
            ctypes.set_errno(number)
            return result

        return function


@pytest.fixture(autouse=True)
def pmu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "type"
    file.write_text(f"{PMU}\n")
    monkeypatch.setattr(bcc_library, "_PMU", file)
    return file


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Each test loads the library, or what stands for it."""
    bcc_library.library.cache_clear()
    yield
    bcc_library.library.cache_clear()


def use(monkeypatch: pytest.MonkeyPatch, **answers: Answer) -> Library:
    library = Library(**answers)
    monkeypatch.setattr(bcc_library, "library", lambda: library)
    return library


@pytest.mark.parametrize(("at_return", "kind"), [(False, 0), (True, 1)])
@pytest.mark.parametrize(("function", "address"), [("kvm_intel:vmx_x", 0), ("", 0xFFFFFFFFC0B00010)])
def test_how_a_kprobe_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, function: str, address: int, at_return: bool, kind: int
) -> None:
    library = use(monkeypatch, bpf_attach_kprobe=(7, 0, b""))
    assert attach_kprobe(5, function, address, at_return=at_return) == 7
    [(_, (program, how, event, *rest))] = library.asked
    assert (program, how, rest) == (5, kind, [function.encode(), address, 0])
    assert isinstance(event, bytes)
    # char ev_alias[256], bpf_attach_probe(); MAX_EVENT_NAME_LEN and is_good_name() of kernel/trace/trace_probe.h
    assert len(event) >= 256
    assert not event.replace(b"_", b"x").isalnum()


@pytest.mark.parametrize("printed", [TOO_LONG, FALLBACK])
@pytest.mark.parametrize("said", [errno.EINVAL, errno.ENOENT, errno.EACCES])  # errno of a fallback that failed
def test_a_function_that_takes_no_kprobe(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], said: int, printed: bytes
) -> None:
    opened = (-1, errno.EINVAL, b"perf_event_open: Invalid argument\n")
    library = use(monkeypatch, bpf_attach_kprobe=(-1, said, printed), bpf_open_perf_event=opened)
    with pytest.raises(FunctionRefused, match=r"^\[Errno 22\] the kernel takes no kprobe on vmx_x: see /sys/.*$"):
        attach_kprobe(5, "vmx_x", at_return=False)
    assert library.asked[1] == ("bpf_open_perf_event", (PMU, 0, -1, 0))
    with pytest.raises(FunctionRefused, match=r"no kprobe on 0x1234:"):
        attach_kprobe(5, "", 0x1234, at_return=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EMFILE])
def test_what_has_nothing_to_do_with_the_function(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    line = f"perf_event_open: {os.strerror(number)}"
    opened = (-1, number, f"{line}\n".encode())
    use(monkeypatch, bpf_attach_kprobe=(-1, errno.EINVAL, TOO_LONG), bpf_open_perf_event=opened)
    with pytest.raises(OSError, match=line) as raised:
        attach_kprobe(5, "vmx_x", at_return=False)
    assert raised.value.errno == number
    assert not isinstance(raised.value, FunctionRefused)
    assert capfd.readouterr() == ("", "")


def test_a_program_that_the_perf_event_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = b"ioctl(PERF_EVENT_IOC_SET_BPF): Invalid argument\n"
    library = use(monkeypatch, bpf_attach_kprobe=(-1, errno.EINVAL, printed))
    with pytest.raises(OSError, match=r"^\[Errno 22\] ioctl\(PERF_EVENT_IOC_SET_BPF\): Invalid argument$") as raised:
        attach_kprobe(5, "vmx_x", at_return=False)
    assert not isinstance(raised.value, FunctionRefused)
    assert len(library.asked) == 1


def test_a_kernel_without_the_pmu_is_not_asked(monkeypatch: pytest.MonkeyPatch, pmu: Path) -> None:
    library = use(monkeypatch)
    pmu.unlink()
    with pytest.raises(FileNotFoundError, match=rf"perf has no kprobes \({pmu}: No such file or directory\)$"):
        attach_kprobe(5, "vmx_x", at_return=False)
    assert library.asked == []


def test_fentry(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    library = use(monkeypatch, bpf_attach_kfunc=(7, 0, b""))
    assert attach_tracing(5) == 7
    assert library.asked == [("bpf_attach_kfunc", (5,))]
    printed = b"bpf_attach_raw_tracepoint (kfunc): Device or resource busy\n"
    use(monkeypatch, bpf_attach_kfunc=(-16, errno.EBUSY, printed))
    with pytest.raises(OSError, match=r"^\[Errno 16\] bpf_attach_raw_tracepoint \(kfunc\): Device or resource busy$"):
        attach_tracing(5)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("answer", [(7, 0, b""), (-1, errno.EBUSY, b"bpf_attach_raw_tracepoint (kfunc): busy\n")])
def test_what_another_thread_prints_comes_through(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], answer: Answer
) -> None:
    def meanwhile(*_: object) -> int:
        other = threading.Thread(target=os.write, args=(2, b"msrtrace: warning: a scrape failed\n"))
        other.start()
        other.join()
        os.write(2, answer[2])
        ctypes.set_errno(answer[1])
        return answer[0]

    library = use(monkeypatch)
    monkeypatch.setattr(library, "bpf_attach_kfunc", meanwhile, raising=False)
    if answer[0] < 0:
        with pytest.raises(OSError, match=r"^\[Errno 16\] bpf_attach_raw_tracepoint \(kfunc\): busy$"):
            attach_tracing(5)
    else:
        assert attach_tracing(5) == answer[0]
    assert capfd.readouterr().err == "msrtrace: warning: a scrape failed\n"


def test_a_process_whose_stderr_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, bpf_attach_kfunc=(-1, errno.EBUSY, b"bpf_attach_raw_tracepoint (kfunc): busy\n"))
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(2)
            with pytest.raises(OSError, match="busy"):
                attach_tracing(5)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(2)
            os.write(write, b"done")
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 9) == b"done"
    os.waitpid(child, 0)
    os.close(read)


def test_the_library_of_this_machine_says_no_and_prints_nothing(pmu: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With an event that is no kprobe's where the kernel has none: BCC's own code, up to where it would write."""
    devices = Path("/sys/bus/event_source/devices")
    pmu.write_text(
        next(kind.read_text() for name in ("kprobe", "uprobe") if (kind := devices / name / "type").exists())
    )
    with pytest.raises(OSError, match=r"kprobe|perf_event_open") as raised:
        attach_kprobe(-1, "kvm_intel:no_such_function", at_return=False)
    assert isinstance(raised.value, FunctionRefused) == (raised.value.errno == errno.EINVAL)
    with pytest.raises(OSError, match="kfunc"):
        attach_tracing(-1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("there", [["libbcc_bpf.so.0", "libbcc.so.0"], ["libbcc.so.0"]])
def test_which_library_is_loaded(monkeypatch: pytest.MonkeyPatch, there: list[str]) -> None:
    load = ctypes.CDLL

    def named(name: str, **options: bool) -> ctypes.CDLL:
        if name not in there:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        loaded.append(name)
        return load("libbcc_bpf.so.0", **options)

    loaded: list[str] = []
    monkeypatch.setattr("ctypes.CDLL", named)
    bcc_library.library()
    bcc_library.library()
    assert loaded == there[:1]


def test_no_library_is_one_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str, **_: bool) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr("ctypes.CDLL", nothing)
    with pytest.raises(MsrtraceError, match=r"\(libbcc_bpf.*; libbcc\.so.*\): install libbpfcc \(Debian"):
        attach_tracing(5)
