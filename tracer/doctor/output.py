# SPDX-License-Identifier: GPL-2.0-or-later
"""The output of `msrtrace doctor`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from tracer.doctor.check import Check, State
from tracer.kernel.layout import choose
from tracer.kernel.machine import Machine
from tracer.model.errors import MsrtraceError
from tracer.model.text import wrap

SCHEMA = "msrtrace-doctor/1"


def as_text(checks: Sequence[Check], color: bool = False, columns: int | None = None) -> str:
    """The checks as lines for a terminal, each fix below its check; not wider than `columns`, if given."""
    colors = {State.OK: "32", State.WARNING: "33", State.FAILED: "1;31", State.UNKNOWN: "36"}
    width = max((len(check.name) for check in checks), default=0)
    indent = " " * 11  # below the name, so that most commands stay on one line
    lines = []
    for check in checks:
        word = f"{'FAILED' if check.state is State.FAILED else check.state.value:<7}"
        first, *more = wrap(check.detail, columns, f"{word}  {check.name:<{width}}  ", indent)
        if color:
            first = f"\x1b[{colors[check.state]}m{word}\x1b[0m{first.removeprefix(word)}"
        lines += [first, *more]
        lines += wrap(check.fix, columns, f"{indent}-> ", f"{indent}   ") if check.fix else []
    failed = sum(check.state is State.FAILED for check in checks)
    end = f"{failed} to fix before msrtrace can trace here" if failed else "nothing found that prevents tracing here"
    return "\n".join([*lines, "", end])


def as_json(checks: Sequence[Check], machine: Machine) -> str:
    """The checks as JSON, with the same fields in the same order within a major version of SCHEMA."""
    layout = None
    with suppress(MsrtraceError, ValueError):
        layout = choose(replace(machine).symbols)
    document = {
        "schema": SCHEMA,
        "kernel": machine.release,
        "layout": layout.name if layout else None,
        "ok": all(check.state is not State.FAILED for check in checks),
        "checks": [{"name": c.name, "state": c.state.value, "detail": c.detail, "fix": c.fix} for c in checks],
    }
    return json.dumps(document, indent=2, ensure_ascii=False)
