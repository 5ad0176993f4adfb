# SPDX-License-Identifier: GPL-2.0-or-later
"""What differs between the two kinds of hardware virtualisation, as the type of a table: vmx.py is one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from tracer.model.cause import OTHER
from tracer.model.symbol_name import plain_name


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

    @property
    def functions(self) -> tuple[str, ...]:
        """All of them; those whose calls are counted come first."""
        return tuple(f for f in (*self.calls, self.update, self.filter_set) if f)


@dataclass(frozen=True)
class Vendor:
    """One kind of hardware virtualisation and the KVM module that drives it. Nothing else in the code names either."""

    name: str
    #: What CPUs call it: in the flags of /proc/cpuinfo, and in words.
    cpu_flag: str
    cpu_feature: str
    #: What a user can do whose CPU has it, but not the flag.
    firmware_fix: str
    module: str
    #: The module's file below /lib/modules, and the option that builds it.
    module_file: str
    config_option: str
    #: Parameters of the module that change which MSRs are passed through, and how often that changes.
    parameters: tuple[str, ...]
    #: What the names of the module's functions begin with, and one that says that the kernel image has them.
    prefix: str
    marker: str
    #: Newest first, in which order they are tried.
    layouts: tuple[Layout, ...]
    #: The birth and the end of a vCPU, by any of these names.
    vcpu_create: tuple[str, ...]
    vcpu_free: tuple[str, ...]
    #: What writes bits of the bitmap without a call: a static function and, if it was inlined, what calls it.
    direct_write: str
    direct_write_callers: tuple[str, ...]
    #: Structure and member, one inside the other from the vCPU on, to the address of its bitmap.
    bitmap: tuple[tuple[str, str], ...]
    #: Who calls, as regular expressions of whole names, and why; the first match counts.
    callers: tuple[tuple[str, str], ...]

    @property
    def module_name(self) -> str:
        """As modprobe and the files of /lib/modules have it."""
        return self.module_file.removesuffix(".ko")

    @cached_property
    def _callers(self) -> tuple[tuple[re.Pattern[str], str], ...]:
        return tuple((re.compile(pattern), cause) for pattern, cause in self.callers)

    def cause_of(self, function: str) -> str:
        """The cause that a call by FUNCTION of KVM stands for, whatever a compiler has added to its name."""
        name = plain_name(function)
        return next((cause for pattern, cause in self._callers if pattern.fullmatch(name)), OTHER)

    @property
    def probed(self) -> tuple[str, ...]:
        """Every function that may be probed."""
        layouts = [f for one in self.layouts for f in (one.update, *one.calls, one.filter_set) if f]
        others = (*self.vcpu_create, *self.vcpu_free, self.direct_write, *self.direct_write_callers)
        return tuple(dict.fromkeys([*layouts, *others]))

    def layout(self, name: str) -> Layout | None:
        """The layout of that NAME, if it is known."""
        return next((layout for layout in self.layouts if layout.name == name), None)

    def counted_functions(self, layout: str) -> frozenset[str]:
        """The functions whose probes make the counts of LAYOUT, a name; without one of them counts are missing.

        Where calls are counted, those are among them that end the time in which the outcome of a call can be read.
        """
        known = self.layout(layout)
        if known is None:
            return frozenset()
        settling = (self.vcpu_free[0], self.direct_write, *self.direct_write_callers) if known.calls else ()
        return frozenset((known.update, *known.calls, *settling))
