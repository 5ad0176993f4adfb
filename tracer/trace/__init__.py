# SPDX-License-Identifier: GPL-2.0-or-later
"""Tracing: what is probed, what was counted, across reloads of the module."""
