# SPDX-License-Identifier: GPL-2.0-or-later
"""Kprobes on one function of KVM and on no other of its name, as a livepatch may have."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from tracer.kernel.symbols import Symbol, Symbols
from tracer.program import bcc_library


def attach_kprobe(symbol: Symbol, symbols: Symbols, program: int, *, at_return: bool) -> int:
    """Run `program` at the entry or the return of `symbol`, one of `symbols`, as long as the descriptor is open: it.

    Raises OSError, also where there are several functions of that name and their addresses are hidden.
    """
    refusal = OSError(errno.EADDRNOTAVAIL, "there are several functions of this name, and addresses are hidden")
    for name, address in _ways(symbol, symbols):
        try:
            return bcc_library.attach_kprobe(program, name, address, at_return=at_return)
        except bcc_library.FunctionRefused as error:
            refusal = error
    raise refusal


def _ways(symbol: Symbol, symbols: Symbols) -> Iterator[tuple[str, int]]:
    """How `symbol` can be named to the kernel so that nothing else is meant: a name, or "" and an address.

    A bare name means the first that has it, of the kernel image and then of the module that was loaded last
    (kallsyms_lookup_name()); since b022f0c7e404 (6.6, and stable kernels of its time) it is refused where several have
    it. That commit refused MODULE:NAME, too: 9d8616034f16 (6.12) takes it again, as do stable kernels since July 2024.
    See create_local_trace_kprobe(), kernel/trace/trace_kprobe.c. Kernels from 6.2 to 6.10, and 6.1's stable ones, find
    no names of the image that end in `.llvm.HASH`: compare_symbol_name(), kernel/kallsyms.c.
    """
    namesakes = symbols.namesakes(symbol)
    if symbol.module or all(namesake.module for namesake in namesakes):
        yield symbol.full_name, 0
    if symbol.address:
        yield "", symbol.address
    if symbol.module and not namesakes:
        yield symbol.name, 0
