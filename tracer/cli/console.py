# SPDX-License-Identifier: GPL-2.0-or-later
"""What the commands share: how they speak to the user, and checks of what the user said."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import click

from tracer.model.errors import MsrtraceError


def say(line: str) -> None:
    """Tell what goes on, on standard output."""
    click.echo(f"msrtrace: {line}")
    sys.stdout.flush()


def warn(line: str) -> None:
    """Tell what is not as it should be, on standard error."""
    click.echo(f"msrtrace: warning: {line}", err=True)


def version() -> str:
    """The version of this msrtrace."""
    from importlib import metadata

    return metadata.version("msrtrace")


def backend_option(function: Callable[..., None]) -> Callable[..., None]:
    """The option --backend of what traces."""
    return click.option(
        "--backend",
        type=click.Choice(["auto", "fentry", "kprobe"]),
        default="auto",
        show_default=True,
        help="How functions are probed; auto: by fentry, which is cheaper, where the kernel can. While fentry is "
        "in use kvm_intel cannot be unloaded.",
    )(function)


def check_pid(pid: int | None) -> None:
    """Raise MsrtraceError unless PID is a process: BPF programs see those, and not their threads' ids."""
    if pid is None:
        return
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        raise MsrtraceError(f"there is no process {pid}") from None
    found = re.search(r"^Tgid:\s*(\d+)", status, re.MULTILINE)
    if found and int(found[1]) != pid:
        raise MsrtraceError(f"{pid} is a thread of process {found[1]}; give --pid {found[1]}")
