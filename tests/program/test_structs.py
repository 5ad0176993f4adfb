# SPDX-License-Identifier: GPL-2.0-or-later
"""What BCC says of a struct, as it says it."""

from __future__ import annotations

import pytest

from tracer.program.structs import Member, members

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
