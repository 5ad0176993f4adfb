# SPDX-License-Identifier: GPL-2.0-or-later
"""Loading BPF programs, which is what any loader does: make the maps, put their descriptors into the instructions, and
hand those to the kernel.

All that differs between kernels, boots and options (offsets, addresses, BTF ids) is put in then, too, so a program that
was compiled elsewhere or earlier fits. What it keeps from being reached the verifier removes (opt_remove_dead_code(),
kernel/bpf/verifier.c).
"""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from tracer.model.errors import MsrtraceError
from tracer.program import syscalls
from tracer.program.program import (
    NotPermitted,
    Program,
    Target,
    Variant,
    VariantRejected,
    shortage,
)
from tracer.program.relocation import resolved
from tracer.program.structs import Member
from tracer.program.syscalls import MMAPABLE, BpfMap, MappedArray

_LONGEST_LOG = 1 << 24  # bytes; what BPF_MAXINSNS programs take, as in libbpf


#: What the verifier says of the helpers that read the kernel's memory where lockdown, or a lack of CAP_PERFMON, forbids
#: them: EINVAL, as if they did not exist (bpf_base_func_proto(), kernel/bpf/helpers.c; bpf_tracing_func_proto()).
_NO_READS = re.compile(r"(?:cannot use helper|unknown func) bpf_probe_read\w*#")

# enum bpf_prog_type, bpf_attach_type
_KPROBE, _RAW_TRACEPOINT, _TRACING = 2, 17, 26
_FENTRY, _FEXIT, _ITER = 24, 25, 28


@dataclass(frozen=True)
class Loaded:
    """What is in the kernel as long as these descriptors are open; `arrays`: of `maps`, those in our memory."""

    maps: dict[str, BpfMap]
    functions: dict[str, int]
    arrays: dict[str, MappedArray] = field(default_factory=dict)
    #: of the values of each of `maps`
    members: dict[str, Mapping[str, Member]] = field(default_factory=dict)

    def free_places(self) -> None:
        """Free the places of arrays that are taken (bpf/places.h), while no program runs."""
        taken = self.maps["taken"]
        for place in taken.keys():  # noqa: SIM118 (a BPF map)
            taken.delete(place)

    def close(self) -> None:
        """Let go of all of it."""
        for array in self.arrays.values():
            array.close()
        for fd in (*(m.fd for m in self.maps.values()), *self.functions.values()):
            os.close(fd)


def load(program: Program, variant: Variant) -> Loaded:
    """Load those functions of `program` that `variant` has a target for. Raises VariantRejected, or NotPermitted."""
    with suppress(OSError, ValueError):  # before 5.11 maps are locked memory
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    loaded = Loaded({}, {})
    modules: dict[str | None, int] = {None: 0}
    try:
        for one in program.maps:
            entries = variant.capacities.get(one.name, one.max_entries)
            with translate_errors(f"makes no BPF map {one.name}"):
                fd = syscalls.create_map(
                    one.name,
                    one.type,
                    key_size=one.key_size,
                    value_size=one.value_size,
                    max_entries=entries,
                    flags=one.flags,
                )
            loaded.maps[one.name] = BpfMap(fd, one.key_size, one.value_size)
            loaded.members[one.name] = one.members
            if one.flags & MMAPABLE:
                with translate_errors(f"does not let the BPF map {one.name} be mapped"):
                    loaded.arrays[one.name] = MappedArray(fd, one.value_size, entries, one.members)
        descriptors = [one.fd for one in loaded.maps.values()]
        for name, target in variant.functions.items():
            if target.module not in modules:
                with translate_errors(f"gives no BTF of {target.module}"):
                    modules[target.module] = syscalls.btf_of_module(str(target.module))
            code = resolved(program.functions[name], descriptors, program.values, variant)
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
    kinds |= {"fentry": (_TRACING, _FENTRY), "fexit": (_TRACING, _FEXIT), "iterator": (_TRACING, _ITER)}

    def attempt(log: bytearray | None) -> int:
        kind, attach_type = kinds[target.kind]
        return syscalls.load_program(
            name, kind, code, attach_type=attach_type, function=target.function, btf=btf, log=log
        )

    with suppress(OSError):
        return attempt(None)
    log = bytearray(_LONGEST_LOG)
    with translate_errors(f"refuses the BPF program {name}", log):  # once more, for the reason
        return attempt(log)


@contextmanager
def translate_errors(what: str, log: bytearray | None = None) -> Iterator[None]:
    """That the kernel says no to `what`, for the reason in `log` if it gives one there."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPERM:
            raise NotPermitted from None
        if too_little := shortage(error):
            raise MsrtraceError(f"the kernel {what}: {too_little}") from None
        text = log[: log.index(0)].decode(errors="replace") if log else ""
        if _NO_READS.search(text):
            raise NotPermitted from None
        lines = [line for line in text.splitlines() if line and not line.startswith(("processed", "HINT"))]
        raise VariantRejected(f"the kernel {what}: {lines[-1] if lines else error.strerror}", text) from None
