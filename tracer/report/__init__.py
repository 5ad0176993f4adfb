# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports: made, read, compared and shown."""
