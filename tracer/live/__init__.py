# SPDX-License-Identifier: GPL-2.0-or-later
"""The live table of `msrtrace top`."""
