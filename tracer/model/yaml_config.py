# SPDX-License-Identifier: GPL-2.0-or-later
"""Configuration files in YAML, read strictly: what is not known is an error that names the key and those above it.

They may contain secrets, which are in no error: neither are values, nor what YAML's own errors quote.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from string import ascii_letters, digits
from typing import TYPE_CHECKING, TypeVar

from tracer.model.errors import MsrtraceError

if TYPE_CHECKING:
    import yaml

#: Neither a configuration nor a file that it names (a certificate, a password) is larger.
_LARGEST = 1 << 20
_DEEPEST = 8
_KEY = frozenset(ascii_letters + digits + "-_.")
_TRUE, _FALSE = ("true", "yes", "on", "y"), ("false", "no", "off", "n")
_T = TypeVar("_T")


class InvalidConfigError(MsrtraceError):
    """What is wrong with a configuration, in words that follow its name and a colon."""


def missing(package: str, debian: str) -> InvalidConfigError:
    """The error that a Python package is not installed, of those that come with msrtrace[web]."""
    return InvalidConfigError(
        f"the Python package {package} is missing: install Debian's {debian}, or pip install 'msrtrace[web]'"
    )


def read_file(path: Path) -> bytes:
    """The content of a configuration, or of a file that it names. Raises InvalidConfigError, which names the file."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        raise InvalidConfigError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > _LARGEST:
        raise InvalidConfigError(f"{path} is too large")
    return content


def parse(content: bytes, directory: Path) -> Section:
    """The mapping that a file consists of; `directory` is the file's, to which files that it names are relative.

    Every scalar but null is a text as written: for Go `password: 0123` is "0123", for YAML 83. Raises
    InvalidConfigError, also if PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError:
        raise missing("PyYAML", "python3-yaml") from None
    try:
        text = content.decode("utf-8-sig")
        return Section(_Plain().of(yaml.compose(text, Loader=yaml.SafeLoader)), "", directory)
    except UnicodeDecodeError:
        raise InvalidConfigError("is not UTF-8") from None
    except RecursionError:
        raise InvalidConfigError("is nested too deeply") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InvalidConfigError(f"is not valid YAML (line {line}): it contains a control character") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        why = ", ".join(part for part in (error.context, error.problem) if part)
        # It quotes names of anchors and tags, which may be secrets, and kinds of tokens: '<stream end>', ','.
        why = re.sub(
            r"'([^']*)'", lambda quoted: quoted[0] if quoted[1][:1] in "<" or len(quoted[1]) == 1 else "...", why
        )
        raise InvalidConfigError(f"is not valid YAML{where}: {why}") from None
    except yaml.YAMLError:
        raise InvalidConfigError("is not valid YAML") from None


class _Plain:
    """Mappings, lists and texts for YAML's nodes. A node with several aliases is looked at once."""

    def __init__(self) -> None:
        self._made: dict[yaml.Node, object] = {}

    def of(self, node: yaml.Node | None, depth: int = 0) -> object:
        import yaml

        if node in self._made:
            return self._made[node]
        if depth > _DEEPEST:
            raise InvalidConfigError("is nested too deeply")
        if isinstance(node, yaml.SequenceNode):
            made: object = [self.of(item, depth + 1) for item in node.value]
        elif isinstance(node, yaml.MappingNode):
            made = self._mapping(node, depth)
        else:
            made = None if node is None or node.tag == "tag:yaml.org,2002:null" else node.value
        if node is not None:
            self._made[node] = made
        return made

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, object]:
        import yaml

        result: dict[str, object] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise InvalidConfigError(f"line {line}: a key is not a text")
            if key.value in result:
                raise InvalidConfigError(f"line {line}: {_shown(key.value)} is given twice")
            result[key.value] = self.of(value, depth + 1)
        return result


def _shown(key: str) -> str:
    """The key up to what no key has: YAML takes `{password:secret}`, without a space, for a key."""
    start = "".join(takewhile(_KEY.__contains__, key))
    return start[:80] if start == key and len(key) <= 80 else f"{start[:80]}..."


class Section:
    """A mapping of a configuration. Its methods raise InvalidConfigError, which names keys with those above them."""

    def __init__(self, content: object, name: str, directory: Path) -> None:
        """`content`: None, as for a key without a value, is an empty mapping."""
        if content is not None and not isinstance(content, dict):
            raise InvalidConfigError(f"{name or 'the file'} is not a mapping")
        self.name, self._directory = name, directory
        self._content: dict[str, object] = content or {}

    def __contains__(self, key: str) -> bool:
        return self._content.get(key) is not None

    def names(self) -> list[str]:
        """The keys, as written."""
        return list(self._content)

    def path(self, key: str) -> str:
        """The key with those above it."""
        shown = _shown(key)
        return f"{self.name}.{shown}" if self.name else shown

    def check(self, known: Iterable[str], unsupported: Mapping[str, str]) -> None:
        """Refuse other keys than those that are known.

        :param unsupported: what msrtrace cannot do, by path, and what to do instead
        """
        for path in map(self.path, self._content):
            if path in unsupported:
                raise InvalidConfigError(f"{path} is not supported by msrtrace: {unsupported[path]}")
        unknown = [self.path(key) for key in self._content if key not in known]
        if unknown:
            keys = "key" if len(unknown) == 1 else "keys"
            raise InvalidConfigError(f"unknown {keys} {', '.join(unknown)} ({', '.join(known)})")

    def section(self, key: str) -> Section:
        """The mapping under a key; empty if there is none."""
        return Section(self._content.get(key), self.path(key), self._directory)

    def text(self, key: str) -> str:
        """The text under a key; empty if there is none."""
        value = self._content.get(key)
        if value is not None and not isinstance(value, str):
            raise InvalidConfigError(f"{self.path(key)} is not a text")
        return value or ""

    def texts(self, key: str) -> list[str]:
        """The list of texts under a key; empty if there is none."""
        value = self._content.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InvalidConfigError(f"{self.path(key)} is not a list of texts")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        text = self.text(key).lower()
        if text and text not in _TRUE + _FALSE:
            raise InvalidConfigError(f"{self.path(key)} is neither true nor false")
        return text in _TRUE if text else default

    def choice(self, key: str, choices: Mapping[str, _T]) -> _T | None:
        """What the text under a key stands for; None if there is none."""
        text = self.text(key)
        if text and text not in choices:
            raise InvalidConfigError(f"{self.path(key)} is none of {', '.join(choices)}")
        return choices[text] if text else None

    def file(self, name: str) -> Path:
        """A file that the configuration names."""
        return self._directory / name

    def at_most_one(self, *keys: str) -> None:
        """Refuse several of these keys."""
        given = [self.path(key) for key in keys if key in self]
        if len(given) > 1:
            raise InvalidConfigError(f"at most one of {' and '.join(given)} may be given")
