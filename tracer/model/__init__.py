# SPDX-License-Identifier: GPL-2.0-or-later
"""Plain data and pure functions; this room imports none of the others."""
