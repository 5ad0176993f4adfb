# SPDX-License-Identifier: GPL-2.0-or-later
"""The vendors that msrtrace knows; of a kernel, the one whose module it has."""

from __future__ import annotations

from tracer.model.vendor import Layout, Vendor
from tracer.model.vmx import VMX

VENDORS = (VMX,)
#: Whose the counts are that do not say it: those of the versions of msrtrace that knew one vendor alone.
FIRST = VMX


def vendor_named(name: str) -> Vendor:
    """The vendor of that NAME; FIRST if it is not known, as then its layouts are not either."""
    return next((vendor for vendor in VENDORS if vendor.name == name), FIRST)


def layouts() -> tuple[Layout, ...]:
    """All layouts of all vendors."""
    return tuple(layout for vendor in VENDORS for layout in vendor.layouts)
