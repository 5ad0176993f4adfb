# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiling the BPF program by BCC, in a process of its own, which ends: the compiler takes 100 MB of memory.

And a second, so what it made is kept. The program asks for nothing of the kernel's headers but the registers that a
kprobe sees, which never change; all else is put in at loading. So it is kept by its text, and by the compiler's and the
kernel's versions for good measure.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tracer.model.errors import MsrtraceError
from tracer.program import program, structs
from tracer.program.program import (
    Loaded,
    MapDefinition,
    Program,
    Refused,
    Unfit,
    Variant,
    keep,
    kept,
    load,
    relocated,
)
from tracer.program.structs import members

#: What makes a Program of what BCC compiles.
_MADE_BY = [Path(str(file)) for file in (__file__, program.__file__, structs.__file__)]
_DEBUG_HINT = " (MSRTRACE_DEBUG=1 shows all)"
#: What tells BCC where to find headers (src/cc/frontends/clang/loader.cc).
_BCC_SETTINGS = ("BCC_KERNEL_SOURCE", "BCC_KERNEL_MODULES_SUFFIX", "BCC_LINUX_VERSION_CODE", "BCC_PROBEREAD_KERNEL")


@dataclass(frozen=True)
class Built:
    """What was loaded, by which backend; `passed_over` says why no earlier variant was."""

    backend: str
    loaded: Loaded
    passed_over: tuple[str, ...] = ()


def build(source: Path, variants: Sequence[Variant]) -> Built:
    """Compile and load SOURCE, as the first of VARIANTS that the machine takes. Raises MsrtraceError, or Refused."""
    passed_over: list[str] = []
    for variant in variants:
        try:
            return Built(variant.backend, load(compiled(source, variant.definitions), variant), tuple(passed_over))
        except Unfit as error:
            passed_over.append(str(error))
            _show(f"msrtrace: passed over: {error}\n{error.said}")
        except Refused:
            passed_over.append("")
            _show("msrtrace: passed over: the kernel does not permit it\n")
    if not passed_over[-1]:
        raise Refused
    raise MsrtraceError(passed_over[-1] + _DEBUG_HINT)


def compiled(source: Path, definitions: Mapping[str, int]) -> Program:
    """SOURCE compiled with DEFINITIONS for -D, now or earlier. Raises Unfit, Refused, or MsrtraceError."""
    key = _key(source, definitions)
    program = kept(key)
    if program is None:
        program = _compile(source, definitions)
        keep(key, program)
    return program


def whole_text(source: Path) -> str:
    """SOURCE with the headers that lie beside it put in, as BCC makes functions of maps in one file alone."""

    def header(found: re.Match[str]) -> str:
        return f'#line 1 "{found[1]}"\n{(source.parent / found[1]).read_text()}'

    return re.sub(r'^#include "(\w+\.h)"\n', header, source.read_text(), flags=re.MULTILINE)


def _key(source: Path, definitions: Mapping[str, int]) -> str:
    found = importlib.util.find_spec("bcc")
    bcc = [path / "version.py" for path in map(Path, (found and found.submodule_search_locations) or ())]
    made_from = [
        _text(source),
        *(_content(path) for path in (*_MADE_BY, *bcc)),
        json.dumps([sorted(definitions.items()), *os.uname()[2:], *map(os.environ.get, _BCC_SETTINGS)]).encode(),
    ]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in made_from)).hexdigest()


def _text(source: Path) -> bytes:
    try:
        return whole_text(source).encode()
    except OSError:  # which the compiler will say
        return b""


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _show(text: str) -> None:
    if os.environ.get("MSRTRACE_DEBUG"):
        sys.stderr.write(text)


def _compile(source: Path, definitions: Mapping[str, int]) -> Program:
    # -P: nothing is imported from the directory that we happen to be in
    command = [sys.executable, "-P", "-m", "tracer.program.compiler", str(os.getpid()), str(source)]
    command += [f"-D{name}={value}" for name, value in definitions.items()]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    except OSError as error:
        raise MsrtraceError(f"the process that compiles the BPF program cannot be started: {error.strerror}") from None
    try:
        reply = msgspec.msgpack.decode(done.stdout, type=_Reply)
    except msgspec.DecodeError:
        status = done.returncode
        raise MsrtraceError(f"the process that compiles the BPF program ended with status {status}") from None
    if reply.program:
        _show(reply.said)
        return reply.program
    if reply.missing:
        raise MsrtraceError(reply.missing)
    if reply.refused:
        raise Refused
    lines = reply.said.splitlines()
    reason = next((line for line in lines if "error:" in line), "") or (lines or [reply.error])[-1]
    raise Unfit(f"the BPF program cannot be compiled: {reason}", reply.said)


class _Reply(msgspec.Struct):
    """Of the child: what it made, or why it did not, and all that was SAID."""

    program: Program | None = None
    missing: str = ""
    error: str = ""
    refused: bool = False
    said: str = ""


# --- in the child ---


def refused(error: Exception, text: str) -> bool:
    """Whether the kernel said EPERM, or EACCES as perf_event_paranoid makes it."""
    said = ("Operation not permitted", "Permission denied", "privileges")
    return getattr(error, "errno", 0) in (errno.EPERM, errno.EACCES) or any(s in f"{error} {text}" for s in said)


_OF_A_TABLE = {
    "bpf_table_name": ctypes.c_char_p,
    "bpf_table_type_id": ctypes.c_int,
    "bpf_table_key_size_id": ctypes.c_size_t,
    "bpf_table_leaf_size_id": ctypes.c_size_t,
    "bpf_table_max_entries_id": ctypes.c_size_t,
    "bpf_table_flags_id": ctypes.c_int,
    "bpf_table_fd_id": ctypes.c_int,
    "bpf_table_leaf_desc_id": ctypes.c_char_p,
}
_VALUES = "values"  # the map that only says what values there are


def _compile_here(source: str, flags: list[str]) -> Program:
    from bcc import BPF
    from bcc.libbcc import lib

    class Quiet(BPF):  # type: ignore[misc] # BCC has no types
        """BCC would load and attach functions by their names."""

        def _trace_autoload(self) -> None:
            pass

    bpf = Quiet(text=whole_text(Path(source)), cflags=["-Wno-macro-redefined", *flags])
    # Of bcc_common.h; BCC's Python declares some of it.
    for name, result in _OF_A_TABLE.items():
        getattr(lib, name).argtypes, getattr(lib, name).restype = [ctypes.c_void_p, ctypes.c_size_t], result
    maps: list[MapDefinition] = []
    indices: dict[int, int] = {}
    values: list[str] = []
    for n in range(lib.bpf_num_tables(bpf.module)):
        found = MapDefinition(
            lib.bpf_table_name(bpf.module, n).decode(),
            lib.bpf_table_type_id(bpf.module, n),
            lib.bpf_table_key_size_id(bpf.module, n),
            lib.bpf_table_leaf_size_id(bpf.module, n),
            lib.bpf_table_max_entries_id(bpf.module, n),
            lib.bpf_table_flags_id(bpf.module, n),
            members(lib.bpf_table_leaf_desc_id(bpf.module, n).decode()),
        )
        if found.name == _VALUES:
            values = list(found.members)
        else:
            indices[lib.bpf_table_fd_id(bpf.module, n)] = len(maps)
            maps.append(found)
    functions = {}
    for n in range(lib.bpf_num_functions(bpf.module)):
        name = lib.bpf_function_name(bpf.module, n)
        code = ctypes.string_at(lib.bpf_function_start(bpf.module, name), lib.bpf_function_size(bpf.module, name))
        functions[name.decode()] = relocated(code, indices)
    return Program(maps, functions, values)


def main() -> None:
    """Be the child: `python -m tracer.compiler PARENT SOURCE [-D...]`; the reply goes to standard output."""
    parent, source, *flags = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent ends in order, and takes this process along
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):
        return
    with os.fdopen(os.dup(1), "wb") as out, tempfile.TemporaryFile() as said:
        for fd in (1, 2):  # C libraries write there
            os.dup2(said.fileno(), fd)
        reply, problem = _Reply(), None
        try:
            reply.program = _compile_here(source, flags)
        except ImportError as error:
            reply.missing = f"BCC cannot be imported: {error}; install python3-bpfcc"
        except Exception as error:
            problem = error
        reply.said = os.pread(said.fileno(), 1 << 26, 0).decode(errors="replace")
        if problem:
            reply.error, reply.refused = str(problem), refused(problem, reply.said)
        out.write(msgspec.msgpack.encode(reply))
        out.flush()
        os._exit(0)  # without BCC's clean-up, which takes its time


if __name__ == "__main__":
    main()
