# SPDX-License-Identifier: GPL-2.0-or-later
"""What BCC says of a struct, as it says it."""

from __future__ import annotations

import pytest

from tracer.program.structs import Content, Member, Record, members

#: By BCC 0.26, of struct counter with fewer members, and of an array.
COUNTER = """["counter", [["outcome",["outcome", [["changed","unsigned long long"], ["unknown","unsigned long long"] ],
 "struct_packed"]], ["", [["key","unsigned long long"], ["call",["call", [["msr","unsigned int"],
 ["type","unsigned char"], ["flags","unsigned char"], ["__pad_end","char", [2]] ], "struct_packed"]] ], "union"],
 ["buckets","unsigned long long", [32]], ["kind","unsigned int"] ], "struct_packed"]"""


def test_members_of_structs_unions_and_arrays() -> None:
    assert members(COUNTER) == {
        "outcome.changed": Member(0, 8),
        "outcome.unknown": Member(8, 8),
        "key": Member(16, 8),
        "call.msr": Member(16, 4),
        "call.type": Member(20, 1),
        "call.flags": Member(21, 1),
        "call.__pad_end": Member(22, 1, 2),
        "buckets": Member(24, 8, 32),
        "kind": Member(280, 4),
    }


def test_a_number_has_none() -> None:
    assert members('"unsigned long long"') == {}


@pytest.mark.parametrize(
    "member",
    ['["bits","unsigned int", 4]', '["s",["t", [["deep","unsigned int", 4]], "struct"]]', '["table","int",[2,3]]'],
)
def test_what_is_not_foreseen_is_refused(member: str) -> None:
    with pytest.raises(ValueError, match="no plain number"):
        members(f'["s", [{member}], "struct"]')


def test_a_record_is_read_by_the_names_of_its_members() -> None:
    """Whatever their order; with gaps between them, and not from the start of the bytes."""
    record = Record({"b": Member(8, 8), "a": Member(0, 4), "c": Member(18, 2, 3), "d": Member(24, 1)})
    content = bytes.fromhex("ffff78563412 00000000 0100000000000080 0000 0100 0200 ffff 07")
    assert record.size == 25
    assert record.read(content, 2) == {"a": 0x12345678, "b": 1 << 63 | 1, "c": (1, 2, 0xFFFF), "d": 7}


def test_a_record_that_is_not_whole_is_an_error() -> None:
    record = Record({"a": Member(0, 4, 2)})
    assert record.read(bytes(9), 1) == {"a": (0, 0)}
    with pytest.raises(ValueError, match="buffer"):
        record.read(bytes(8), 1)


@pytest.mark.parametrize("part", [1, 2, 3, 7, 100])
def test_bytes_are_taken_across_the_ends_of_parts(part: int) -> None:
    whole = bytes(range(20))
    content = Content(whole[at : at + part] for at in range(0, len(whole), part))
    assert [content.take(size) for size in (5, 0, 1, 9)] == [whole[:5], b"", whole[5:6], whole[6:15]]
    assert content
    assert content.take(5) == whole[15:]
    assert not content
    with pytest.raises(ValueError, match="2 bytes are wanted, and fewer are left"):
        content.take(2)


def test_bytes_that_end_within_what_is_taken_are_refused() -> None:
    content = Content([b"abc"])
    with pytest.raises(ValueError, match="4 bytes are wanted"):
        content.take(4)
