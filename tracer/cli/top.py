# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace top`: Show live which MSR intercepts KVM updates, why, and how many of the calls change nothing."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tracer.cli.command import Documented
from tracer.cli.console import columns, is_dumb, warn
from tracer.cli.options import TRACING, tracing_options
from tracer.cli.parameters import Seconds
from tracer.cli.session import ready_machine, tracing
from tracer.model.module_change import FOLLOW_SECONDS
from tracer.model.options import Options

if TYPE_CHECKING:
    from tracer.live.table import Look, View
    from tracer.live.terminal import Screen, Signals
    from tracer.live.top import Sampler

_KEYS, _SCREEN = 0, 1  # file descriptors
_LONGEST_DELAY = 86400.0
_SORTS = ("calls", "redundant", "share", "msr", "cause")
_SORTS_OF_EXITS = ("filter", "exits", "msr")
_SORT_KEYS = {"c": "calls", "r": "redundant", "s": "share", "m": "msr", "u": "cause"}
_EXIT_SORT_KEYS = {"f": "filter", "c": "exits", "m": "msr"}
_SCROLL = {"up": -1, "down": 1, "page up": -10, "page down": 10}
_CONSOLE = re.compile(r"vt\d|linux|ansi|cons")  # ASCII, and no second screen
_NO_COLOR = re.compile(r"vt\d")


@click.command(
    cls=Documented,
    examples={
        "sudo msrtrace top": "Which MSR intercepts KVM changes, every second",
        "sudo msrtrace top --exits --by-vm -d 5": "Which MSR accesses make VMs exit, and who wants that",
        "sudo msrtrace top -n 1 -d 10": "Print one frame, of 10 seconds",
    },
    **{**TRACING, "environment": (*TRACING["environment"], "NO_COLOR", "TERM")},
)
@click.option(
    "-d",
    "--delay",
    type=Seconds(_LONGEST_DELAY, least=0.1),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="The length of an interval.",
)
@click.option("-n", "--iterations", type=click.IntRange(min=1), metavar="N", help="Stop after N intervals.")
@tracing_options
@click.option(
    "--sort",
    type=click.Choice([*_SORTS, *_SORTS_OF_EXITS[:2]]),
    metavar="ORDER",
    help=f"The order of the rows: {', '.join(_SORTS)} (default: calls); with --exits {', '.join(_SORTS_OF_EXITS)} "
    "(default: filter, what a filter alone causes first).",
)
def top(delay: float, iterations: int | None, options: Options, sort: str | None) -> None:
    """Show live which MSR intercepts KVM updates, why, and how many of the calls change nothing.

    With --exits, first the exits of guests' accesses to MSRs, and who has these intercepted.

    In a terminal, `?` shows the keys and q quits. Elsewhere, and with TERM=dumb, the intervals are printed one after
    another, until Ctrl-C or -n. NO_COLOR is respected.
    """
    orders = _SORTS_OF_EXITS if options.exits else _SORTS
    if sort and sort not in orders:
        option = "with --exits" if options.exits else "without --exits"
        raise click.UsageError(f"--sort {sort}: {option}, one of {', '.join(orders)}")

    from tracer.live.terminal import Screen, Signals

    with Signals() as signals:
        machine = ready_machine(options)

        from tracer.live.table import View
        from tracer.live.top import Sampler

        term = os.environ.get("TERM", "")
        live = os.isatty(_KEYS) and os.isatty(_SCREEN) and not is_dumb()
        if live:
            click.echo("msrtrace: attaching the probes", err=True)
        with tracing(machine, options, states=options.exits, nested=options.exits) as tracer:
            for warning in tracer.warnings:
                warn(warning)
            sampler, view = Sampler(tracer), View(exits=options.exits)
            if options.exits:
                view.exits_sort = sort or view.exits_sort
            else:
                view.sort = sort or view.sort
            if not live:
                _print(sampler, signals, view, delay, iterations)
                return
            with Screen(signals, _KEYS, _SCREEN, alternate=not _CONSOLE.match(term)) as screen:
                _Live(sampler, screen, view).run(signals, delay, iterations)


def look(width: int, height: int | None, environment: Mapping[str, str], encoding: str) -> Look:
    """What a terminal, or (without a height) a pipe, can show with this environment and output encoding."""
    from tracer.live.table import Look

    term = environment.get("TERM", "")
    locale = next((value for name in ("LC_ALL", "LC_CTYPE", "LANG") if (value := environment.get(name))), "")
    unicode = all("utf8" in text.lower().replace("-", "") for text in (locale, encoding))
    live = height is not None
    return Look(
        width=width,
        height=height,
        ascii=not unicode or bool(live and _CONSOLE.match(term)),
        styles=live,
        colors=live and not environment.get("NO_COLOR") and not _NO_COLOR.match(term),
    )


def environment() -> Mapping[str, str]:
    """The environment of this process, but with its original locale.

    Python sets LC_CTYPE to UTF-8 if the locale is "C" (PEP 538), but the terminal may not support it: bytes of it may
    even be control characters there.
    """
    try:
        initial = Path("/proc/self/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return os.environ
    locale = dict(pair.split("=", 1) for pair in initial if pair.startswith(("LC_CTYPE=", "LC_ALL=", "LANG=")))
    return {**{name: value for name, value in os.environ.items() if name != "LC_CTYPE"}, **locale}


def host() -> str:
    """The names of this host and its kernel."""
    uname = os.uname()
    return f"{uname.nodename[:40]} {uname.release}"


def _ticks(sampler: Sampler, signals: Signals, delay: float, iterations: int | None) -> Iterator[float | None]:
    """Yields how many seconds to wait, or None when an interval has passed; ends with the last interval."""
    due = time.monotonic() + delay
    passed = 0
    while not signals.ended:
        left = due - time.monotonic()
        if left > 0:
            yield min(left, FOLLOW_SECONDS)
            sampler.follow()
            continue
        sampler.take()
        yield None
        passed += 1
        if passed == iterations:
            return
        # If reading takes longer than the interval, still leave a pause.
        due = max(due + delay, time.monotonic() + delay / 2)


def _print(sampler: Sampler, signals: Signals, view: View, delay: float, iterations: int | None) -> None:
    """Print frames one after another."""
    from tracer.live.view import lines

    for wait in _ticks(sampler, signals, delay, iterations):
        if wait is None:
            terminal = look(columns(), None, environment(), sys.stdout.encoding)
            click.echo("\n".join([*lines(sampler.sample, view, terminal, host()), ""]))
            sys.stdout.flush()
        else:
            signals.wait(wait)


class _Live:
    """A screen with the newest sample, controlled by keys."""

    def __init__(self, sampler: Sampler, screen: Screen, view: View) -> None:
        self._sampler, self._screen, self._view = sampler, screen, view
        self._shown, self._exits = sampler.sample, view.exits
        self._environment, self._host = environment(), host()

    def run(self, signals: Signals, delay: float, iterations: int | None) -> None:
        """Run until a signal, `q`, or the terminal is closed."""
        try:
            self._draw()
            for wait in _ticks(self._sampler, signals, delay, iterations):
                if wait is None:
                    self._refresh()
                    continue
                for key in self._screen.wait(wait):
                    if key == "q":
                        return
                    self._press(key)
                    self._draw()
                if self._sampler.sample.notes != self._shown.notes:
                    self._refresh()
        except OSError:
            if not signals.ended and os.isatty(_SCREEN):
                raise

    def _refresh(self) -> None:
        if not self._view.paused:
            self._shown = self._sampler.sample
            self._draw()

    def _press(self, key: str) -> None:
        view = self._view
        if view.exits and key in _EXIT_SORT_KEYS:
            view.exits_sort, view.offset = _EXIT_SORT_KEYS[key], 0
        elif not view.exits and key in _SORT_KEYS:
            view.sort, view.offset = _SORT_KEYS[key], 0
        elif key == "e" and self._exits:
            view.exits, view.offset = not view.exits, 0
        elif key in _SCROLL:
            view.offset = max(0, view.offset + _SCROLL[key])
        elif key == "b":
            view.level, view.offset = view.level + 1, 0
        elif key == "t":
            view.whole = not view.whole
        elif key in ("?", "h"):
            view.help = not view.help
        elif key == " ":
            view.paused = not view.paused
            if not view.paused:
                self._shown = self._sampler.sample

    def _draw(self) -> None:
        from tracer.live.view import lines

        size = self._screen.size()
        terminal = look(size.columns, size.lines, self._environment, sys.stdout.encoding)
        self._screen.draw(lines(self._shown, self._view, terminal, self._host))
