# SPDX-License-Identifier: GPL-2.0-or-later
"""The entry point. While the command line is imported, and once it has ended, Ctrl-C kills without a traceback."""

from __future__ import annotations

import signal
import sys

_INTERRUPTED = 128 + signal.SIGINT  # as shells have it


def main() -> None:
    """Run the command line."""
    raises_it = _left_to_the_kernel()
    from tracer.cli.main import main as run

    if raises_it:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run()
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    finally:
        _left_to_the_kernel()


def _left_to_the_kernel() -> bool:
    """Let SIGINT kill this process where Python would raise KeyboardInterrupt; whether it would have."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return True


if __name__ == "__main__":
    main()
