# SPDX-License-Identifier: GPL-2.0-or-later
"""Comparisons of hosts by what Prometheus stores."""
