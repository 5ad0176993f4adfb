# SPDX-License-Identifier: GPL-2.0-or-later
"""The options of every command that traces."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from tracer.cli.parameters import PID
from tracer.model.options import BACKENDS, Options

#: What the man page of a command that traces has; see Documented.
TRACING: dict[str, Any] = {
    "environment": ("CACHE_DIRECTORY", "XDG_CACHE_HOME", "BCC_KERNEL_SOURCE"),
    "files": {
        "/var/cache/msrtrace, ~/.cache/msrtrace": "compiled BPF programs: root's, and those of other users",
    },
    "overhead": (
        "A probe runs only where KVM changes what a vCPU intercepts, which guests do not cause. It adds 400 to 600 "
        "instructions to each such call with fentry, 630 to 850 with kprobes; a filter update of a vCPU makes 11 to 47 "
        "calls. VMs that run without filter updates cost nothing.",
        "With --exits, each exit of a guest's RDMSR or WRMSR takes longer, by about 270 to 520 instructions with "
        "fentry, and 500 to 1,210 with kprobes. This is the only option that makes guests slower.",
        "docs/cost.md in msrtrace's source has all figures, by kernel, and how to measure them.",
    ),
}

_OPTIONS = (
    click.option("--by-vm", is_flag=True, help="Break down by VM: its name, and the process id of its VMM."),
    click.option("--pid", type=PID, metavar="PID", help="Trace only the VMM with this process id."),
    click.option(
        "--backend",
        type=click.Choice(["auto", *sorted(BACKENDS)]),
        default="auto",
        show_default=True,
        metavar="BACKEND",
        help="How to probe functions: fentry, kprobe or auto, which is fentry, the cheaper one, where the kernel "
        "supports it. While fentry is in use, KVM's module cannot be unloaded.",
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
