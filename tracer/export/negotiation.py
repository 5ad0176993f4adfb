# SPDX-License-Identifier: GPL-2.0-or-later
"""What a client accepts, by RFC 9110, sections 12.4 and 12.5: formats of the metrics, and compression.

No header is an error: what cannot be read in one is as if it were not there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TOKEN, _QUOTED = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", r'"(?:[^"\\]|\\.)*"'
_ELEMENT = re.compile(rf"(?:[^,\"]|{_QUOTED})+")
_TYPE = re.compile(rf"\s*({_TOKEN})/({_TOKEN})\s*(?=;|$)")
_CODING = re.compile(rf"\s*({_TOKEN})\s*(?=;|$)")
_PARAMETER = re.compile(rf";\s*({_TOKEN})\s*=\s*({_TOKEN}|{_QUOTED})\s*(?=;|$)")
_WEIGHT = re.compile(r"0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?")
_VERSION = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9}){0,2}")

#: The version, of either format, that is made besides 0.0.4 of the text format.
_MADE = (1, 0, 0)
_TEXT, _OPENMETRICS = ("text", "plain"), ("application", "openmetrics-text")
#: The escaping schemes that do not change a name of letters, digits and underscores. `dots` would double the
#: underscores, so that no rule or panel found a metric; who asks for that gets names as they are, and is told so.
_ESCAPINGS = ("underscores", "allow-utf-8", "values")
_LONGEST = 4096  # characters of a header that are read


@dataclass(frozen=True)
class _Element:
    """An element of a header: a type or a coding, its parameters without the weight, and the weight."""

    name: tuple[str, ...]
    parameters: dict[str, str]
    weight: float

    @property
    def version(self) -> tuple[int, ...] | None:
        """The version of the format, of three numbers; None if there is none that can be read."""
        text = self.parameters.get("version", "")
        if not _VERSION.fullmatch(text):
            return None
        numbers = [int(part) for part in text.split(".")]
        return tuple(numbers + [0] * (3 - len(numbers)))

    @property
    def offer(self) -> str | None:
        """The content type that it names; None if that is no other than the default."""
        if self.name not in (_TEXT, _OPENMETRICS):
            return None
        if self.version == _MADE:
            escaping = self.parameters.get("escaping")
            return f"{_content(self.name, '1.0.0')}; escaping={escaping if escaping in _ESCAPINGS else _ESCAPINGS[0]}"
        if self.name == _OPENMETRICS and "version" not in self.parameters:
            return OPENMETRICS
        return None


def _content(name: tuple[str, ...], version: str) -> str:
    return f"{'/'.join(name)}; version={version}; charset=utf-8"


#: What is served to who names no version; escaping schemes came with version 1.0.0.
TEXT, OPENMETRICS = _content(_TEXT, "0.0.4"), _content(_OPENMETRICS, "1.0.0")


def content_type(accept: str) -> str:
    """The content type to answer an Accept header with: TEXT or OPENMETRICS, or either with an escaping scheme.

    That with the highest weight; among equals the first that is not the default, version 0.0.4 of the text format.
    Where nothing is acceptable, the header is disregarded, which RFC 9110 allows: the default, or OpenMetrics if that
    is excluded and OpenMetrics is not.
    """
    elements = list(_elements(accept, _TYPE))
    offers = [(element.weight, element.offer) for element in elements if element.offer]
    text, openmetrics = _weight_of_text(elements), _weight_of(_OPENMETRICS, elements)
    offers += [(text or 0, TEXT), (openmetrics or 0, OPENMETRICS)]
    weight, best = max(offers, key=lambda offer: offer[0])  # the first of the highest
    if not weight:
        return OPENMETRICS if text == 0 and openmetrics is None else TEXT
    return best


def is_openmetrics(content_type: str) -> bool:
    """Whether a content type is OpenMetrics rather than the text format."""
    return content_type.startswith("/".join(_OPENMETRICS))


def gzip_accepted(accept_encoding: str) -> bool:
    """Whether an answer to this Accept-Encoding header should be compressed: not if it prefers what is not."""
    weights = {element.name[0]: element.weight for element in _elements(accept_encoding, _CODING)}
    gzip = weights.get("gzip", weights.get("x-gzip", weights.get("*", 0)))
    return gzip > 0 and gzip >= weights.get("identity", 0)


def _weight_of_text(elements: list[_Element]) -> float | None:
    """The weight of version 0.0.4 of the text format: of its own version, or of any that does not exist."""
    plain = [element for element in elements if element.name == _TEXT and not element.offer]
    plain.sort(key=lambda element: "version" not in element.parameters)
    return plain[0].weight if plain else _weight_of_range(_TEXT[0], elements)


def _weight_of(name: tuple[str, str], elements: list[_Element]) -> float | None:
    """The weight of a type, without regard to versions."""
    exact = [element.weight for element in elements if element.name == name]
    # Those with a version that is acceptable are offers of their own
    return 0 if exact else _weight_of_range(name[0], elements)


def _weight_of_range(kind: str, elements: list[_Element]) -> float | None:
    """The weight of a type that only ranges name, the more specific first; None if none does."""
    for name in ((kind, "*"), ("*", "*")):
        for element in elements:
            if element.name == name:
                return element.weight
    return None


def _elements(header: str, first: re.Pattern[str]) -> Iterator[_Element]:
    """The elements of a header that begin with `first`."""
    for text in _ELEMENT.findall(header[:_LONGEST]):
        found = first.match(text)
        if not found:
            continue
        weight, parameters, end = 1.0, dict[str, str](), found.end()
        for parameter in _PARAMETER.finditer(text, end):
            name, value = parameter[1].lower(), parameter[2]
            if value.startswith('"'):
                value = re.sub(r"\\(.)", r"\1", value[1:-1])
            if name != "q":
                parameters.setdefault(name, value)
            elif _WEIGHT.fullmatch(value):
                weight = float(value)
        yield _Element(tuple(part.lower() for part in found.groups()), parameters, weight)
