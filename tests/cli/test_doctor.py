# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace doctor` as it is typed."""

from __future__ import annotations

import json
import os

import pytest
from command import command

from tracer.cli.console import columns
from tracer.doctor.examination import examine
from tracer.doctor.output import as_text
from tracer.kernel.machine import Machine


def test_doctor_prints_every_check_and_fails_if_one_does() -> None:
    names = [check.name for check in examine(Machine.here())]
    done = command("doctor", "--json")
    document = json.loads(done.stdout)
    assert [check["name"] for check in document["checks"]] == names
    assert (document["schema"], document["kernel"]) == ("msrtrace-doctor/1", os.uname().release)
    failed = any(check["state"] == "failed" for check in document["checks"])
    assert (document["ok"], done.returncode, done.stderr) == (not failed, int(failed), "")
    text = command("doctor")
    assert (text.returncode, text.stderr) == (done.returncode, "")
    assert "\x1b" not in text.stdout  # not a terminal
    assert [line.split()[1] for line in text.stdout.split("\n\n")[0].splitlines() if line[0] != " "] == names


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_text_fits_the_terminal(columns: int) -> None:
    text = command("doctor", COLUMNS=str(columns)).stdout
    assert [line for line in text.splitlines() if len(line) > columns] == []
    plain = " ".join(as_text(examine(Machine.here())).split())
    assert columns < 200 or " ".join(text.split()) == plain


def test_a_terminal_without_a_size_has_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a serial console."""
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((0, 0)))
    monkeypatch.delenv("COLUMNS", raising=False)
    assert columns() == 80
