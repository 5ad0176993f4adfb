# SPDX-License-Identifier: GPL-2.0-or-later
"""Which functions of a kernel to probe: found by which symbols exist, never by a version number."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tracer.kernel.symbols import Symbols


@dataclass(frozen=True)
class Layout:
    """The functions that hold KVM's MSR-intercept code in a range of kernels.

    `enable`, `disable` and `set_` take (vcpu, msr, type); `set_` has `bool set` as fourth argument. `update`
    (vcpu) recomputes a vCPU's bitmap; `filter_set` (kvm, filter) is probed where the update function runs for
    other reasons too, so that a new filter can be told from those.
    """

    name: str
    kernels: str
    update: str
    enable: str | None = None
    disable: str | None = None
    set_: str | None = None
    filter_set: str | None = None

    @property
    def calls(self) -> tuple[str, ...]:
        """The functions whose every call is counted."""
        return tuple(f for f in (self.enable, self.disable, self.set_) if f)


_ENABLE, _DISABLE = "vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr"
_SET, _FILTER_SET = "vmx_set_intercept_for_msr", "kvm_vm_ioctl_set_msr_filter"

#: Newest first, in which order they are tried.
LAYOUTS = (
    Layout("recalc", "6.18+", "vmx_recalc_intercepts", set_=_SET, filter_set=_FILTER_SET),
    Layout("set", "6.17", "vmx_recalc_msr_intercepts", set_=_SET, filter_set=_FILTER_SET),
    Layout("toggle", "5.13-6.16", "vmx_msr_filter_changed", enable=_ENABLE, disable=_DISABLE),
    Layout("filter-only", "5.10-5.12", "vmx_msr_filter_changed"),
)


def counted_functions(layout: str) -> frozenset[str]:
    """The functions whose probes make the counts of the layout of that name; without one of them counts are missing.

    Where calls are counted, those are among them that end the time in which the outcome of a call can be read.
    """
    settling = (VCPU_FREE[0], X2APIC_WRITE, *X2APIC_WRITE_CALLERS)
    return frozenset(
        f
        for known in LAYOUTS
        if known.name == layout
        for f in (known.update, *known.calls, *(settling if known.calls else ()))
    )


#: The birth and the end of a vCPU. The second names are those of kernels before 5.19.
VCPU_CREATE = ("vmx_vcpu_create", "vmx_create_vcpu")
VCPU_FREE = ("vmx_vcpu_free", "vmx_free_vcpu")

#: What writes x2APIC bits of the bitmap without a call. A static function; if it was inlined, these two call it.
X2APIC_WRITE = "vmx_update_msr_bitmap_x2apic"
X2APIC_WRITE_CALLERS = ("vmx_set_virtual_apic_mode", "vmx_refresh_apicv_exec_ctrl")

#: Every function that may be probed.
PROBED = tuple(
    dict.fromkeys(
        [f for layout in LAYOUTS for f in (layout.update, *layout.calls, layout.filter_set) if f]
        + [*VCPU_CREATE, *VCPU_FREE, X2APIC_WRITE, *X2APIC_WRITE_CALLERS]
    )
)


def choose(symbols: Symbols) -> Layout | None:
    """The layout of the running kernel, or None if no known function exists.

    The newest layout whose functions are all there; failing that, the newest of which a call can be counted;
    failing that, one of which updates can. `filter_set` does not count: it belongs to kvm, not to kvm_intel.
    """

    def present(function: str) -> bool:
        return bool(symbols.find(function))

    whole = (y for y in LAYOUTS if y.calls and all(map(present, (*y.calls, y.update))))
    some_calls = (y for y in LAYOUTS if any(map(present, y.calls)))
    updates = (y for y in reversed(LAYOUTS) if present(y.update))
    return next(chain(whole, some_calls, updates), None)
