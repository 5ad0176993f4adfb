# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports on many hosts, from what Prometheus stored."""
