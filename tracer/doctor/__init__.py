# SPDX-License-Identifier: GPL-2.0-or-later
"""What a machine needs for tracing, and how to get what is missing."""
