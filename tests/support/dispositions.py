# SPDX-License-Identifier: GPL-2.0-or-later
"""Signals that were ignored when pytest began: by nohup, or in the background of a script (where sh ignores two).

A plugin of pytest, which goes on ignoring them. But what tests start has them as from a shell's prompt: a handler, here
one that does nothing, is not inherited by a program that is executed, while SIG_IGN is.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NUMBERS = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)  # subprocess restores SIGPIPE, which Python itself ignores
_ignored: list[int] = []


def as_begun(command: Sequence[str | Path]) -> list[str | Path]:
    """The command with the signals ignored that were ignored when pytest started: for what should live as long."""
    names = ",".join(signal.Signals(number).name for number in _ignored)
    return [*(["env", f"--ignore-signal={names}"] if names else []), *command]


@contextmanager
def dispositions_restored() -> Iterator[dict[signal.Signals, Any]]:
    """Restore the handlers of the signals that end a command, which leaves them ignored; yields the handlers."""
    ending = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in ending}
    try:
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pytest_configure(config: pytest.Config) -> None:
    of_controller = getattr(config, "workerinput", {}).get("ignored", [])
    now = [number for number in _NUMBERS if signal.getsignal(number) is signal.SIG_IGN]
    _ignored[:] = sorted({*map(int, now), *of_controller})
    for number in _ignored:
        signal.signal(number, lambda *_: None)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    """Of xdist: its workers are such programs."""
    node.workerinput["ignored"] = _ignored  # type: ignore[attr-defined]
