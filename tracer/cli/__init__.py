# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line, with one file for each command."""
