# SPDX-License-Identifier: GPL-2.0-or-later
"""The error that a command shows to its user."""

from __future__ import annotations


class MsrtraceError(Exception):
    """A failure the user can read: one line that says what, why and what to do. The command exits with `status`."""

    status = 1
