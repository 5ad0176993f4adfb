# SPDX-License-Identifier: GPL-2.0-or-later
"""What the programs are told of processes."""

from __future__ import annotations

import os

import pytest
from known import KnownBtf

from tracer.model.options import Options
from tracer.trace.plan import process_values


@pytest.mark.parametrize(
    ("namespace", "told"),
    [
        ("time:[4026531834]", {"by_pid": 1, "leader_offset": 1416, "start_offset": 1384}),
        ("time:[4026532000]", {"by_pid": 1}),  # where /proc adds something to when processes began
        (None, {"by_pid": 1, "leader_offset": 1416, "start_offset": 1384}),  # before 5.6 there are none
    ],
)
def test_processes_are_told_apart_by_their_start_where_proc_has_it(
    namespace: str | None, told: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def readlink(_: str) -> str:
        if namespace is None:
            raise FileNotFoundError
        return namespace

    monkeypatch.setattr(os, "readlink", readlink)
    assert process_values(Options(by_vm=True), KnownBtf()) == told
    assert process_values(Options(pid=7), KnownBtf()) == {"wanted_pid": 7}
