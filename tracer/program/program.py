# SPDX-License-Identifier: GPL-2.0-or-later
"""BPF programs as the compiler leaves them: kept in files, so that each is compiled once, and loaded into the kernel.

Loading is what any loader does: make the maps, put their descriptors into the instructions, and hand those to the
kernel. All that differs between kernels, boots and options (offsets, addresses, BTF ids) is put in then, too, so a kept
program fits. What it keeps from being reached the verifier removes (opt_remove_dead_code(), kernel/bpf/verifier.c).
"""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from tracer.program import syscalls
from tracer.program.structs import Member
from tracer.program.syscalls import MMAPABLE, BpfMap, MappedArray

_CACHE = Path("/var/cache/msrtrace")
_KEPT = 16  # programs: two of a kernel
_DIGEST = 32  # bytes of SHA-256
_LONGEST_LOG = 1 << 24  # bytes; what BPF_MAXINSNS programs take, as in libbpf

# struct bpf_insn: code, the registers (source in the high half), offset, immediate
_INSTRUCTION = struct.Struct("<BBhi")
_LOAD_64, _CALL, _ATOMIC = 0x18, 0x85, 0xDB
_PSEUDO_MAP_FD, _PSEUDO_KFUNC = 1, 2
_CMPXCHG = 0xF1  # of an atomic operation
_GO_ON = _INSTRUCTION.pack(0x05, 0, 0, 0)  # a jump to the next instruction
_VALUE_MARK = 0x6D737274  # the high half of what stands for a value in bpf/values.h
_FIRST_KFUNC = 0x7F000001  # and the first number that stands for a function of the kernel

# enum bpf_prog_type, bpf_attach_type
_KPROBE, _RAW_TRACEPOINT, _TRACING = 2, 17, 26
_FENTRY, _FEXIT = 24, 25


class MapDefinition(msgspec.Struct, frozen=True):
    """A map to make: `type` and `flags` as in include/uapi/linux/bpf.h, sizes in bytes; the members of its values."""

    name: str
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    members: dict[str, Member] = {}  # msgspec copies it


class Relocation(msgspec.Struct, frozen=True):
    """Of the instruction at a byte: what is put in at loading.

    That is the descriptor of map NUMBER, value NUMBER, or the id of the function of the kernel that it calls NUMBER;
    `cmpxchg` is itself put out where the kernel may not know it.
    """

    at: int
    what: Literal["map", "value", "kfunc", "cmpxchg"]
    number: int


class Function(msgspec.Struct, frozen=True):
    """The instructions of a function, and what has to be put into them."""

    code: bytes
    relocations: list[Relocation] = []


class Program(msgspec.Struct, frozen=True):
    """Maps, functions by their names, and the names of values by their numbers."""

    maps: list[MapDefinition]
    functions: dict[str, Function]
    values: list[str] = []


@dataclass(frozen=True)
class Target:
    """What a function is loaded for: `kprobe`, `raw_tracepoint`, or `fentry` or `fexit` of a function of the kernel.

    That function is given by its BTF id, and the module whose BTF has it (None: the kernel's own).
    """

    kind: str
    function: int = 0
    module: str | None = None


@dataclass(frozen=True)
class Variant:
    """One way to build and to load: `definitions` are the compiler's -D, `functions` says what each is for.

    `values` are numbers for the program, by the names in struct values of bpf/values.h; what is not there is 0.
    `kfuncs` are the BTF ids of functions of the kernel that it calls, by the numbers that it calls them by.
    `capacities`: of maps, by name, where it is another than was compiled. Without `cmpxchg` that instruction cannot be
    reached, and is put out: 5.11 and older refuse it even so.
    """

    backend: str
    definitions: Mapping[str, int]
    functions: Mapping[str, Target]
    values: Mapping[str, int] = field(default_factory=dict)
    kfuncs: Mapping[int, int] = field(default_factory=dict)
    capacities: Mapping[str, int] = field(default_factory=dict)
    cmpxchg: bool = True


@dataclass(frozen=True)
class Loaded:
    """What is in the kernel as long as these descriptors are open; `arrays`: of `maps`, those in our memory."""

    maps: dict[str, BpfMap]
    functions: dict[str, int]
    arrays: dict[str, MappedArray] = field(default_factory=dict)

    def close(self) -> None:
        """Let go of all of it."""
        for array in self.arrays.values():
            array.close()
        for fd in (*(m.fd for m in self.maps.values()), *self.functions.values()):
            os.close(fd)


class Refused(Exception):
    """The kernel refuses BPF to this process."""


class Unfit(Exception):
    """A variant cannot be had here; the reason in a line, and all that was said of it."""

    def __init__(self, reason: str, said: str = "") -> None:
        super().__init__(reason)
        self.said = said


# --- kept in files ---


def folder() -> Path:
    """Where programs are kept: what systemd's CacheDirectory= says, else where caches are by the FHS and by XDG."""
    given = os.environ.get("CACHE_DIRECTORY", "").partition(":")[0]
    if given or not os.geteuid():
        return Path(given or _CACHE)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msrtrace"


def kept(key: str) -> Program | None:
    """The program that was kept as KEY; None if it is not there, not whole, or was in reach of another user."""
    path = folder() / key
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
                return None
            content = file.read()
        if hashlib.sha256(content[_DIGEST:]).digest() != content[:_DIGEST]:
            return None
        program = msgspec.msgpack.decode(content[_DIGEST:], type=Program)
    except (OSError, msgspec.DecodeError):
        return None
    with suppress(OSError):
        os.utime(path)
    return program


def keep(key: str, program: Program) -> None:
    """Keep PROGRAM as KEY, if it can be written; and of all that is kept what was used last."""
    content = msgspec.msgpack.encode(program)
    path = folder() / key
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = path.with_name(f"{key}.{os.getpid()}")
        try:
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(hashlib.sha256(content).digest() + content)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
        for old in sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime, reverse=True)[_KEPT:]:
            old.unlink(missing_ok=True)


# --- loaded ---


def relocated(code: bytes, maps: Mapping[int, int]) -> Function:
    """The function that BCC compiled to CODE; MAPS: the indices of maps by the descriptors that are there now."""
    found: list[Relocation] = []
    without = bytearray(code)
    wide = False
    for n, (operation, registers, _, number) in enumerate(_INSTRUCTION.iter_unpack(code)):
        at = n * _INSTRUCTION.size
        if wide:  # the second half of an instruction
            wide = False
        elif operation == _LOAD_64:
            wide = True
            if registers >> 4 == _PSEUDO_MAP_FD:
                found.append(Relocation(at, "map", maps[number]))
                without[at + 4 : at + 8] = bytes(4)
            elif struct.unpack_from("<12xI", code, at)[0] == _VALUE_MARK:
                found.append(Relocation(at, "value", number))
        elif operation == _CALL and registers == 0 and number >= _FIRST_KFUNC:
            found.append(Relocation(at, "kfunc", number))
        elif operation == _ATOMIC and number == _CMPXCHG:
            found.append(Relocation(at, "cmpxchg", number))
    return Function(bytes(without), found)


def _resolved(function: Function, maps: list[int], names: list[str], variant: Variant) -> bytes:
    """The code of FUNCTION with descriptors of MAPS, values by their NAMES, and the kernel's functions put in."""
    code = bytearray(function.code)
    for one in function.relocations:
        immediate = one.at + 4
        if one.what == "map":
            struct.pack_into("<i", code, immediate, maps[one.number])
        elif one.what == "value":
            value = variant.values.get(names[one.number], 0)
            struct.pack_into("<I4xI", code, immediate, value & 0xFFFFFFFF, value >> 32)
        elif one.what == "cmpxchg" and not variant.cmpxchg:
            code[one.at : immediate + 4] = _GO_ON
        elif one.what == "kfunc" and one.number in variant.kfuncs:
            _INSTRUCTION.pack_into(code, one.at, _CALL, _PSEUDO_KFUNC << 4, 0, variant.kfuncs[one.number])
    return bytes(code)


def load(program: Program, variant: Variant) -> Loaded:
    """Load those functions of PROGRAM that VARIANT has a target for. Raises Unfit, or Refused."""
    with suppress(OSError, ValueError):  # before 5.11 maps are locked memory
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    loaded = Loaded({}, {})
    modules: dict[str | None, int] = {None: 0}
    try:
        for one in program.maps:
            entries = variant.capacities.get(one.name, one.max_entries)
            with _said(f"makes no BPF map {one.name}"):
                fd = syscalls.create_map(
                    one.name,
                    one.type,
                    key_size=one.key_size,
                    value_size=one.value_size,
                    max_entries=entries,
                    flags=one.flags,
                )
            loaded.maps[one.name] = BpfMap(fd, one.key_size, one.value_size)
            if one.flags & MMAPABLE:
                with _said(f"does not let the BPF map {one.name} be mapped"):
                    loaded.arrays[one.name] = MappedArray(fd, one.value_size, entries, one.members)
        descriptors = [one.fd for one in loaded.maps.values()]
        for name, target in variant.functions.items():
            if target.module not in modules:
                with _said(f"gives no BTF of {target.module}"):
                    modules[target.module] = syscalls.btf_of_module(str(target.module))
            code = _resolved(program.functions[name], descriptors, program.values, variant)
            loaded.functions[name] = _load_function(name, code, target, modules[target.module])
    except BaseException:
        loaded.close()
        raise
    finally:
        for fd in filter(None, modules.values()):
            os.close(fd)
    return loaded


def _load_function(name: str, code: bytes, target: Target, btf: int) -> int:
    kinds = {"kprobe": (_KPROBE, 0), "raw_tracepoint": (_RAW_TRACEPOINT, 0)}
    kinds |= {"fentry": (_TRACING, _FENTRY), "fexit": (_TRACING, _FEXIT)}

    def attempt(log: bytearray | None) -> int:
        kind, attach_type = kinds[target.kind]
        return syscalls.load_program(
            name, kind, code, attach_type=attach_type, function=target.function, btf=btf, log=log
        )

    with suppress(OSError):
        return attempt(None)
    log = bytearray(_LONGEST_LOG)
    with _said(f"refuses the BPF program {name}", log):  # once more, for the reason
        return attempt(log)


@contextmanager
def _said(what: str, log: bytearray | None = None) -> Iterator[None]:
    """That the kernel says no to WHAT, for the reason in LOG if it gives one there."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPERM:
            raise Refused from None
        text = log[: log.index(0)].decode(errors="replace") if log else ""
        lines = [line for line in text.splitlines() if line and not line.startswith(("processed", "HINT"))]
        raise Unfit(f"the kernel {what}: {lines[-1] if lines else error.strerror}", text) from None
