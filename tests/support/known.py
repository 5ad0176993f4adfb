# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel for tests of the BPF program: its functions, its BTF, and its headers as BCC needs them."""

from __future__ import annotations

from pathlib import Path

from cache import BUILD
from hosts import HOSTS, kernel
from needs import checking, missing

from tracer.kernel.btf import Btf
from tracer.kernel.headers import join_headers
from tracer.kernel.symbols import Symbol, Symbols
from tracer.model.vendor import VCPU_CREATED, Layout
from tracer.model.vendors import VENDORS


class KnownBtf(Btf):
    """As kvm_intel's in 6.1.192."""

    def __init__(self) -> None:
        super().__init__(b"\x9f\xeb\x01\x00" + (24).to_bytes(4, "little") + bytes(16))

    def offset(self, structure: str, member: str) -> int:
        offsets = {"vmcs01": 6792, "msr_bitmap": 48, "msrpm": 6936, "kvm": 0, "stat": 5000, "exits": 8}
        return (offsets | {"group_leader": 1416, "comm": 1896, "start_boottime": 1384})[member]

    def function_id(self, name: str) -> int:
        return 1


def symbols(layout: Layout, *without: str) -> Symbols:
    """Functions of 0x100 bytes each, from 0x1000 on."""
    vendor = next(vendor for vendor in VENDORS if layout in vendor.layouts)
    names = [layout.update, *layout.calls, vendor.vcpu_create[0], vendor.vcpu_free[0], *layout.writers]
    names += [layout.filter_set] if layout.filter_set else []
    names.append(VCPU_CREATED)
    there = [name for name in names if name not in without]
    functions = [Symbol(0x1000 + 0x100 * n, name, vendor.module) for n, name in enumerate(there)]
    return Symbols.of(functions, vendor.module, vendor=vendor)


def kernel_of(host: str) -> Path:
    """The unpacked kernel of an emulated host, its headers among it; for `make check` that which was used last."""
    if not checking():
        return kernel(HOSTS[host])
    kernels = BUILD.glob(f"kernel-{HOSTS[host].kernel.name}-{'?' * 12}")
    newest = max(kernels, key=lambda path: path.stat().st_mtime, default=None)
    return newest or missing("the headers of a kernel, which `make test` downloads", "there are none")


def one_tree(packages: Path, tree: Path) -> None:
    """Join Debian's two header packages: of BCC_KERNEL_SOURCE, BCC takes all from one tree (loader.cc)."""
    [common], [generated] = (list(packages.glob(f"linux-headers-*-{part}")) for part in ("common", "amd64"))
    join_headers((common, generated), tree)
