# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine that a report or a state is of, and in what two of them differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from tracer.model.sanitized import Sanitized, Text
from tracer.model.vendors import FIRST, VENDORS, vendor_named

#: Limits of a file. The tracer counts 2,048 kinds of calls, or 65,536 kinds of calls and VMs with --by-vm.
ROWS, NOTES = 20_000, 256
VendorName = Annotated[str, Meta(pattern=f"^({'|'.join(vendor.name for vendor in VENDORS)})$")]
_Parameters = Annotated[dict[Text, Text], Meta(max_length=256)]

if TYPE_CHECKING:
    _Modules = Sanitized
else:
    #: A field for the parameters of each vendor's module, named like the module; all but one of them are absent.
    _Modules = msgspec.defstruct(
        "_Modules",
        [(vendor.module, _Parameters | UnsetType, UNSET) for vendor in VENDORS],
        bases=(Sanitized,),
        frozen=True,
        kw_only=True,
    )


class Computer(_Modules, frozen=True, kw_only=True):
    """A machine: `name`, `kernel` and `version` are uname(2)'s nodename, release and version.

    `cpu` is /proc/cpuinfo's model name. Reports without `vendor` are from versions of msrtrace that knew only one, and
    older ones have no `name`.
    """

    vendor: VendorName = FIRST.name
    name: Text = ""
    kernel: Text
    version: Text = ""
    cpu: Text = ""

    @property
    def title(self) -> str:
        """The kind of hardware virtualisation, for people."""
        return vendor_named(self.vendor).title

    @property
    def module(self) -> str:
        """The name of KVM's module."""
        return vendor_named(self.vendor).module

    @property
    def module_parameters(self) -> dict[str, str]:
        """The parameters of KVM's module."""
        found: dict[str, str] = getattr(self, self.module) or {}
        return found


def parameters_field(vendor: str, parameters: dict[str, str]) -> dict[str, Any]:
    """The argument of Computer for the parameters of the module of the vendor of that name."""
    return {vendor_named(vendor).module: parameters}


@dataclass(frozen=True)
class Difference:
    """A property in which the two hosts differ."""

    what: str
    base: str
    new: str


def differing(pairs: list[tuple[str, str, str]]) -> list[Difference]:
    """Those of the properties, each with its value on either side, in which the sides differ."""
    return [Difference(*pair) for pair in pairs if pair[1] != pair[2]]


def machines(one: Computer, other: Computer, *, named: bool) -> list[tuple[str, str, str]]:
    """What the machines are, each property with its value on either side; their names only if `named`."""
    names = [("host", one.name, other.name)] if named else []
    return [
        ("hardware", one.title, other.title),
        *names,
        ("kernel", one.kernel, other.kernel),
        ("version", one.version, other.version),
        ("CPU", one.cpu, other.cpu),
    ]


def parameters(one: Computer, other: Computer) -> list[tuple[str, str, str]]:
    """The parameters of KVM's module on either side; none where the modules are not the same."""
    if one.vendor != other.vendor:
        return []
    base, new = one.module_parameters, other.module_parameters
    names = sorted(base.keys() | new.keys())
    return [(f"{one.module}.{name}", base.get(name, "-"), new.get(name, "-")) for name in names]
