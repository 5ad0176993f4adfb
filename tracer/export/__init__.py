# SPDX-License-Identifier: GPL-2.0-or-later
"""Metrics for Prometheus, and the server for them."""
