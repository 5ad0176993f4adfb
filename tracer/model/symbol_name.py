# SPDX-License-Identifier: GPL-2.0-or-later
"""The source name of a function, from the name of its symbol."""

from __future__ import annotations


def plain_name(symbol: str) -> str:
    """The source name of a function: its symbol without the suffixes that compilers append.

    `.isra.0`, `.constprop.0`, `.part.0`, `.cold`, `.localalias`, `.lto_priv.0` are GCC's, `.llvm.HASH`, `.__uniq.N`,
    `.__part.N`, `.cfi`, `.specialized.N` and `$HASH` LLVM's. A C identifier has neither `.` nor `$`, so everything from
    the first of them on is a suffix, as in cleanup_symbol_name(), kernel/kallsyms.c.
    """
    return symbol.partition(".")[0].partition("$")[0] or symbol
