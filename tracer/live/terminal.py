# SPDX-License-Identifier: GPL-2.0-or-later
"""A terminal to draw on and read keys from, and the signals that go with it; all state is restored on every exit."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import termios
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from tracer.model.text import COLUMNS

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_OF_TERMINALS = (signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH)

# CSI and SS3 sequences of ECMA-48, which cursor keys send; then any other byte.
_KEY = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1bO[ -~]|[^\x1b]|\x1b(?=[^\[O])", re.DOTALL)
_SPECIAL = {b"A": "up", b"B": "down", b"5~": "page up", b"6~": "page down"}
_LONGEST_KEY = 32  # bytes; a longer sequence is not a key


def _nothing(number: int, at: FrameType | None) -> None:
    """Do nothing: signals arrive through the file descriptor of `Signals`."""


class Signals:
    """Signals to wait for, together with input. Those ignored at the start (by nohup, say) stay ignored."""

    def __init__(self) -> None:
        self.ended = False  # whether one of _ENDING has arrived

    def __enter__(self) -> Signals:
        self._out, self._in = os.pipe()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._before_fd = signal.set_wakeup_fd(self._in, warn_on_full_buffer=False)
        self._before: dict[signal.Signals, signal._HANDLER] = {}
        self.add(_ENDING)
        return self

    def add(self, numbers: Iterable[signal.Signals]) -> None:
        """Wait for these signals, too."""
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before.setdefault(number, signal.signal(number, _nothing))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.ended and number in _ENDING else before or signal.SIG_DFL)
        signal.set_wakeup_fd(self._before_fd)
        os.close(self._in)
        os.close(self._out)

    def pending(self) -> set[int]:
        """The signals that arrived since the last call."""
        with suppress(BlockingIOError):
            numbers = set(os.read(self._out, 4096))
            self.ended |= bool(numbers & set(_ENDING))
            return numbers
        return set()

    def wait(self, seconds: float, *files: int) -> tuple[set[int], bool]:
        """Wait at most so many seconds for a signal, or input on a file; the signals, and whether there is input."""
        ready, _, _ = select.select([self._out, *files], [], [], seconds)
        return self.pending(), bool(set(files) & set(ready))


class Screen:
    """A terminal in cbreak mode, drawn line by line: only changed lines are sent, for serial consoles.

    Needs a VT100; with `alternate`, one with an alternate screen, so that the previous content is restored.
    """

    def __init__(self, signals: Signals, keys: int, screen: int, *, alternate: bool) -> None:
        """Draw on the file descriptor `screen`, and read from `keys`."""
        self._signals, self._keys, self._screen, self._alternate = signals, keys, screen, alternate
        self._saved: list[Any] = []
        self._taken = False
        self._lines: list[str] = []
        self._typed = b""

    def __enter__(self) -> Screen:
        self._signals.add(_OF_TERMINALS)
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> None:
        """Set up the terminal; also again, after a shell has changed it."""
        while self._in_background():  # as after `bg`: the terminal is the shell's
            if self._signals.ended:
                return
            self._suspend(signal.SIGSTOP)
        with suppress(termios.error):  # it has been closed
            if not self._taken:
                self._saved = termios.tcgetattr(self._keys)
            attributes = termios.tcgetattr(self._keys)
            attributes[3] &= ~(termios.ICANON | termios.ECHO)
            attributes[6][termios.VMIN], attributes[6][termios.VTIME] = 1, 0
            termios.tcsetattr(self._keys, termios.TCSADRAIN, attributes)
        self._taken = True
        self.redraw()
        # Wrapping off, so that a name wider than computed stays on its line.
        self._write(("\x1b[?1049h" if self._alternate else "") + "\x1b[?25l\x1b[?7l\x1b[H\x1b[2J")

    def _stop(self) -> None:
        """Restore the terminal, once. A failure here must not hide an earlier error."""
        if not self._taken:
            return
        self._taken = False
        below = "\x1b[?1049l" if self._alternate else f"\x1b[{self.size().lines};1H\n"
        with suppress(OSError):
            self._write(f"\x1b[0m\x1b[?7h\x1b[?25h{below}")
        if self._saved and not self._in_background():  # in the background this would stop the process (SIGTTOU)
            with suppress(termios.error):
                termios.tcsetattr(self._keys, termios.TCSADRAIN, self._saved)

    def _in_background(self) -> bool:
        try:
            return os.tcgetpgrp(self._keys) != os.getpgrp()
        except OSError:  # not the terminal of this session, so there is no job control
            return False

    def size(self) -> os.terminal_size:
        """Columns and lines."""
        with suppress(OSError):
            size = os.get_terminal_size(self._screen)
            if size.columns and size.lines:
                return size
        found = shutil.get_terminal_size()  # a serial console says 0, which Python 3.10 passes on
        return os.terminal_size((found.columns or COLUMNS, found.lines or 24))

    def redraw(self) -> None:
        """Make the next `draw` send every line."""
        self._lines = []

    def draw(self, lines: list[str]) -> None:
        """Show lines, each of which resets its style at the end. Raises OSError if the terminal has been closed."""
        if self._signals.ended:  # perhaps in the background, where the terminal is the shell's
            return
        parts = [] if self._lines else ["\x1b[2J"]
        before = self._lines + [""] * (len(lines) - len(self._lines))
        now = lines + [""] * (len(before) - len(lines))
        changed = (row for row, (old, new) in enumerate(zip(before, now, strict=True), 1) if old != new)
        parts += [f"\x1b[{row};1H\x1b[K{now[row - 1]}" for row in changed]
        self._write("".join(parts))
        self._lines = lines

    def _write(self, text: str) -> None:
        left = text.encode("utf-8", "replace")
        while left:
            try:
                left = left[os.write(self._screen, left) :]
            except BlockingIOError:  # another user of the terminal made it non-blocking
                select.select([], [self._screen], [])

    def wait(self, seconds: float) -> Iterator[str]:
        """Wait at most so many seconds; yields keys, and "redraw" when everything must be drawn again.

        A key is its character, or `up`, `down`, `page up` or `page down`. If the terminal is closed, the signals have
        `ended`.
        """
        signals, typed = self._signals.wait(seconds, self._keys)
        if signal.SIGTSTP in signals and not self._signals.ended:
            self._stop()
            self._suspend(signal.SIGTSTP)
            signals.add(signal.SIGCONT)
        if signal.SIGCONT in signals and not self._signals.ended:
            self._start()
        if signals & {signal.SIGCONT, signal.SIGWINCH}:
            self.redraw()
            yield "redraw"
        if typed and not self._signals.ended:
            yield from self._read()

    def _suspend(self, number: signal.Signals) -> None:
        """Stop this process by a signal until it is continued."""
        if number == signal.SIGTSTP:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        if number == signal.SIGTSTP:
            signal.signal(number, _nothing)
        self._signals.pending()

    def _read(self) -> Iterator[str]:
        try:
            typed = os.read(self._keys, 1024)
        except OSError:
            typed = b""
        self._signals.ended |= not typed
        self._typed += typed
        end = 0
        while found := _KEY.match(self._typed, end):
            key, end = found[0], found.end()
            if key == b"\x0c":
                self.redraw()
                yield "redraw"
            elif key[:1] != b"\x1b":
                yield key.decode("ascii", "replace")
            elif key[2:] in _SPECIAL:
                yield _SPECIAL[key[2:]]
        self._typed = self._typed[end:] if len(self._typed) - end < _LONGEST_KEY else b""
