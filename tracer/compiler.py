"""Compiling and loading the BPF program in a process of its own, which ends: the compiler takes 100 MB of memory.

What stays of it are descriptors of maps and programs. They come over a socket, to whoever called `build`.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tracer.errors import MsrtraceError
from tracer.syscalls import BpfMap

_DEBUG_HINT = " (MSRTRACE_DEBUG=1 shows all)"
_LONGEST_REPLY = 100_000  # bytes; net.core.wmem_default is twice that
_MOST_DESCRIPTORS = 253  # SCM_MAX_FD of the kernel
# struct bpf_insn
_INSTRUCTION = struct.Struct("<BBhi")
_CALL, _PSEUDO_KFUNC = 0x85, 2


@dataclass(frozen=True)
class Variant:
    """One way to build the program; `programs` gives each BPF function's type and its name for the caller.

    `bcc`: the oldest version of BCC that can. `kfuncs`: the BTF ids of functions of the kernel that the program
    calls, by the numbers that it calls them by.
    """

    backend: str
    definitions: Mapping[str, str | int]
    programs: Mapping[str, tuple[str, str]]
    bcc: tuple[int, ...] = ()
    kfuncs: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Built:
    """Descriptors of what was loaded, by name; `passed_over` says why an earlier variant was not."""

    backend: str
    maps: dict[str, BpfMap]
    programs: dict[str, int]
    passed_over: tuple[str, ...] = ()

    def close(self) -> None:
        """Let go of all of it."""
        for fd in (*(m.fd for m in self.maps.values()), *self.programs.values()):
            os.close(fd)


class Refused(Exception):
    """The kernel refuses BPF to this process."""


class Builder:
    """A child that is there at once, and waits to be told what to build: it imports BCC in the meantime."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # -P: nothing is imported from the directory that we happen to be in
        command = [sys.executable, "-P", "-m", "tracer.compiler", str(theirs.fileno()), str(os.getpid())]
        with theirs:
            self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])

    def build(self, source: Path, maps: Sequence[str], variants: Sequence[Variant]) -> Built:
        """Build SOURCE, as the first of VARIANTS that the machine takes. Raises MsrtraceError, or Refused."""
        request = {"source": str(source), "maps": list(maps), "variants": [asdict(v) for v in variants]}
        try:
            self._socket.send(json.dumps(request).encode())
            text, fds, _, _ = socket.recv_fds(self._socket, _LONGEST_REPLY, _MOST_DESCRIPTORS)
        except OSError as error:
            text, fds = b"", []
            problem = f": {error.strerror}"
        else:
            problem = ""
        finally:
            self._socket.close()
        status = self._child.wait()
        if not text:
            raise MsrtraceError(f"the process that compiles the BPF program ended with status {status}{problem}")
        reply = json.loads(text)
        if os.environ.get("MSRTRACE_DEBUG"):
            sys.stderr.write("".join(f"msrtrace: passed over: {why}\n" for why in reply.get("passed_over", ())))
            sys.stderr.write(reply["output"])
        if "error" in reply:
            raise Refused if reply["refused"] else MsrtraceError(reply["error"])
        for fd in fds:
            os.set_inheritable(fd, False)
        sizes: dict[str, list[int]] = reply["maps"]
        return Built(
            reply["backend"],
            {name: BpfMap(fd, *sizes[name]) for name, fd in zip(sizes, fds, strict=False)},
            dict(zip(reply["programs"], fds[len(sizes) :], strict=True)),
            tuple(reply["passed_over"]),
        )

    def abandon(self) -> None:
        """End the child, which is not needed."""
        self._socket.close()
        self._child.kill()
        self._child.wait()


# --- in the child ---


@dataclass
class _Output:
    """What C libraries write to stdout and stderr."""

    file: Any = field(default_factory=tempfile.TemporaryFile)
    read: int = 0

    def __post_init__(self) -> None:
        for fd in (1, 2):
            os.dup2(self.file.fileno(), fd)

    def new(self) -> str:
        """What was written since this was last asked."""
        text = os.pread(self.file.fileno(), 1 << 26, self.read)
        self.read += len(text)
        return text.decode(errors="replace")


class _Failed(Exception):
    """A variant cannot be built; the reason."""


def refused(error: Exception, text: str) -> bool:
    """Whether the kernel said EPERM, or EACCES as perf_event_paranoid makes it."""
    said = ("Operation not permitted", "Permission denied", "privileges")
    return getattr(error, "errno", 0) in (errno.EPERM, errno.EACCES) or any(s in f"{error} {text}" for s in said)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line and not line.startswith(("processed", "HINT"))]
    return lines[-1] if lines else ""


def _compile(source: str, variant: Mapping[str, Any], output: _Output, seen: list[str]) -> Any:
    from bcc import BPF

    class Quiet(BPF):  # type: ignore[misc] # BCC has no types
        """BCC would attach functions by their names; here the reader does, when all are loaded."""

        def _trace_autoload(self) -> None:
            pass

    flags = [f"-D{name}={value}" for name, value in variant["definitions"].items()]
    try:
        return Quiet(src_file=source, cflags=["-Wno-macro-redefined", *flags])
    except Exception as error:
        seen.append(output.new())
        if refused(error, seen[-1]):
            raise Refused from None
        lines = seen[-1].splitlines()
        reason = next((line for line in lines if "error:" in line), "") or _last_line(seen[-1]) or str(error)
        raise _Failed(f"the BPF program cannot be compiled or loaded: {reason}{_DEBUG_HINT}") from None


def _resolve(bpf: Any, function: str, kfuncs: Mapping[str, int]) -> None:
    """Make calls of placeholders calls of the kernel's functions: BPF_PSEUDO_KFUNC_CALL, include/uapi/linux/bpf.h."""
    from bcc.libbcc import lib

    start = lib.bpf_function_start(bpf.module, function.encode())
    size = lib.bpf_function_size(bpf.module, function.encode())
    if not start or not kfuncs:
        return
    code = (ctypes.c_char * size).from_address(start)
    for at in range(0, size, _INSTRUCTION.size):
        operation, registers, offset, number = _INSTRUCTION.unpack_from(code, at)
        if operation == _CALL and registers == 0 and str(number) in kfuncs:
            _INSTRUCTION.pack_into(code, at, _CALL, _PSEUDO_KFUNC << 4, offset, kfuncs[str(number)])


def _load(bpf: Any, variant: Mapping[str, Any], output: _Output, seen: list[str]) -> dict[str, int]:
    loaded: dict[str, int] = {}
    for function, (kind, name) in variant["programs"].items():
        _resolve(bpf, function, variant["kfuncs"])
        try:
            loaded[name] = bpf.load_func(function, getattr(bpf, kind.upper())).fd
        except Exception as error:
            seen.append(output.new())
            # EACCES is the verifier's answer too, but then it says why.
            if getattr(error, "errno", 0) == errno.EPERM or "privileges" in str(error):
                raise Refused from None
            reason = _last_line(seen[-1]) or str(error)
            raise _Failed(f"the kernel refuses the BPF program {name}: {reason}{_DEBUG_HINT}") from None
    return loaded


def _answer(request: Mapping[str, Any], output: _Output) -> tuple[dict[str, Any], list[int], list[Any]]:
    """The reply, the descriptors that go with it, and what must live until they are sent."""
    seen: list[str] = []
    passed_over: list[str] = []
    denied = False
    try:
        import bcc
    except ImportError as error:
        reason = f"BCC cannot be imported: {error}; install python3-bpfcc"
        return {"error": reason, "refused": False, "output": ""}, [], []
    version = tuple(map(int, re.findall(r"\d+", bcc.__version__)[:2]))
    for variant in request["variants"]:
        denied = False
        oldest = tuple(variant["bcc"])
        try:
            if oldest and version and version < oldest:
                raise _Failed(f"needs BCC {'.'.join(map(str, oldest))}, this is {bcc.__version__}")
            bpf = _compile(request["source"], variant, output, seen)
            programs = _load(bpf, variant, output, seen)
        except _Failed as error:
            passed_over.append(str(error))
            continue
        except Refused:
            denied = True
            passed_over.append("the kernel does not permit it")
            continue
        maps, fds = {}, []
        for name in request["maps"]:
            try:
                table = bpf[name]
            except KeyError:
                continue
            maps[name] = (ctypes.sizeof(table.Key), ctypes.sizeof(table.Leaf), table.max_entries)
            fds.append(table.map_fd)
        seen.append(output.new())
        reply = {"backend": variant["backend"], "maps": maps, "programs": list(programs)}
        reply |= {"passed_over": passed_over, "output": "".join(seen)}
        return reply, [*fds, *programs.values()], [bpf]
    return {"error": passed_over[-1], "refused": denied, "output": "".join(seen)}, [], []


def main() -> None:
    """Be the child: `python -m tracer.compiler SOCKET PARENT`."""
    own, parent = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent ends in order, and takes this process along
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        return
    output = _Output()
    with suppress(ImportError):
        import bcc  # noqa: F401 (while the parent still finds out what to build)
    text = own.recv(_LONGEST_REPLY)
    if not text:
        return
    reply, fds, _alive = _answer(json.loads(text), output)
    encoded = json.dumps(reply).encode()
    if len(encoded) > _LONGEST_REPLY:
        encoded = json.dumps(reply | {"output": reply["output"][-_LONGEST_REPLY // 8 :]}).encode()
    socket.send_fds(own, [encoded], fds)
    os._exit(0)  # without BCC's clean-up: the descriptors live on


if __name__ == "__main__":
    main()
