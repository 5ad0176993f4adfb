"""Which functions of a kernel to probe: found by which symbols exist, never by a version number."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from tracer.errors import MsrtraceError

KALLSYMS = Path("/proc/kallsyms")

#: What the compiler appends to the name of a copy it made of a function.
_CLONE = re.compile(r"\.(isra|constprop|part|cold)\.?\d*(\..*)?$")


@dataclass(frozen=True, slots=True)
class Symbol:
    """A function in the running kernel. `address` is 0 where the reader may not see addresses."""

    address: int
    name: str
    module: str | None

    @property
    def function(self) -> str:
        """The name in the source: without the suffix of a clone."""
        return _CLONE.sub("", self.name)


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

#: What a tracer of returns or of the function graph leaves on the stack in the place of a return address.
TRAMPOLINES = {
    "kretprobe_trampoline": ("arch_rethook_trampoline", "__kretprobe_trampoline", "kretprobe_trampoline"),
    "fgraph_trampoline": ("return_to_handler",),
}

_IMAGE_FUNCTION = b" vmx_vcpu_run\n"
_WANTED = (
    b"\t[kvm_intel]\n",
    b"\t[kvm]\n",
    *(f" {name}\n".encode() for names in TRAMPOLINES.values() for name in names),
    _IMAGE_FUNCTION,
)
_CHUNK = 1 << 20  # bytes; all of them are 20 MB


def _lines_with(ends: Iterable[bytes], file: BinaryIO) -> list[bytes]:
    """The lines of a file that end so. There are 200,000, so none is looked at for itself."""
    found: list[bytes] = []
    rest = b""
    while chunk := file.read(_CHUNK):
        whole, newline, following = (rest + chunk).rpartition(b"\n")
        lines, rest = whole + newline, following
        for end in ends:
            at = lines.find(end)
            while at >= 0:
                found.append(lines[lines.rfind(b"\n", 0, at) + 1 : at + len(end)])
                at = lines.find(end, at + 1)
    return found


@dataclass(frozen=True)
class Symbols:
    """The functions of kvm and kvm_intel in the running kernel, in the order of their addresses."""

    functions: tuple[Symbol, ...]
    #: kvm_intel, or None if the functions are part of the kernel image itself
    module: str | None = "kvm_intel"
    #: the addresses of those of TRAMPOLINES that the kernel has
    trampolines: Mapping[str, int] = field(default_factory=dict)
    _addresses: tuple[int, ...] = field(default=(), repr=False)

    @classmethod
    def read(cls, kallsyms: Path = KALLSYMS) -> Symbols:
        """Read /proc/kallsyms. Raises MsrtraceError if it cannot be read."""
        try:
            with kallsyms.open("rb") as file:
                rows = _lines_with(_WANTED, file)
            module: str | None = "kvm_intel"
            modular = any(row.endswith(b"[kvm_intel]\n") for row in rows)
            if not modular and any(row.endswith(_IMAGE_FUNCTION) for row in rows):
                # Built in (CONFIG_KVM_INTEL=y): the functions are among those of the kernel image.
                with kallsyms.open("rb") as image:
                    rows, module = [line for line in image if b"\t[" not in line], None
        except OSError as error:
            raise MsrtraceError(f"cannot read {kallsyms}: {error.strerror}") from None
        found = list(_functions(rows))
        trampolines = {
            kind: s.address for kind, names in TRAMPOLINES.items() for s in found if not s.module and s.name in names
        }
        return replace(cls.of((s for s in found if s.module or not module), module), trampolines=trampolines)

    @classmethod
    def of(cls, functions: Iterable[Symbol], module: str | None = "kvm_intel") -> Symbols:
        """Symbols from FUNCTIONS in any order."""
        ordered = tuple(sorted(functions, key=lambda s: (s.address, s.name)))
        return cls(ordered, module, _addresses=tuple(s.address for s in ordered))

    def find(self, function: str) -> list[Symbol]:
        """The function itself if it has a symbol, else its clones: what a probe on FUNCTION can sit on."""
        exact = [s for s in self.functions if s.name == function]
        clones = (s for s in self.functions if s.name.startswith(function) and ".cold" not in s.name)
        return exact or [s for s in clones if s.function == function]

    def containing(self, address: int) -> Symbol | None:
        """The function that ADDRESS lies in: the nearest at or below it. None if addresses are hidden (0)."""
        at = bisect.bisect_right(self._addresses, address)
        return self.functions[at - 1] if at and self._addresses[at - 1] else None


def _functions(rows: Iterable[bytes]) -> Iterable[Symbol]:
    for row in rows:
        address, kind, name, *rest = row.decode(errors="replace").split()
        if kind in "tTwW" and not name.startswith(("__pfx_", "__ksymtab")):
            yield Symbol(int(address, 16), name, rest[0].strip("[]") if rest else None)


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
