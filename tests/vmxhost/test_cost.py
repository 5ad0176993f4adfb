"""msrtrace costs no more than it did: instructions per traced call against the ceilings in ceilings.json."""

from __future__ import annotations

import json
import math
from pathlib import Path

from conftest import Collected
from cost import PER_UPDATE, PER_VCPU, per_call
from guest import MEASURED_UPDATES
from metrics_text import Metrics

CEILINGS_FILE = Path(__file__).with_name("ceilings.json")
#: By host, backend and variant: what was measured, and MARGIN.
CEILINGS: dict[str, dict[str, dict[str, int]]] = json.loads(CEILINGS_FILE.read_text())
MARGIN = 1.02  # a kernel update moves the kernel's part of the cost; on one kernel it repeats to the tick
SLACK = 0.9  # a ceiling that is further above than this holds nothing


def backend_of(metrics: Metrics) -> str:
    [(info, _)] = metrics.named("msrtrace_build_info")
    return info["backend"]


def test_a_traced_call_costs_no_more_than_recorded(both: Collected) -> None:
    found = both.scenario("counts")
    for variant in both.variants:
        backend = backend_of(Metrics.of(found["scrapes"][f"{variant} measured"]))
        untraced, traced = (found["ticks"][name][variant] for name in ("untraced", "traced"))
        cost = per_call(both.host, variant, traced, untraced)
        ceiling = CEILINGS.get(both.host, {}).get(backend, {}).get(variant, 0)
        what = f"{both.host}, {backend}, {variant}: {cost:.1f} instructions a call, the ceiling is {ceiling}"
        hint = f"{CEILINGS_FILE.name} should have {math.ceil(cost * MARGIN)}"
        assert cost <= ceiling, f"{what}; if that is meant, {hint}"
        assert cost >= ceiling * SLACK, f"{what}: lower it, {hint}"


def test_what_was_measured_was_counted(both: Collected) -> None:
    scrapes = both.scenario("counts")["scrapes"]
    for variant in both.variants:
        before, after = (Metrics.of(scrapes[f"{variant} {when}"]) for when in ("witnessed", "measured"))
        calls, redundant = (MEASURED_UPDATES * number for number in PER_UPDATE[both.host][variant])
        assert (after.calls() - before.calls()).total() == calls + PER_VCPU
        assert (after.redundant() - before.redundant()).total() == redundant
        assert after.updates() - before.updates() == MEASURED_UPDATES
        assert not after.lost()
