# SPDX-License-Identifier: GPL-2.0-or-later
"""The BPF program compiled: as it was shipped with msrtrace, as an earlier start left it, or by BCC now.

It asks nothing of a kernel's headers but the registers that a kprobe sees, which never change; all else is put in at
loading. So what was compiled with any headers fits any kernel.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tracer.model.errors import MsrtraceError
from tracer.program import bcc_compiler, relocation, structs
from tracer.program import program as programs
from tracer.program.bcc_compiler import Reply
from tracer.program.cache import cache_get, cache_put, seal, unseal
from tracer.program.loading import Loaded, load
from tracer.program.program import NotPermitted, Program, Variant, VariantRejected
from tracer.program.source import whole_text

#: Each program that is compiled: its source in bpf/, and the -D.
PROGRAMS: tuple[tuple[str, Mapping[str, int]], ...] = (
    ("msrtrace.c", {}),
    ("msrtrace.c", {"FENTRY": 1}),
    ("exits.c", {}),
    ("exits.c", {"FENTRY": 1}),
    ("state.c", {}),
)

#: What makes a Program of what BCC compiles.
_MADE_BY = [Path(str(module.__file__)) for module in (bcc_compiler, programs, relocation, structs)]
#: The child imports from where this process does, which no variable need name: packages have a directory of their own.
#: The directory that we happen to be in, "", is not among them.
_COMPILE = "import sys; sys.path[:] = {path}; from tracer.program.bcc_compiler import main; main()"
_DEBUG_HINT = " (MSRTRACE_DEBUG=1 shows all)"
#: What tells BCC where to find headers (src/cc/frontends/clang/loader.cc).
_BCC_SETTINGS = ("BCC_KERNEL_SOURCE", "BCC_KERNEL_MODULES_SUFFIX", "BCC_LINUX_VERSION_CODE", "BCC_PROBEREAD_KERNEL")


@dataclass(frozen=True)
class Built:
    """What was loaded, by which backend; `passed_over` says why no earlier variant was."""

    backend: str
    loaded: Loaded
    passed_over: tuple[str, ...] = ()


#: The environment with which BCC finds kernel headers, given a directory for scratch; by default it looks itself.
HeaderSettings = Callable[[Path], Mapping[str, str]]


def _no_settings(_: Path) -> Mapping[str, str]:
    return {}


def build(source: Path, variants: Sequence[Variant], headers: HeaderSettings = _no_settings) -> Built:
    """Compile and load a source as the first variant that the machine takes. Raises MsrtraceError, or NotPermitted.

    What cannot be compiled here is passed over if a later variant is compiled already.
    """
    passed_over: list[str] = []
    for at, variant in enumerate(variants):
        try:
            try:
                program = compiled(source, variant.definitions, headers)
            except MsrtraceError as error:
                if not any(_find_compiled(source, later.definitions) for later in variants[at + 1 :]):
                    raise
                raise VariantRejected(str(error)) from None
            return Built(variant.backend, load(program, variant), tuple(passed_over))
        except VariantRejected as error:
            passed_over.append(str(error))
            _show(f"msrtrace: passed over: {error}\n{error.output}")
        except NotPermitted:
            passed_over.append("")
            _show("msrtrace: passed over: the kernel does not permit it\n")
    if not passed_over[-1]:
        raise NotPermitted
    raise MsrtraceError(passed_over[-1] + _DEBUG_HINT)


def compiled(source: Path, definitions: Mapping[str, int], headers: HeaderSettings = _no_settings) -> Program:
    """A source compiled with these -D, now or earlier. Raises VariantRejected, NotPermitted, or MsrtraceError."""
    found = _find_compiled(source, definitions)
    if found is None:
        found = compile_program(source, definitions, headers)
        cache_put(_key(source, definitions), found)
    return found


def is_compiled(source: Path, definitions: Mapping[str, int]) -> bool:
    """Whether a source compiled with these -D can be had without a compiler."""
    return bool(_shipped_content(source, definitions) or cache_get(_key(source, definitions)))


def _find_compiled(source: Path, definitions: Mapping[str, int]) -> Program | None:
    if content := _shipped_content(source, definitions):
        return msgspec.msgpack.decode(content, type=Program)
    return cache_get(_key(source, definitions))


def shipped_file(source: Path, definitions: Mapping[str, int]) -> Path:
    """Where a package has the program that was compiled from a source with these -D."""
    name = "-".join([source.stem, *(name.lower() for name in definitions)])
    return source.with_name(f"{name}.bin")


def shipped_content(source: Path, definitions: Mapping[str, int], compiled: Program) -> bytes:
    """What is in that file."""
    return seal(identity(source, definitions).encode() + msgspec.msgpack.encode(compiled))


def _shipped_content(source: Path, definitions: Mapping[str, int]) -> bytes:
    """The shipped program, still encoded; empty as well if it was made from another source or by another msrtrace."""
    try:
        content = unseal(shipped_file(source, definitions).read_bytes())
    except (OSError, ValueError):
        return b""
    made_from = identity(source, definitions).encode()
    return content[len(made_from) :] if content.startswith(made_from) else b""


def identity(source: Path, definitions: Mapping[str, int]) -> str:
    """A digest of all that decides what a program is, but for the compiler's version: text, -D, machine, our code."""
    parts = [_text(source), *(path.read_bytes() for path in _MADE_BY)]
    return _digest(*parts, json.dumps([sorted(definitions.items()), os.uname()[4]]).encode())


def _key(source: Path, definitions: Mapping[str, int]) -> str:
    """What a program is cached by: for good measure, by the compiler's and the kernel's versions, too."""
    found = importlib.util.find_spec("bcc")
    versions = [path / "version.py" for path in map(Path, (found and found.submodule_search_locations) or ())]
    settings = [*os.uname()[2:], *map(os.environ.get, _BCC_SETTINGS)]
    parts = (path.read_bytes() for path in versions if path.exists())
    return _digest(identity(source, definitions).encode(), *parts, json.dumps(settings).encode())


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _text(source: Path) -> bytes:
    try:
        return whole_text(source).encode()
    except OSError:  # which the compiler will say
        return b""


def _show(text: str) -> None:
    if os.environ.get("MSRTRACE_DEBUG"):
        sys.stderr.write(text)


def compile_program(source: Path, definitions: Mapping[str, int], headers: HeaderSettings = _no_settings) -> Program:
    """Compile a source with these -D in a process that ends: the compiler takes 100 MB of memory, and a second.

    Raises VariantRejected, NotPermitted, or MsrtraceError.
    """
    code = _COMPILE.format(path=[entry for entry in sys.path if entry])
    command = [sys.executable, "-c", code, str(os.getpid()), str(source)]
    command += [f"-D{name}={value}" for name, value in definitions.items()]
    try:
        with tempfile.TemporaryDirectory(prefix="msrtrace-") as scratch:
            settings = {**os.environ, **headers(Path(scratch))}
            done = subprocess.run(command, env=settings, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    except OSError as error:
        raise MsrtraceError(f"the process that compiles the BPF program cannot be started: {error.strerror}") from None
    try:
        reply = msgspec.msgpack.decode(done.stdout, type=Reply)
    except msgspec.DecodeError:
        status = done.returncode
        raise MsrtraceError(f"the process that compiles the BPF program ended with status {status}") from None
    if reply.program:
        _show(reply.output)
        return reply.program
    if reply.missing:
        raise MsrtraceError(reply.missing)
    if reply.not_permitted:
        raise NotPermitted
    lines = reply.output.splitlines()
    reason = next((line for line in lines if "error:" in line), "") or (lines or [reply.error])[-1]
    raise VariantRejected(f"the BPF program cannot be compiled: {reason}", reply.output)
