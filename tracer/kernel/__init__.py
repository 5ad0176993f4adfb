# SPDX-License-Identifier: GPL-2.0-or-later
"""What the running kernel is like, from /proc and /sys."""
