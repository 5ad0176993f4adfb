# SPDX-License-Identifier: GPL-2.0-or-later
"""The vendors that msrtrace supports."""

from __future__ import annotations

from tracer.model.svm import SVM
from tracer.model.vendor import Layout, Vendor
from tracer.model.vmx import VMX

VENDORS = (VMX, SVM)
#: The vendor of counts that do not name one, from versions of msrtrace that knew only this.
FIRST = VMX


def vendor_named(name: str) -> Vendor:
    """The vendor of that name; FIRST if it is unknown, as then its layouts are unknown, too."""
    return next((vendor for vendor in VENDORS if vendor.name == name), FIRST)


def layouts() -> tuple[Layout, ...]:
    """All layouts of all vendors."""
    return tuple(layout for vendor in VENDORS for layout in vendor.layouts)
