# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks of what tracing needs, with the fix for what is missing."""
