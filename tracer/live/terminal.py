# SPDX-License-Identifier: GPL-2.0-or-later
"""A terminal that is drawn on and gives keys, and the signals that go with it; all is put back on every way out."""

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
from typing import Any, Self

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_OF_TERMINALS = (signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH)

# CSI and SS3 sequences of ECMA-48, by which cursor keys come; then any other byte.
_KEY = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1bO[ -~]|[^\x1b]|\x1b(?=[^\[O])", re.DOTALL)
_SPECIAL = {b"A": "up", b"B": "down", b"5~": "page up", b"6~": "page down"}
_LONGEST_KEY = 32  # bytes; what goes on longer without an end is no key


def _nothing(number: int, at: FrameType | None) -> None:
    """Signals arrive through the file descriptor of `Signals`."""


class Signals:
    """Signals as something to wait for, beside input. What was ignored at the start (by nohup, say) stays so."""

    def __init__(self) -> None:
        self.ended = False  # whether any came that asks for an end

    def __enter__(self) -> Self:
        self._out, self._in = os.pipe()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._before_fd = signal.set_wakeup_fd(self._in, warn_on_full_buffer=False)
        self._before: dict[signal.Signals, signal._HANDLER] = {}
        self.heed(_ENDING)
        return self

    def heed(self, numbers: Iterable[signal.Signals]) -> None:
        """Let `wait` give NUMBERS too."""
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before.setdefault(number, signal.signal(number, _nothing))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before or signal.SIG_DFL)
        signal.set_wakeup_fd(self._before_fd)
        os.close(self._in)
        os.close(self._out)

    def came(self) -> set[int]:
        """The signals since this was asked last."""
        with suppress(BlockingIOError):
            numbers = set(os.read(self._out, 4096))
            self.ended |= bool(numbers & set(_ENDING))
            return numbers
        return set()

    def wait(self, seconds: float, *files: int) -> tuple[set[int], bool]:
        """Wait for a signal, at most SECONDS, or until a file of FILES has input; the signals, and whether one has."""
        ready, _, _ = select.select([self._out, *files], [], [], seconds)
        return self.came(), bool(set(files) & set(ready))


class Screen:
    """A terminal in cbreak mode, drawn on line by line: only those that changed are sent, for serial consoles' sake.

    Needs no more of the terminal than a VT100 has; with ALTERNATE it has another screen, which keeps what was there.
    """

    def __init__(self, signals: Signals, keys: int, screen: int, *, alternate: bool) -> None:
        """KEYS and SCREEN are file descriptors of the terminal."""
        self._signals, self._keys, self._screen, self._alternate = signals, keys, screen, alternate
        self._saved: list[Any] = []
        self._taken = False
        self._lines: list[str] = []
        self._typed = b""

    def __enter__(self) -> Self:
        self._signals.heed(_OF_TERMINALS)
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> None:
        """Take the terminal; again after whatever a shell did to it."""
        while self._in_background():  # as after `bg`: the terminal is the shell's
            if self._signals.ended:
                return
            self._suspend(signal.SIGSTOP)
        with suppress(termios.error):  # it is gone
            if not self._taken:
                self._saved = termios.tcgetattr(self._keys)
            attributes = termios.tcgetattr(self._keys)
            attributes[3] &= ~(termios.ICANON | termios.ECHO)
            attributes[6][termios.VMIN], attributes[6][termios.VTIME] = 1, 0
            termios.tcsetattr(self._keys, termios.TCSADRAIN, attributes)
        self._taken = True
        self.redraw()
        # Wrapping off: a name that is wider than it says stays on its line.
        self._write("\x1b[?1049h" * self._alternate + "\x1b[?25l\x1b[?7l\x1b[H\x1b[2J")

    def _stop(self) -> None:
        """Give the terminal back, once. Nothing that fails here may hide what went before."""
        if not self._taken:
            return
        self._taken = False
        below = "\x1b[?1049l" if self._alternate else f"\x1b[{self.size().lines};1H\n"
        with suppress(OSError):
            self._write(f"\x1b[0m\x1b[?7h\x1b[?25h{below}")
        if self._saved and not self._in_background():  # there, setting it would stop this process
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
        return shutil.get_terminal_size()  # a serial console says 0: COLUMNS and LINES, else 80 and 24

    def redraw(self) -> None:
        """Forget what the terminal shows: `draw` sends every line."""
        self._lines = []

    def draw(self, lines: list[str]) -> None:
        """Show LINES, each of which ends in the style it began with. Raises OSError when the terminal is gone."""
        if self._signals.ended:  # in the background, perhaps, where the terminal is the shell's
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
            except BlockingIOError:  # some other user of the terminal made it so
                select.select([], [self._screen], [])

    def wait(self, seconds: float) -> Iterator[str]:
        """Wait for SECONDS at most: keys, and "redraw" where all must be drawn anew.

        A key is its character, or `up`, `down`, `page up` or `page down`. A terminal that is gone ends the signals.
        """
        came, typed = self._signals.wait(seconds, self._keys)
        if signal.SIGTSTP in came and not self._signals.ended:
            self._stop()
            self._suspend(signal.SIGTSTP)
            came.add(signal.SIGCONT)
        if signal.SIGCONT in came and not self._signals.ended:
            self._start()
        if came & {signal.SIGCONT, signal.SIGWINCH}:
            self.redraw()
            yield "redraw"
        if typed and not self._signals.ended:
            yield from self._read()

    def _suspend(self, number: signal.Signals) -> None:
        """Stop this process by NUMBER until it is continued."""
        if number == signal.SIGTSTP:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        if number == signal.SIGTSTP:
            signal.signal(number, _nothing)
        self._signals.came()

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
