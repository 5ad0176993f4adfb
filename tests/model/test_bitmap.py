# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the bits of an MSR are in a bitmap: the same for readers in Python and for the BPF program."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from needs import tool

from tracer.model.bitmap import Geometry
from tracer.model.msr_filter import READ, WRITE
from tracer.model.vendor import Vendor
from tracer.model.vendors import VENDORS
from tracer.program.resources import resource

#: bpf/bitmap.h for this process: its bitmap is at an address that is not 0, and it has the values of a vendor.
PROGRAM = """
#include <string.h>
typedef unsigned long long u64; typedef unsigned u32; typedef unsigned char u8;
#define __always_inline inline
#define barrier() asm volatile("" ::: "memory")
#define MSR_TYPE_R 1
#define MSR_TYPE_W 2
#define DIRECT 4
enum { bitmap_offset = 1, cast_type = 0 };
static int msrpm;
#define VALUE(name) (name)
static long read_kernel(void *to, u64 size, u64 from) { memcpy(to, (void *)from, size); return 0; }
static void *(*rdonly_cast)(u64 address, u32 type);
#include "bitmap.h"
/* Whether the bits for FLAGS are set; -1: there are none. */
int intercepted(int of_svm, void *bitmap, u32 msr, int flags)
{
    u64 at;

    msrpm = of_svm;
    at = byte_of((u64)bitmap, msr);
    return at ? bits_at(at, msr, flags) != 0 : -1;
}
"""
EDGES = (
    0,
    0x1FFF,
    0x2000,
    0xBFFFFFFF,
    0xC0000000,
    0xC0001FFF,
    0xC0002000,
    0xC0010000,
    0xC0011FFF,
    0xC0012000,
    0xFFFFFFFF,
)
msrs = st.one_of(
    st.sampled_from(EDGES),
    st.integers(0, 0x2000),
    st.integers(0xC0000000, 0xC0002000),
    st.integers(0xC0010000, 0xC0012000),
    st.integers(0, 0xFFFFFFFF),
)
directions = st.sampled_from([READ, WRITE])
of_vendors = pytest.mark.parametrize("vendor", VENDORS, ids=lambda vendor: vendor.name)


@pytest.fixture(scope="module")
def by_the_program(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    folder = tmp_path_factory.mktemp("bitmap")
    (folder / "bitmap.c").write_text(PROGRAM)
    include = f"-I{Path(str(resource('bpf/bitmap.h'))).parent}"
    subprocess.run(
        [tool("cc"), "-O1", "-shared", "-fPIC", include, "-o", "bitmap.so", "bitmap.c"], cwd=folder, check=True
    )
    return ctypes.CDLL(str(folder / "bitmap.so")).intercepted


@of_vendors
@given(msr=msrs, direction=directions, data=st.data())
def test_the_program_reads_the_same_bit(
    vendor: Vendor, by_the_program: Callable[..., int], msr: int, direction: int, data: st.DataObject
) -> None:
    """One bit is set, its own or that of a neighbour, or all but that one."""
    geometry, svm = vendor.bitmap_geometry, bool(vendor.geometry)
    at = geometry.place(msr, direction)
    alone = (
        data.draw(st.integers(0, geometry.size * 8 - 1)) if at is None else at + data.draw(st.sampled_from([-1, 0, 1]))
    )
    bits = 1 << min(max(alone, 0), geometry.size * 8 - 1)
    for content in (bits, (1 << geometry.size * 8) - 1 - bits):
        bitmap = content.to_bytes(geometry.size, "little")
        found = by_the_program(svm, bitmap, ctypes.c_uint32(msr), direction)
        assert found == (-1 if at is None else geometry.intercepted(bitmap, msr, direction))


def test_known_places() -> None:
    """Of the manuals: Intel SDM vol. 3, MSR-Bitmap Address; AMD APM vol. 2, MSR Intercepts."""
    vmx, svm = (vendor.bitmap_geometry for vendor in VENDORS)
    assert [vmx.place(msr, READ) for msr in (0, 0x1FFF, 0xC0000000)] == [0, 0x1FFF, 0x400 * 8]
    assert [vmx.place(msr, WRITE) for msr in (0, 0xC0001FFF)] == [0x800 * 8, 0x1000 * 8 - 1]
    assert [svm.place(msr, READ) for msr in (0, 0xC0000000, 0xC0010000)] == [0, 0x800 * 8, 0x1000 * 8]
    assert [svm.place(msr, WRITE) for msr in (0, 0xC0011FFF)] == [1, 0x1800 * 8 - 1]
    assert vmx.place(0xC0010000, READ) is None


def test_the_order_of_vendors_is_the_one_that_is_assumed_here() -> None:
    assert [vendor.bitmap_geometry.size for vendor in VENDORS] == [4096, 6144]
    assert [bool(vendor.geometry) for vendor in VENDORS] == [False, True]


@of_vendors
def test_every_bit_belongs_to_one_access(vendor: Vendor) -> None:
    geometry = vendor.bitmap_geometry
    places = [
        geometry.place(first + number, direction)
        for first, _ in geometry.areas
        for number in range(0x2000)
        for direction in (READ, WRITE)
    ]
    assert sorted(place for place in places if place is not None) == list(range(geometry.size * 8))


@of_vendors
@given(clear=st.sets(st.tuples(msrs, directions), max_size=20))
def test_what_passes_is_what_is_not_intercepted(vendor: Vendor, clear: set[tuple[int, int]]) -> None:
    geometry = vendor.bitmap_geometry
    there = {(msr, direction) for msr, direction in clear if geometry.place(msr, direction) is not None}
    content = (1 << geometry.size * 8) - 1 - sum(1 << (geometry.place(*access) or 0) for access in there)
    bitmap = content.to_bytes(geometry.size, "little")
    for direction in (READ, WRITE):
        assert list(geometry.passed(bitmap, direction)) == sorted(msr for msr, one in there if one == direction)
        assert not any(geometry.intercepted(bitmap, msr, direction) for msr, one in there if one == direction)
        for msr, _ in clear:
            assert geometry.intercepted(bitmap, msr, direction) == ((msr, direction) not in there)


@of_vendors
def test_without_a_bitmap_every_access_exits(vendor: Vendor) -> None:
    geometry: Geometry = vendor.bitmap_geometry
    assert geometry.intercepted(b"", 0x10, READ)
    assert list(geometry.passed(b"", READ)) == []
    assert list(geometry.passed(bytes(geometry.size), WRITE))[-1] == geometry.areas[-1][0] + 0x1FFF
