# SPDX-License-Identifier: GPL-2.0-or-later
"""msrtrace: what KVM does to the MSR bitmaps of its guests, counted on the live host."""
