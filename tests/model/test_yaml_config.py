# SPDX-License-Identifier: GPL-2.0-or-later
"""Configuration files in YAML, whatever is in them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.model.yaml_config import InvalidConfigError, Section, parse, read_file

HERE = Path("/etc/msrtrace")


def parsed(text: str | bytes) -> Section:
    return parse(text.encode() if isinstance(text, str) else text, HERE)


def test_texts_are_as_written() -> None:
    """As Go has them where a text is wanted; YAML would make 83, False, a date, a float."""
    made = parsed(
        "{a: 0123, b: no, c: 2026-11-27, d: 1e3, e: 'null', f: \"\", g: |\n  x\n}".replace("|\n  x\n", "'x y'")
    )
    assert [made.text(key) for key in "abcdefg"] == ["0123", "no", "2026-11-27", "1e3", "null", "", "x y"]


@pytest.mark.parametrize("text", ["a:", "a: null", "a: ~", "{}", "", "# nothing", "\ufeffa:"])
def test_what_is_null_or_left_out_is_empty(text: str) -> None:
    made = parsed(text)
    assert "a" not in made
    assert (made.text("a"), made.texts("a"), made.section("a").names()) == ("", [], [])
    assert (made.flag("a", True), made.flag("a", False), made.choice("a", {"x": 1})) == (True, False, None)


def test_an_alias_is_what_it_stands_for() -> None:
    made = parsed("a: &x {k: v}\nb: *x")
    assert made.section("b").text("k") == "v"


@pytest.mark.parametrize(
    ("look", "why"),
    [
        (lambda of: of.section("a"), "s.a is not a mapping"),
        (lambda of: of.text("l"), "s.l is not a text"),
        (lambda of: of.text("m"), "s.m is not a text"),
        (lambda of: of.texts("m"), "s.m is not a list of texts"),
        (lambda of: of.texts("a"), "s.a is not a list of texts"),
        (lambda of: of.texts("n"), "s.n is not a list of texts"),
        (lambda of: of.flag("a", True), "s.a is neither true nor false"),
        (lambda of: of.choice("a", {"one": 1, "two": 2}), "s.a is none of one, two"),
        (lambda of: of.check(("a", "l", "m"), {}), "unknown key s.n (a, l, m)"),
        (lambda of: of.check(("a", "l"), {}), "unknown keys s.m, s.n (a, l)"),
        (lambda of: of.check(("a", "l"), {"s.n": "use a"}), "s.n is not supported by msrtrace: use a"),
        (lambda of: of.at_most_one("a", "z", "l"), "at most one of s.a and s.l may be given"),
    ],
)
def test_what_is_not_as_expected_is_named_with_what_is_above_it(look: Callable[[Section], object], why: str) -> None:
    made = parsed("s: {a: text, l: [text], m: {k: text}, n: [[text]]}").section("s")
    with pytest.raises(InvalidConfigError) as error:
        look(made)
    assert str(error.value) == why


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("- a", "the file is not a mapping"),
        ("a: {b: 1,\n  b: 2}", "line 2: b is given twice"),
        ("? {a: b}\n: c", "line 1: a key is not a text"),
        ("a: {", "is not valid YAML (line 1, column 5): while parsing a flow node, expected the node content, but"),
        ("a: {b", "is not valid YAML (line 1, column 6): while parsing a flow mapping, expected ',' or '}', but got"),
        ("a: b: c", "is not valid YAML (line 1, column 5): mapping values are not allowed here"),
        ("a: @b", "is not valid YAML (line 1, column 4): while scanning for the next token, found character '@'"),
        ("a: *secret", "is not valid YAML (line 1, column 4): found undefined alias ..."),
        ("a: &secret b\nc: &secret d", "is not valid YAML (line 2, column 4): found duplicate anchor ...; first"),
        (
            "a: !secret!x b",
            "is not valid YAML (line 1, column 4): while parsing a node, found undefined tag handle",
        ),
        ("a: b\n---\nc: d", "is not valid YAML (line 2, column 1): expected a single document in the stream, but"),
        ("a: b\nc: \0", "is not valid YAML (line 2): it contains a control character"),
        (b"a: \xff", "is not UTF-8"),
        ("a: {b: c}".encode("utf-16"), "is not UTF-8"),
        ("a: &a [*a]", "is nested too deeply"),
        ("a: " + "[" * 100_000, "is nested too deeply"),
        ("a: {b: {c: {d: {e: {f: {g: {h: {i: j}}}}}}}}", "is nested too deeply"),
    ],
)
def test_what_is_no_yaml_is_an_error_that_says_where(text: str | bytes, why: str) -> None:
    with pytest.raises(InvalidConfigError) as error:
        parsed(text)
    message = str(error.value)
    assert message.startswith(why)
    assert len(message.splitlines()) == 1
    assert "secret" not in message


def test_a_key_with_a_secret_is_shown_up_to_it() -> None:
    with pytest.raises(InvalidConfigError, match=r"^unknown key password\.\.\. \(user\)$"):
        parsed("{password:secret}").check(("user",), {})


def test_aliases_do_not_multiply() -> None:
    text = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 100)}]\n" for n in range(1, 7))
    started = time.process_time()
    parsed(text)
    assert time.process_time() - started < 1


@given(st.one_of(st.binary(max_size=200), st.text(alphabet="ab:{}[]&*!|>'\"-#,? \n\t%@", max_size=60)))
def test_any_file_is_a_mapping_or_an_error_in_one_line(content: bytes | str) -> None:
    try:
        message = parsed(content).name
    except InvalidConfigError as error:
        message = str(error)
    assert message == "" or message.isprintable()


def test_files_are_read_up_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(InvalidConfigError, match=r"^/.*/large is too large$"):
        read_file(tmp_path / "large")
    with pytest.raises(InvalidConfigError, match=r"^cannot read /.*/none: No such file or directory$"):
        read_file(tmp_path / "none")
