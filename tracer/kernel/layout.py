# SPDX-License-Identifier: GPL-2.0-or-later
"""Which functions of the running kernel to probe: chosen by which symbols exist, never by a version number."""

from __future__ import annotations

from itertools import chain

from tracer.kernel.symbols import Symbol, Symbols
from tracer.model.errors import MsrtraceError
from tracer.model.vendor import Layout


def choose(symbols: Symbols) -> Layout | None:
    """The layout of the running kernel, or None if no known function exists.

    The newest layout whose functions all exist; failing that, the newest with a function whose calls can be counted;
    failing that, one whose updates can. `filter_set` is ignored: it belongs to kvm, not to the vendor's module.
    """

    def present(function: str) -> bool:
        return bool(symbols.find(function))

    layouts = symbols.vendor.layouts
    whole = (y for y in layouts if y.calls and all(map(present, (*y.calls, y.update))))
    some_calls = (y for y in layouts if any(map(present, y.calls)))
    updates = (y for y in reversed(layouts) if present(y.update))
    return next(chain(whole, some_calls, updates), None)


def places(layout: Layout, symbols: Symbols, function: str) -> list[Symbol]:
    """The symbols at which a function of the layout can be probed, the best first: of the update function, its body."""
    return symbols.body(function) if function == layout.update else symbols.find(function)


def layout_of(symbols: Symbols) -> Layout:
    """The layout of the running kernel. Raises MsrtraceError, which names the known functions, if there is none."""
    layout = choose(symbols)
    if layout is None:
        names = sorted({name for known in symbols.vendor.layouts for name in (*known.calls, known.update)})
        raise MsrtraceError(
            f"this kernel's {symbols.vendor.module} has none of the functions that msrtrace knows "
            f"({', '.join(names)}); run `msrtrace doctor` and report its output"
        )
    return layout
