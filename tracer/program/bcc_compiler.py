# SPDX-License-Identifier: GPL-2.0-or-later
"""BCC's compiler, which is `main` of a process of its own, with the arguments PARENT SOURCE [-D...].

What it made, or why it did not, goes to standard output.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
from pathlib import Path

import msgspec

from tracer.program.program import MapDefinition, Program, not_permitted
from tracer.program.relocation import relocated
from tracer.program.source import whole_text
from tracer.program.structs import members


class Reply(msgspec.Struct):
    """What the process made, or why it did not, and all that was printed."""

    program: Program | None = None
    missing: str = ""
    error: str = ""
    not_permitted: bool = False
    output: str = ""


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
    # Of bcc_common.h; BCC's Python declares some of it. What is not declared takes a pointer for an int, which fails
    # unless Python is at a fixed, low address, as Debian's is.
    lib.bpf_num_tables.argtypes, lib.bpf_num_tables.restype = [ctypes.c_void_p], ctypes.c_size_t
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
    """See the module; the reply is a `Reply`."""
    parent, source, *flags = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent ends in order, and takes this process along
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):
        return
    with os.fdopen(os.dup(1), "wb") as out, tempfile.TemporaryFile() as printed:
        for fd in (1, 2):  # C libraries write there
            os.dup2(printed.fileno(), fd)
        reply, problem = Reply(), None
        try:
            reply.program = _compile_here(source, flags)
        except ImportError as error:
            reply.missing = f"BCC cannot be imported: {error}; install python3-bpfcc"
        except Exception as error:
            problem = error
        reply.output = os.pread(printed.fileno(), 1 << 26, 0).decode(errors="replace")
        if problem:
            reply.error, reply.not_permitted = str(problem), not_permitted(problem, reply.output)
        out.write(msgspec.msgpack.encode(reply))
        out.flush()
        os._exit(0)  # without BCC's clean-up, which takes its time
