# SPDX-License-Identifier: GPL-2.0-or-later
"""What the source calls what a symbol names."""

from __future__ import annotations


def plain_name(symbol: str) -> str:
    """What a function is called in the source: the name of its SYMBOL without what compilers append.

    `.isra.0`, `.constprop.0`, `.part.0`, `.cold`, `.localalias`, `.lto_priv.0` are GCC's, `.llvm.HASH`, `.__uniq.N`,
    `.cfi`, `.specialized.N` and `$HASH` LLVM's. An identifier of C has neither `.` nor `$`, so all from the first of
    them on is not the source's; cleanup_symbol_name(), kernel/kallsyms.c, argues like this.
    """
    return symbol.partition(".")[0].partition("$")[0] or symbol
