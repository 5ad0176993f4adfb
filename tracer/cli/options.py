# SPDX-License-Identifier: GPL-2.0-or-later
"""The options of every command that traces."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from tracer.model.options import BACKENDS, Options

_OPTIONS = (
    click.option("--by-vm", is_flag=True, help="Break down by VM: its name, and the process id of its VMM."),
    click.option("--pid", type=click.IntRange(min=1), help="Trace only the VMM with this process id."),
    click.option(
        "--backend",
        type=click.Choice(["auto", *sorted(BACKENDS)]),
        default="auto",
        show_default=True,
        help="How to probe functions; auto: by fentry, which is cheaper, where the kernel supports it. While fentry is "
        "in use, KVM's module cannot be unloaded.",
    ),
    click.option(
        "--exits",
        is_flag=True,
        help="Count the exits of guests' RDMSR and WRMSR, too. It makes each of them slower: see docs/exits.md.",
    ),
)


def tracing_options(function: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command with --by-vm, --pid, --backend and --exits, which it gets as `options`."""

    @wraps(function)
    def with_options(by_vm: bool, pid: int | None, backend: str, exits: bool, **others: Any) -> None:
        function(options=Options(by_vm=by_vm, pid=pid, backend=backend, exits=exits), **others)

    result: Callable[..., None] = with_options
    for option in reversed(_OPTIONS):
        result = option(result)
    return result
