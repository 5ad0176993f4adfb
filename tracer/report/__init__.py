# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports: making, reading, comparing and showing them."""
