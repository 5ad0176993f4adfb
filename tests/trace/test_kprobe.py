# SPDX-License-Identifier: GPL-2.0-or-later
"""Which function a kprobe sits on, in kernels that take names differently."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.kernel.symbols import Symbol, Symbols
from tracer.program.bcc_library import FunctionRefused
from tracer.trace.kprobe import attach_kprobe

HOOK = "vmx_msr_filter_changed"
KVM_INTEL, IMAGE = Symbol(0xB00010, HOOK, "kvm_intel"), Symbol(0x100010, HOOK, None)
KPATCH, TWIN = Symbol(0xD00010, HOOK, "kpatch_x"), Symbol(0x200010, HOOK, None)


class Kernel:
    """What create_local_trace_kprobe() and kallsyms_lookup_name() make of a name, by what a kernel does with it.

    COUNTS: it refuses names that several functions have. QUALIFIED: it takes MODULE:NAME.
    """

    def __init__(self, functions: list[Symbol], *, counts: bool, qualified: bool) -> None:
        self.functions, self.counts, self.qualified = functions, counts, qualified
        self.probed: list[Symbol] = []
        self.asked: list[str | int] = []

    def attach(self, program: int, function: str, address: int, *, at_return: bool) -> int:
        assert (program, at_return) == (5, True)
        assert bool(function) != bool(address)
        self.asked.append(function or address)
        self.probed = [self._of_name(function) if function else next(s for s in self.functions if s.address == address)]
        return 7

    def _of_name(self, name: str) -> Symbol:
        module, colon, function = name.rpartition(":")
        if colon and not self.qualified:
            raise FunctionRefused(errno.EINVAL, "no such function")
        found = [s for s in self.functions if s.name == function and (not colon or s.module == module)]
        if self.counts and len(found) > 1:
            raise FunctionRefused(errno.EINVAL, "several functions")
        found.sort(key=lambda s: (s.module is not None, -s.address))  # the image first, then the latest module
        if not found:
            raise FunctionRefused(errno.EINVAL, "no such function")
        return found[0]


def hidden(symbol: Symbol) -> Symbol:
    return Symbol(0, symbol.name, symbol.module)


KERNELS = {
    "6.1": {"counts": False, "qualified": True},
    "6.8": {"counts": True, "qualified": False},
    "6.12": {"counts": True, "qualified": True},
    "none that is known": {"counts": False, "qualified": False},
}


@pytest.mark.parametrize(
    ("kernel", "functions", "addresses", "asked"),
    [
        ("6.1", [KVM_INTEL, KPATCH], True, [f"kvm_intel:{HOOK}"]),
        ("6.12", [KVM_INTEL, KPATCH], True, [f"kvm_intel:{HOOK}"]),
        ("6.12", [KVM_INTEL, KPATCH], False, [f"kvm_intel:{HOOK}"]),
        ("6.8", [KVM_INTEL, KPATCH], True, [f"kvm_intel:{HOOK}", 0xB00010]),
        ("6.8", [KVM_INTEL], False, [f"kvm_intel:{HOOK}", HOOK]),
        ("6.1", [IMAGE, KPATCH], False, [HOOK]),
        ("6.12", [IMAGE, KPATCH], True, [HOOK, 0x100010]),
        ("6.1", [IMAGE, TWIN], True, [0x100010]),
        ("6.12", [IMAGE], False, [HOOK]),
    ],
)
def test_how_the_kernel_is_asked(
    monkeypatch: pytest.MonkeyPatch, kernel: str, functions: list[Symbol], addresses: bool, asked: list[str | int]
) -> None:
    there = Kernel(functions, **KERNELS[kernel])
    monkeypatch.setattr("tracer.program.bcc_library.attach_kprobe", there.attach)
    seen = functions if addresses else list(map(hidden, functions))
    own, others = ([s for s in seen if (s.module == seen[0].module) == same] for same in (True, False))
    symbols = Symbols.of(own, seen[0].module, others=others)
    assert attach_kprobe(seen[0], symbols, 5, at_return=True) == 7
    assert (there.probed, there.asked) == ([functions[0]], asked)


@given(
    kernel=st.sampled_from([*KERNELS]),
    own=st.sampled_from([[KVM_INTEL], [IMAGE], [IMAGE, TWIN]]),
    others=st.sets(st.sampled_from([KPATCH, Symbol(0xE00010, HOOK, "kpatch_y"), Symbol(0xF00010, "vmx_x", "z")])),
    addresses=st.booleans(),
)
def test_nothing_else_of_that_name_is_probed(
    kernel: str, own: list[Symbol], others: set[Symbol], addresses: bool
) -> None:
    there = Kernel([*own, *others], **KERNELS[kernel])
    see: Callable[[Symbol], Symbol] = (lambda s: s) if addresses else hidden
    symbols = Symbols.of(map(see, own), own[0].module, others=map(see, others))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tracer.program.bcc_library.attach_kprobe", there.attach)
        try:
            attach_kprobe(see(own[0]), symbols, 5, at_return=True)
        except OSError as error:
            refusal: int | None = error.errno
        else:
            refusal = None
    if refusal is None:
        assert there.probed == own[:1]
    else:
        assert refusal in (errno.EINVAL, errno.EADDRNOTAVAIL)
        assert not addresses


def test_another_refusal_is_not_talked_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def attach(*_: object, **__: object) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("tracer.program.bcc_library.attach_kprobe", attach)
    with pytest.raises(PermissionError):
        attach_kprobe(KVM_INTEL, Symbols.of([KVM_INTEL]), 5, at_return=False)
