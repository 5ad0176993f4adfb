# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that somebody has changed, or that are something else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from hypothesis import strategies as st

_ODD = (0, -1, 2**63, 10**400, 1e308, "toggle", "0x0-0xffffffff", "0xffffffff-0x0", "\ud800", "\x1b[31m", "x" * 5000)
#: JSON values; the odd ones are odd for some reader.
anything = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
        st.sampled_from([*_ODD, float("nan")]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=9), inner, max_size=3)),
    max_leaves=6,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value inside a JSON value."""
    yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*at, key))


def replaced(text: str | bytes, changes: Iterable[tuple[tuple[Any, ...], object]]) -> Any:
    """The content of a JSON text with the values at places replaced (...: taken away)."""
    content = json.loads(text)
    for place, value in changes:
        at = content
        try:
            for key in place[:-1]:
                at = at[key]
            if value is ...:
                del at[place[-1]]
            else:
                at[place[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took it away
    return content


def foreign(example: bytes, schema: str, noun: str) -> list[tuple[bytes, str]]:
    """What is no file of a kind, and how the reason for that begins.

    :param example: a file of the kind
    :param schema: its schema, like msrtrace-report/1
    :param noun: what it is called
    """
    name = schema.partition("/")[0]
    with_schema = {value: json.dumps(json.loads(example) | {"schema": value}).encode() for value in _versions(name)}
    encodings = {"utf-16": "UTF-16", "utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE", "utf-32": "UTF-32"}
    return [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"{", "is not JSON: "),
        (b"no JSON", "is not JSON: "),
        (b"\xef\xbb\xbf", "is empty"),
        (b"\xef\xbb\xbf{}", f"is not an msrtrace {noun}: "),
        (b"\xef\xbb\xbf\xef\xbb\xbf{}", "is not JSON: "),
        (b"\0\0\0{\0\0\0", "is not JSON: "),
        (b'{"schema": "\xff"}', "is not JSON: "),
        (f'{{"schema": "{schema}"'.encode(), "is not JSON: "),
        *(
            (
                example.decode().encode(codec),
                f"is {encoding} text, and {noun}s are UTF-8: convert it with iconv -f {encoding} ",
            )
            for codec, encoding in encodings.items()
        ),
        (b"\x1f\x8b\x08\0", "is compressed (gzip): use gunzip first"),
        (b"\x28\xb5\x2f\xfd\0", "is compressed (zstd): use unzstd first"),
        (b"\xfd7zXZ\0\0", "is compressed (xz): use unxz first"),
        (b"BZh91AY", "is compressed (bzip2): use bunzip2 first"),
        (b"\n<!DOCTYPE html>\n<html>", f"is an HTML page: {noun}s are read in JSON (-o NAME.json)"),
        (
            b"patch missing: 1,717 calls",
            f"is not JSON: JSON is malformed: invalid character (byte 0); {noun}s are read in JSON",
        ),
        (f'{{"schema": "{schema}", "msrtrace": "'.encode() + b'\xe4"}', f"is a damaged {noun}: it is not UTF-8"),
        (b'{"schema": NaN}', "is not JSON: "),
        (b"{}", f"is not an msrtrace {noun}: Object missing required field `schema`"),
        (b"[]", f"is not an msrtrace {noun}: Expected `object`, got `array`"),
        (b"[" * 10**5, f"is not an msrtrace {noun}: Expected `object`, got `array`"),
        (b'{"schema":' * 10**5, f"is not an msrtrace {noun}: Expected `str`, got `object`"),
        (b"null", f"is not an msrtrace {noun}: "),
        (b'{"schema": 1}', f"is not an msrtrace {noun}: "),
        (b'{"schema": "msrtrace-comparison/1"}', f"is not an msrtrace {noun}: its schema is msrtrace-comparison/1"),
        (b'{"schema": ""}', f"is not an msrtrace {noun}: its schema is "),
        (
            b'{"schema": "\\u001b[2J\\n' + b"x" * 999 + b'"}',
            f"is not an msrtrace {noun}: its schema is \\x1b[2J\\nxx",
        ),
        (f'{{"schema": "{schema}"}}'.encode(), f"is a damaged {noun}: Object missing required field "),
        *(
            (data, f"is a {noun} of another version ({value}); this msrtrace reads {schema}")
            for value, data in with_schema.items()
        ),
        (
            json.dumps(json.loads(example) | {"schema": schema.upper()}).encode(),
            f"is not an msrtrace {noun}: its schema is ",
        ),
        (example + example, "is not JSON: "),
    ]


def _versions(name: str) -> list[str]:
    return [f"{name}/2", f"{name}/10", f"{name}/", name, f"{name}/1/1"]


def nested(example: bytes) -> list[bytes]:
    """Files with something in them that is nested too deeply, in a field that no reader knows, and in one of all."""
    return [
        _beginning_with(example, b'"future": ' + b"[" * 10**5 + b"]" * 10**5),
        _beginning_with(example, b'"notes": ' + b"[" * 10**5),
        _beginning_with(example, b'"future": ' + b'{"a":' * 10**5 + b"1" + b"}" * 10**5),
    ]


def oversized(example: bytes, limit: int) -> list[bytes]:
    """Files that are larger than a limit of bytes, or that have hardly anything but one thing."""
    return [
        b"x" * (limit + 1),
        b'{"schema": "' + b"s" * (limit - 99) + b'"}',
        b'{"schema": "' + b"\\n" * (limit // 2 - 99) + b'"}',
        b'{"schema": ' + b"1" * (limit - 99) + b"}",
        _beginning_with(example, b'"notes": [' + b'"",' * (limit // 4) + b'""]'),
        _beginning_with(example, b'"future": [' + b"{}," * (limit // 4) + b"0"),
        b" " * limit,
    ]


def _beginning_with(example: bytes, field: bytes) -> bytes:
    return b"{" + field + b"," + example.removeprefix(b"{")
