# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages of a ring buffer, made by hand as kernel/trace/ring_buffer.c makes them."""

from __future__ import annotations

import struct

import pytest
from ringbuffer import PAGE, Event, Symbols, events

COMMON = """\
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

"""
FORMATS = f"""\
name: called
ID: 1500
format:
{COMMON}\tfield:unsigned long __probe_ip;\toffset:8;\tsize:8;\tsigned:0;
\tfield:u32 msr;\toffset:16;\tsize:4;\tsigned:0;
\tfield:u8 set;\toffset:20;\tsize:1;\tsigned:0;

print fmt: "(%lx) msr=%u set=%u", REC->__probe_ip, REC->msr, REC->set
name: returned
ID: 1501
format:
{COMMON}\tfield:unsigned long __probe_func;\toffset:8;\tsize:8;\tsigned:0;
\tfield:unsigned long __probe_ret_ip;\toffset:16;\tsize:8;\tsigned:0;

print fmt: "(%lx <- %lx)", REC->__probe_func, REC->__probe_ret_ip
name: kvm_msr
ID: 1502
format:
{COMMON}\tfield:unsigned write;\toffset:8;\tsize:4;\tsigned:0;
\tfield:u32 ecx;\toffset:12;\tsize:4;\tsigned:0;

print fmt: "msr_%s %x", REC->write ? "write" : "read", REC->ecx
"""
KALLSYMS = """\
ffffffffc0001000 t vmx_set_msr\t[kvm_intel]
ffffffffc0001100 t vmx_enable_intercept_for_msr\t[kvm_intel]
ffffffffc0001180 d vmx_data\t[kvm_intel]
"""
TRAMPOLINE = 0xFFFFFFFF81001000


def page(*records: bytes, time: int = 1000, flags: int = 0) -> bytes:
    content = b"".join(records)
    return (struct.pack("<QQ", time, len(content) | flags) + content).ljust(PAGE, b"\0")


def record(data: bytes, delta: int = 0) -> bytes:
    """An event whose length is in its first word."""
    padded = data.ljust(-(-len(data) // 4) * 4, b"\0")
    return struct.pack("<I", delta << 5 | len(padded) // 4) + padded


def called(msr: int, thread: int = 7) -> bytes:
    return struct.pack("<HBBiQIB", 1500, 0, 1, thread, 0xFFFFFFFFC0001100, msr, 1)


def returned(to: int) -> bytes:
    return struct.pack("<HBBiQQ", 1501, 0, 1, 7, 0xFFFFFFFFC0001100, to)


def found(*pages: bytes) -> list[Event]:
    return list(events(pages, FORMATS, KALLSYMS))


def test_an_event_has_the_fields_that_its_format_says() -> None:
    [one] = found(page(record(called(0x174))))
    assert (one.cpu, one.thread, one.name, one.place) == (0, 7, "called", "vmx_enable_intercept_for_msr+0x0")
    assert (one.values["msr"], one.values["set"]) == (0x174, 1)


def test_a_return_is_placed_where_it_returns_to() -> None:
    first, second = found(page(record(returned(0xFFFFFFFFC0001042)), record(returned(TRAMPOLINE))))
    assert (first.place, second.place) == ("vmx_set_msr+0x42", "")


def test_a_tracepoint_has_no_place() -> None:
    [one] = found(page(record(struct.pack("<HBBiII", 1502, 0, 1, 7, 1, 0x277))))
    assert (one.name, one.place, one.values["write"], one.values["ecx"]) == ("kvm_msr", "", 1, 0x277)


def test_data_is_no_function() -> None:
    assert Symbols(KALLSYMS).name(0xFFFFFFFFC0001190) == "vmx_enable_intercept_for_msr+0x90"


def test_events_of_several_cpus_are_in_the_order_of_their_times() -> None:
    extended = struct.pack("<II", 5 << 5 | 30, 1)  # by 5 + (1 << 27)
    stamped = struct.pack("<II", 2 << 5 | 31, 2)  # to 2 + (2 << 27)
    one = page(record(called(1)), extended, record(called(4)), time=10) + page(record(called(6)), time=1 << 30)
    other = page(record(called(2), 3), record(called(3), 1), stamped, record(called(5)), time=20)
    assert [(event.values["msr"], event.cpu) for event in found(one, other)] == [
        *((1, 0), (2, 1), (3, 1)),
        *((4, 0), (5, 1), (6, 0)),
    ]


def test_what_was_discarded_and_the_rest_of_a_page_are_passed_over() -> None:
    discarded = struct.pack("<II", 1 << 5 | 29, 12) + bytes(8)
    rest = struct.pack("<I", 29) + bytes(100)
    long = called(3) + bytes(3)
    by_length = struct.pack("<II", 0, len(long) + 4) + long
    assert [event.values["msr"] for event in found(page(record(called(1)), discarded, by_length, rest))] == [1, 3]


def test_events_that_the_kernel_lost_are_said() -> None:
    with pytest.raises(ValueError, match="missing"):
        found(page(record(called(1)), flags=1 << 31))


def test_an_event_that_no_format_describes_is_not_passed_over() -> None:
    with pytest.raises(KeyError):
        found(page(record(struct.pack("<HBBi", 1503, 0, 0, 7))))
