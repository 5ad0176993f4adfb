# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/examples.md: what is typed there is taken, and prints what the page says."""

from __future__ import annotations

import pytest
from command_lines import COMMANDS, check, typed
from examples import CTRL_C, HOST, LEFT_OUT, PAGE, Command, boot, commands, parsed, written

_MOST_LINES = 250


def test_the_page_is_short_and_has_every_command() -> None:
    text = PAGE.read_text()
    assert len(text.splitlines()) <= _MOST_LINES
    assert written(parsed(text)) == text
    used = [arguments for command in commands(parsed(text)) for arguments in typed(command.typed)]
    assert {arguments[0] for arguments in used} == {*COMMANDS}
    for arguments in used:
        check(arguments)


def test_outputs_are_replaced() -> None:
    text = "Text\n\n    $ one\n    1\n\n    2\n    [...]\n    9\n    $ two\n    ^C\n\nEnd\n"
    parts = parsed(text)
    assert written(parts) == text
    one, two = commands(parts)
    assert (one.typed, one.printed, one.interrupted) == ("one", ["1", "", "2", LEFT_OUT, "9"], False)
    assert (two.printed, two.interrupted) == ([CTRL_C], True)
    one.prints("a\n\nb\nc\nd \ne\n")
    two.prints("x\n")
    assert written(parts) == text.replace("1\n\n    2", "a\n\n    b").replace("9", "e").replace(
        "    ^C", "    x\n    ^C"
    )


def test_no_line_of_a_short_output_is_shown_twice() -> None:
    command = Command("one", ["1", LEFT_OUT, "9"])
    command.prints("a")
    assert command.printed == ["a", LEFT_OUT]


def test_figures_are_no_words_however_exact_they_are() -> None:
    exact, roughly = (Command("one", [line]) for line in ("47 calls, 46 redundant", "about 46.8 calls, 45.9 redundant"))
    assert exact.words() == roughly.words() == {"calls", "redundant"}
    assert Command("one", ["about all"]).words() == {"about", "all"}


@pytest.mark.beside(boot=boot, host=HOST)
def test_the_page_says_what_is_printed(beside: list[str]) -> None:
    """Figures differ, and how many rows there are; words do not."""
    differ = []
    for command, output in zip(commands(parsed(PAGE.read_text())), beside, strict=True):
        new = Command(command.typed, [*command.printed])
        new.prints(output)
        if new.words() != command.words():
            words = " ".join(sorted(new.words() ^ command.words()))
            differ.append(f"{words}: $ {command.typed}\n{output}")
    assert not differ, "\n".join(["`build/venv/bin/python tests/kvmhost/examples.py` writes the page anew", *differ])
