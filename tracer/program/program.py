# SPDX-License-Identifier: GPL-2.0-or-later
"""BPF programs as the compiler leaves them, and the ways to load one."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from tracer.program.structs import Member


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
    """What a function is loaded for: `kprobe`, `raw_tracepoint`, `iterator`, `fentry` or `fexit`.

    The function that it hooks into, or that says what is iterated over, is given by its BTF id, and the module whose
    BTF has it (None: the kernel's own).
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


class NotPermitted(Exception):
    """The kernel permits this process no BPF."""


class VariantRejected(Exception):
    """The machine does not take a variant: the reason in a line, and `output`, all that was printed of it."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


def not_permitted(error: Exception, text: str = "") -> bool:
    """Whether the kernel said EPERM, or EACCES as perf_event_paranoid makes it; `text` is what was printed with it."""
    words = ("Operation not permitted", "Permission denied", "privileges")
    return getattr(error, "errno", 0) in (errno.EPERM, errno.EACCES) or any(word in f"{error} {text}" for word in words)


#: What a limit of the process or a lack of memory makes the kernel say, whatever was asked for; and what to do.
_SHORTAGES = {
    errno.EMFILE: "the limit on open files is too low (ulimit -n, LimitNOFILE=)",
    errno.ENFILE: "the machine has too many open files (sysctl fs.file-max)",
    errno.ENOMEM: "there is not enough memory",
}


def shortage(error: BaseException) -> str:
    """What there was too little of, and what to do, if that is the error's reason; otherwise an empty string."""
    return _SHORTAGES.get(getattr(error, "errno", None) or 0, "")
