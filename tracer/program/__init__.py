# SPDX-License-Identifier: GPL-2.0-or-later
"""BPF programs: compiled, loaded and attached; and their maps."""
