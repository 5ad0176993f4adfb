# SPDX-License-Identifier: GPL-2.0-or-later
"""Standard streams that are closed or full."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from tracer.model.errors import MsrtraceError

_OUTPUTS = {"stdout": "standard output", "stderr": "standard error"}


class OutputError(MsrtraceError):
    """A standard stream cannot be written; the reader that has left a pipe is a BrokenPipeError, as elsewhere."""


class _Output(io.FileIO):
    """The file of a standard stream, which raises OutputError."""

    def __init__(self, descriptor: int, title: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._title = title

    def write(self, data: object, /) -> int:
        """As that of FileIO."""
        try:
            return super().write(data)  # type: ignore[arg-type]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write to {self._title}: {error.strerror}") from None


@contextmanager
def guarded_streams() -> Iterator[None]:
    """In this context, standard output and standard error raise OutputError where they cannot be written.

    So does one that this process was started without (`>&-`). Python has None for it, and its number would be that of
    the next file that is opened: a BPF map, say. A stream that failed is discarded at the end.
    """
    before = {name: getattr(sys, name) for name in ("stdin", *_OUTPUTS)}
    for descriptor, name in enumerate(before):
        if before[name] is None:
            _open_unusable(descriptor, for_output=name in _OUTPUTS)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    streams = []
    for descriptor, (name, title) in enumerate(_OUTPUTS.items(), 1):
        stream = _wrapped(_Output(descriptor, title), before[name])
        streams.append(stream)
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for stream in streams:
            try:
                stream.flush()
            except (OutputError, OSError):
                _discard(stream)
        for name, stream in before.items():
            setattr(sys, name, stream)


def _wrapped(file: _Output, before: TextIO | None) -> io.TextIOWrapper:
    """A text stream like the one before, or like Python's default, that writes to a file."""
    encoding = before.encoding if before else None
    errors = before.errors if before else "backslashreplace"
    return io.TextIOWrapper(io.BufferedWriter(file), encoding, errors, line_buffering=file.isatty())


def _open_unusable(descriptor: int, for_output: bool) -> None:
    """Open a descriptor so that neither reading nor writing, whichever it is for, succeeds.

    Commands do not inherit it: for them it is closed, as for this process.
    """
    opened = os.open(os.devnull, os.O_RDONLY if for_output else os.O_WRONLY)
    if opened != descriptor:
        os.dup2(opened, descriptor, inheritable=False)
        os.close(opened)


def _discard(stream: io.TextIOWrapper) -> None:
    """Discard what is left in a stream's buffer; else Python would fail to write it once more when it exits."""
    with suppress(OutputError, OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()
