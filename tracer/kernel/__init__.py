# SPDX-License-Identifier: GPL-2.0-or-later
"""The running kernel, as /proc and /sys describe it."""
