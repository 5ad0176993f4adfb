# SPDX-License-Identifier: GPL-2.0-or-later
"""The functions of KVM in the running kernel: their names in the source, and their addresses."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path

from tracer.kernel.cpu import Cpu
from tracer.kernel.kallsyms import ADDRESS, bounds, lines_with, loaded_modules, module_of, places_of, rows_of, scan
from tracer.kernel.livepatch import IMAGE, LIVEPATCHES, Livepatch, read_livepatches
from tracer.model.errors import MsrtraceError
from tracer.model.exits import EXIT_FUNCTIONS
from tracer.model.symbol_name import plain_name
from tracer.model.vendor import Vendor
from tracer.model.vendors import FIRST, VENDORS

KALLSYMS = Path("/proc/kallsyms")

#: What kretprobes and the function graph tracer put on the stack in place of a return address.
TRAMPOLINES = {
    "kretprobe_trampoline": ("arch_rethook_trampoline", "__kretprobe_trampoline", "kretprobe_trampoline"),
    "fgraph_trampoline": ("return_to_handler",),
}

#: The module that the vendors' modules share, and a function that shows it is built into the kernel image.
_KVM, _KVM_MARKER = "kvm", "kvm_vcpu_ioctl"

#: Parts of a symbol's name that say it is no function entry: code moved out of a function (`.__part.N`: by Clang's
#: basic-block sections, CONFIG_PROPELLER_CLANG, 6.13+), and a jump to one.
_NO_ENTRY = re.compile(r"\.(cold|cfi_jt|__part)(\.|$)")
_PART = re.compile(r"\.part\.")
#: Symbols that are not functions: padding (CONFIG_CALL_PADDING, CONFIG_CFI_CLANG), and what modpost generates.
_NO_FUNCTION = ("__pfx_", "__cfi_", "__ksymtab")
#: The prefix of SUSE's livepatches for a function that replaces another.
_REPLACEMENT = "klpp_"


_UNKNOWN_END = 1 << 64


def _prefixes() -> list[str]:
    """The vendors' prefixes, and the functions to probe that have none of them: no two find the same line."""
    names = [vendor.prefix for vendor in VENDORS]
    names += [name for vendor in VENDORS for name in (*vendor.probed, *vendor.nested_exit)]
    names += sorted((*EXIT_FUNCTIONS.all, *EXIT_FUNCTIONS.completions.values()))
    return [name for name in names if not any(name.startswith(other) for other in names if other != name)]


#: Where a vCPU's file is released, and what KVM wants is recorded: see Symbols.objects.
VCPU_RELEASE = "kvm_vcpu_release"
_OBJECTS = (VCPU_RELEASE, *(vendor.shadow.list_ for vendor in VENDORS))

#: Beginnings of the names of probed functions and of _OBJECTS, and the names of the trampolines.
_NAMED = (
    *(f" {name}".encode() for name in _OBJECTS),
    *dict.fromkeys(f" {name}".encode() for name in _prefixes()),
    *(f" {name}\n".encode() for names in TRAMPOLINES.values() for name in names),
)


@dataclass(frozen=True, slots=True)
class Symbol:
    """A function in the running kernel. `address` is 0 where addresses are hidden from this process."""

    address: int
    name: str
    module: str | None

    @property
    def function(self) -> str:
        """The name in the source."""
        return plain_name(self.name)

    @property
    def is_entry(self) -> bool:
        """Whether the function is entered here, unlike a part of it that was moved out."""
        return not _NO_ENTRY.search(self.name)

    @property
    def full_name(self) -> str:
        """The name with its module, as the kernel's tracers take it: `module:name`."""
        return f"{self.module}:{self.name}" if self.module else self.name

    @property
    def place(self) -> str:
        """The name and the module, as in /proc/kallsyms: `name [module]`."""
        return f"{self.name} [{self.module}]" if self.module else self.name


@dataclass(frozen=True)
class _Image:
    """Every symbol of the kernel image, if KVM is built in: 100,000, so they are kept as text.

    `text` has the lines in the order of addresses; `offsets` is where each begins, and where the last one ends.
    """

    text: bytes
    offsets: array[int]

    @classmethod
    def read(cls, kallsyms: Path) -> _Image:
        with kallsyms.open("rb") as file:
            rows = sorted(line for line in file if b"\t[" not in line)
        return cls(b"".join(rows), array("I", [0, *accumulate(map(len, rows))]))

    def has(self, function: str) -> bool:
        return _has(lines_with(f" {function}".encode(), self.text), function)

    def containing(self, address: int) -> Symbol | None:
        def key(row: int) -> bytes:
            return self.text[self.offsets[row] : self.offsets[row] + ADDRESS]

        end = bisect_right(range(len(self.offsets) - 1), f"{address:016x}".encode(), key=key)
        if not end or not int(key(end - 1), 16):
            return None
        start = bisect_left(range(end), key(end - 1), key=key)
        functions = _functions(self.text[self.offsets[start] : self.offsets[end]].splitlines())
        return functions[-1] if functions else None


@dataclass(frozen=True)
class Symbols:
    """The functions of kvm and of a vendor's module in the running kernel, in the order of their addresses."""

    functions: tuple[Symbol, ...]
    #: the vendor's module, or None if the functions are part of the kernel image itself
    module: str | None = FIRST.module
    #: the vendor of the functions; FIRST if there are none
    vendor: Vendor = FIRST
    #: the addresses of the TRAMPOLINES that the kernel has
    trampolines: Mapping[str, int] = field(default_factory=dict)
    #: where VCPU_RELEASE (of kvm) and Shadow.list_ are; an empty range has a start, but no known end
    objects: Mapping[str, range] = field(default_factory=dict)
    #: functions of livepatches of KVM, and of other modules with names like those that are probed
    others: tuple[Symbol, ...] = ()
    #: livepatches that replace functions of KVM
    livepatches: tuple[Livepatch, ...] = ()
    # Where addresses are visible: the sorted starts of the functions and the others, and their ends.
    _starts: tuple[int, ...] = field(default=(), repr=False)
    _ends: tuple[int, ...] = field(default=(), repr=False)
    _placed: tuple[Symbol, ...] = field(default=(), repr=False)
    _image: _Image | None = field(default=None, repr=False)

    @classmethod
    def read(cls, kallsyms: Path = KALLSYMS, livepatches: Path = LIVEPATCHES) -> Symbols:
        """Read /proc/kallsyms, and /proc/modules next to it. Raises MsrtraceError if the former cannot be read."""
        try:
            with kallsyms.open("rb") as file:
                named, listed = scan(file, _NAMED)
            in_image = [row for row in named if b"\t[" not in row]
            vendor, own = _vendor(listed, in_image, kallsyms.with_name("cpuinfo"))
            rows = {vendor.module: own, _KVM: rows_of(_KVM, listed)}
            image = None
            if not own and _has(in_image, vendor.marker):  # CONFIG_KVM_INTEL=y
                image = _Image.read(kallsyms)
                rows = {}
            elif own and not rows[_KVM]:
                found = _Image.read(kallsyms)
                image = found if found.has(_KVM_MARKER) else None  # CONFIG_KVM=y, CONFIG_KVM_INTEL=m
        except OSError as error:
            raise MsrtraceError(f"cannot read {kallsyms}: {error.strerror}") from None
        objects = {*rows} | ({IMAGE} if image else set())
        patches = tuple(patch for patch in read_livepatches(livepatches) if patch.functions(objects))
        strangers = {*map(module_of, named), *(patch.module for patch in patches)} - {None, *rows}
        strange = {stranger: rows_of(stranger, listed) for stranger in sorted(map(str, strangers))}
        modules = loaded_modules(kallsyms.with_name("modules"))
        symbols = cls.of(
            _functions(chain(*rows.values(), in_image if image else ())),
            module=vendor.module if rows or not image else None,
            vendor=vendor,
            others=_functions(chain(*strange.values(), () if image else in_image)),
            bounds=bounds(rows | strange, listed, modules),
            ends=modules,
            image=image,
        )
        trampolines, places = _trampolines(in_image), places_of(named, listed, _OBJECTS, (_KVM, vendor.module))
        return replace(symbols, trampolines=trampolines, livepatches=patches, objects=places)

    @classmethod
    def of(
        cls,
        functions: Iterable[Symbol],
        module: str | None = FIRST.module,
        *,
        vendor: Vendor = FIRST,
        others: Iterable[Symbol] = (),
        bounds: Iterable[int] = (),
        ends: Mapping[str, range] | None = None,
        image: _Image | None = None,
    ) -> Symbols:
        """Symbols from functions in any order. A function ends where the next begins, or where its module ends.

        :param functions: KVM's own
        :param others: of other modules
        :param bounds: further addresses at which something begins
        :param ends: the address ranges of modules, if known
        :param image: the symbols of the kernel image, if it has KVM
        """
        own, strange = (tuple(sorted(found, key=lambda s: (s.address, s.name))) for found in (functions, others))
        there = [*(s for s in strange if s.module), *(s for s in own if s.module or not image)]
        there = [s for s in there if s.address]
        there.sort(key=lambda s: s.address)  # of two at one address KVM's own comes last, and wins
        starts = tuple(symbol.address for symbol in there)
        edges = sorted({*starts, *bounds})
        found = tuple(_end(symbol, edges, ends or {}) for symbol in there)
        return cls(own, module, vendor, others=strange, _starts=starts, _ends=found, _placed=tuple(there), _image=image)

    def find(self, function: str) -> list[Symbol]:
        """The symbols that can be probed for a function, the best first.

        The function itself if it has a symbol, else its clones, whole ones before those that lack their beginning
        (`.part.0`). All are KVM's own; those of the vendor's module come before those of kvm or the kernel image.
        """
        named = self._named(plain_name(function))
        return [s for s in named if s.name == function] or [s for s in named if s.function == function]

    def first_of(self, functions: Sequence[str]) -> str:
        """Of functions that stand for each other in different kernels, the first that is there; else the first."""
        return next((function for function in functions if self.find(function)), functions[0])

    def body(self, function: str) -> list[Symbol]:
        """As `find`, but where a compiler has split the function, the part with its body comes first.

        Callers may have its beginning inlined and call that part directly (vmx_recalc_msr_intercepts.part.0, 6.17). For
        functions whose only argument is used, so that the part has the same.
        """
        named = self._named(plain_name(function))
        return [s for s in named if s.name.startswith(f"{function}.part.")] or self.find(function)

    def copies(self, function: str) -> list[Symbol]:
        """The symbols of that function name that are not KVM's own: in a livepatch, say."""
        return [s for s in self.others if s.is_entry and function in (s.function, _replaced(s))]

    def namesakes(self, symbol: Symbol) -> list[Symbol]:
        """Other known symbols with exactly the same name as one of KVM's own."""
        found = [s for s in (*self._named(symbol.function), *self.others) if s.name == symbol.name]
        found.remove(symbol)  # once: where addresses are hidden, two may look alike
        return found

    def containing(self, address: int) -> Symbol | None:
        """The function that contains the address, KVM's own or one of `others`. None if unknown or hidden."""
        at = bisect_right(self._starts, address) - 1
        if at >= 0 and address < self._ends[at]:
            return self._placed[at]
        return self._image.containing(address) if self._image else None

    def caller(self, address: int) -> tuple[str, str]:
        """The caller with that return address: its symbol to show, and its function in KVM's source.

        The symbol has its module if that is not KVM's; where it is unknown, the address in hex stands for it. The
        function is "" if it is not KVM's; a livepatch's function stands for the one that it replaces.
        """
        symbol = self.containing(address)
        if symbol is None:
            return hex(address), ""
        if symbol.module in self._homes:
            return symbol.name, symbol.function
        return symbol.place, self._replaced_by(symbol)

    def _replaced_by(self, symbol: Symbol) -> str:
        """The function of KVM that a symbol of another module replaces or is a copy of, or ""."""
        patches = [patch for patch in self.livepatches if patch.module == symbol.module]
        replaced = {function for patch in patches for function in self._replaced_by_patch(patch)}
        names = (symbol.function, _replaced(symbol)) if patches else ()
        return next((name for name in names if name in replaced or name in self._by_name), "")

    def replacing(self, function: str) -> list[Livepatch]:
        """The livepatches that replace the function, enabled or not."""
        return [patch for patch in self.livepatches if function in self._replaced_by_patch(patch)]

    def held_by(self, module: str) -> set[str]:
        """The functions of KVM of which another module has copies, by name."""
        names = (name for s in self.others if s.module == module for name in (s.function, _replaced(s)))
        return {name for name in names if name in self._by_name}

    def _replaced_by_patch(self, patch: Livepatch) -> set[str]:
        objects = {home or IMAGE for home in self._homes}
        return {plain_name(function) for function in patch.functions(objects)}

    @cached_property
    def _homes(self) -> set[str | None]:
        return {symbol.module for symbol in self.functions} | ({None} if self._image else set())

    @cached_property
    def _by_name(self) -> dict[str, list[Symbol]]:
        result: dict[str, list[Symbol]] = {}
        for symbol in self.functions:
            result.setdefault(symbol.function, []).append(symbol)
        return result

    def _named(self, function: str) -> list[Symbol]:
        """KVM's own symbols of that plain name that can be probed, the best first."""
        order = {self.vendor.module: 0, _KVM: 1}
        found = (s for s in self._by_name.get(function, ()) if s.is_entry)
        return sorted(found, key=lambda s: (order.get(s.module or "", 2), bool(_PART.search(s.name)), s.address))


def _replaced(symbol: Symbol) -> str:
    return symbol.function.removeprefix(_REPLACEMENT)


def _end(symbol: Symbol, edges: Sequence[int], ends: Mapping[str, range]) -> int:
    following = bisect_right(edges, symbol.address)
    end = edges[following] if following < len(edges) else _UNKNOWN_END
    of_module = ends.get(symbol.module or "")
    return min(end, of_module.stop) if of_module and symbol.address in of_module else end


def _vendor(listed: list[bytes], in_image: list[bytes], cpuinfo: Path) -> tuple[Vendor, list[bytes]]:
    """The vendor whose module is loaded, with its lines; else the one whose functions are in the image, else FIRST.

    A kernel image may have several vendors' functions; those that run are of the one whose flag the CPU has.
    """
    for vendor in VENDORS:
        if rows := rows_of(vendor.module, listed):
            return vendor, rows
    found = [vendor for vendor in VENDORS if _has(in_image, vendor.marker)]
    if len(found) > 1:
        with suppress(OSError):
            flags = Cpu.read(cpuinfo).flags
            found.sort(key=lambda vendor: vendor.cpu_flag not in flags)
    return next(iter(found), FIRST), []


def _has(rows: Iterable[bytes], function: str) -> bool:
    return any(s.function == function and s.is_entry for s in _functions(rows))


def _functions(rows: Iterable[bytes]) -> list[Symbol]:
    found = []
    for row in rows:
        address, kind, name, *rest = row.decode(errors="replace").split()
        if kind in "tTwW" and not name.startswith(_NO_FUNCTION):
            found.append(Symbol(int(address, 16), name, rest[0].strip("[]") if rest else None))
    return found


def _trampolines(image: Iterable[bytes]) -> dict[str, int]:
    found = {symbol.name: symbol.address for symbol in _functions(image)}
    return {kind: found[name] for kind, names in TRAMPOLINES.items() for name in names if name in found}
