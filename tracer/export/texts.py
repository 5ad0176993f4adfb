# SPDX-License-Identifier: GPL-2.0-or-later
"""The texts that clients ask for, made once for all who ask for the same at a time."""

from __future__ import annotations

import gzip
import threading
import time
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass

from prometheus_client.registry import Collector

from tracer.export.exposition import Families, Selection, exposed

#: How long a collection waits for clients that are being accepted, who then share it.
_GATHERING_SECONDS = 0.25


@dataclass(frozen=True)
class Wanted:
    """What a request asks for, which determines its text: format, names of metrics (None: all), and compression."""

    as_openmetrics: bool
    names: frozenset[str] | None
    compressed: bool

    def of(self, registry: Collector) -> bytes:
        """The text of the registry, or of the named part."""
        part = registry if self.names is None else Selection(registry, self.names)
        text = exposed(part, self.as_openmetrics)
        # The default level, 9, takes six times as long
        return gzip.compress(text, compresslevel=1) if self.compressed else text


class Texts:
    """Makes texts of a registry, each from a collection that begins after it was asked for.

    Requests that arrive during a collection share the next one, and those for the same share its text. So under more
    requests than can be answered, from many clients or impatient ones that retry, the last falls behind by no more than
    one collection. While a collection runs, the GIL lets the thread that accepts connections run only now and then; so
    none begins until waiting clients are accepted. Otherwise requests would trickle in, each with a collection of its
    own. There are at most four texts of everything, but any number of parts: these are made one after another while the
    next text of everything is, so that no number of them delays that.
    """

    def __init__(self, all_in: threading.Event) -> None:
        """:param all_in: is set while no client waits to be accepted"""
        self._all_in = all_in
        self._asking, self._collecting = threading.Lock(), threading.Lock()
        self._everything, self._parts = dict[Wanted, Future[bytes]](), dict[Wanted, Future[bytes]]()
        self._making_parts = threading.Lock()
        self.collecting_since: float | None = None  #: when the collection that is being made began

    def of(self, registry: Collector, wanted: Wanted) -> bytes:
        """The text; raises what the collection raised."""
        partial = wanted.names is not None
        asked = self._parts if partial else self._everything
        with self._asking:
            first = not asked
            text = asked.setdefault(wanted, Future())
        if first:
            with self._making_parts if partial else nullcontext():
                self._make_all(registry, asked, partial)
        return text.result()

    def _make_all(self, registry: Collector, asked: dict[Wanted, Future[bytes]], partial: bool) -> None:
        """Make all texts that were asked for when the collection begins."""
        with self._collecting:
            self._all_in.wait(_GATHERING_SECONDS)
            with self._asking:
                texts = dict(asked)
                asked.clear()  # requests from here on need a newer collection
            self.collecting_since = time.monotonic()
            try:
                if partial or len(texts) > 1:
                    registry = Families(registry.collect())
                if not partial:  # a single text, the usual case, is made while families are collected: they take memory
                    _make(registry, texts)
            except Exception as error:
                for text in texts.values():
                    text.set_exception(error)
                return
            finally:
                self.collecting_since = None
        if partial:
            _make(registry, texts)


def _make(registry: Collector, texts: dict[Wanted, Future[bytes]]) -> None:
    for wanted, text in texts.items():
        try:
            text.set_result(wanted.of(registry))
        except Exception as error:
            text.set_exception(error)
