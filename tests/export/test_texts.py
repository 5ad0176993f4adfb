# SPDX-License-Identifier: GPL-2.0-or-later
"""When a collection begins, which those share who asked for its text before."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from made import toggle
from prometheus_client import CollectorRegistry

from tracer.export import texts as texts_module
from tracer.export.metrics import SnapshotCollector
from tracer.export.texts import Texts, Wanted
from tracer.model.snapshot import Snapshot

EVERYTHING = Wanted(False, None, False)


def counting(taken: list[float]) -> CollectorRegistry:
    """A registry each of whose collections adds to a list when it began."""

    def take() -> Snapshot:
        taken.append(time.monotonic())
        return toggle()

    registry = CollectorRegistry()
    registry.register(SnapshotCollector(take, "1.0"))
    return registry


def test_a_collection_begins_when_all_who_connect_are_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts_module, "_GATHERING_SECONDS", 60)
    taken: list[float] = []
    registry, all_in = counting(taken), threading.Event()
    texts = Texts(all_in)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(texts.of, registry, EVERYTHING) for _ in range(3)]
        time.sleep(0.2)
        assert not taken
        all_in.set()
        assert len({one.result(20) for one in asked}) == 1
    assert len(taken) == 1


def test_somebody_who_connects_all_the_time_does_not_hold_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts_module, "_GATHERING_SECONDS", 0.1)
    taken: list[float] = []
    begun = time.monotonic()
    Texts(threading.Event()).of(counting(taken), EVERYTHING)
    [at] = taken
    assert 0.1 <= at - begun < 5
