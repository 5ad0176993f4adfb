# SPDX-License-Identifier: GPL-2.0-or-later
"""The row on what patching would save: the calls as counted, the CPU time by what a call was measured to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dashboards.grafana import WIDTH, Column, Json, Query, setting, stat, table, text
from dashboards.patterns import label
from dashboards.queries import CALLS, HOST, IN_UPDATE, RANGE, TITLED, UPDATES, by, joined, metric, per_host, selected
from dashboards.verdict import MISSING, matchers
from tracer.model.verdict import ENABLES, NEVER_PATCHED, SUPERSEDED


@dataclass(frozen=True)
class Measured:
    """What the patch saves in a filter update without a tracer: a row of `make saving` in docs/cost.md."""

    host: str
    kernel: str
    calls: int
    instructions: int

    @property
    def per_call(self) -> float:
        """Instructions that one of the calls takes."""
        return self.instructions / self.calls


@dataclass(frozen=True)
class Kind:
    """Hosts that could be patched: a query for them, the calls that a patched kernel leaves out, and their cost."""

    lacking: str
    calls: tuple[str, ...]
    measured: tuple[Measured, ...]

    def saved(self) -> str:
        """The calls that each of these hosts would have saved in the time shown."""
        return f"{per_host('', CALLS, *self.calls, over=RANGE)} and on ({HOST}) {self.lacking}"

    def from_least(self) -> list[Measured]:
        """What was measured, the cheapest call first."""
        return sorted(self.measured, key=lambda one: one.per_call)


#: Those that lack the patch. It removes all enables of the loop.
PATCHABLE = Kind(
    f"({MISSING})", matchers(ENABLES), (Measured("bookworm", "6.1", 17, 2391), Measured("trixie", "6.12", 19, 1872))
)
#: Those for which KVM has none. One of the same idea (tests/kvmhost/skip-svm.diff) removes every enable of the loop.
_OLD = metric("build_info", label("vendor", NEVER_PATCHED), label("layout", SUPERSEDED, other=True))
UNPATCHABLE = Kind(
    _OLD,
    ('action="enable"', IN_UPDATE),
    (Measured("bookworm-amd", "6.1", 33, 7467), Measured("trixie-amd", "6.12", 36, 8421)),
)

SPEED = setting(
    "ips",
    "Instructions/s",
    "The instructions that a CPU is assumed to execute in a second, for the row What patching would save.",
    {"1 billion": "1e9", "2 billion": "2e9", "3 billion": "3e9", "6 billion": "6e9"},
    "3 billion",
)
_A_DAY = "* 86400 / $__range_s"


def _figures(kind: Kind) -> str:
    return ", ".join(
        f"{one.per_call:.0f} on {one.kernel} ({one.instructions:,} instructions and {one.calls} calls fewer an update)"
        for one in kind.measured
    )


READING = f"""\
**An estimate**, and only of the time that the calls themselves take.

- **Avoidable calls a day** are counted: calls of filter updates that a patched kernel does not make, in the time \
shown, multiplied to a day.
- **Avoidable CPU time a day** is these calls, times instructions per call, divided by *Instructions/s* (above).
- Instructions per call were measured on emulated hosts without a tracer (`make saving`, docs/cost.md). Intel: \
{_figures(PATCHABLE)}. AMD: {_figures(UNPATCHABLE)}. The panels show both, as kernels and CPUs differ.
- *Instructions/s* is **assumed**. 3 billion is a CPU of 3 GHz that executes one instruction in each cycle.
- **AMD**: KVM never had such a patch, and 6.17 replaced the code. Shown is what one of the same idea saves."""


def savings() -> list[Json]:
    """The row on what patching would save."""
    source = (
        " An estimate: these calls, times instructions per call as measured on the named kernel (`make saving`, "
        "docs/cost.md), divided by the assumed Instructions/s."
    )
    amd = " KVM has no such patch for AMD: it is what one of the same idea would save (docs/cost.md)."
    known, old = " Empty unless a host is known to lack it.", " Empty unless a host is one of AMD before 6.17."
    return [
        text("How this is estimated", "Where each number comes from.", READING, size=(WIDTH, 7)),
        *_a_day(
            PATCHABLE,
            "Intel",
            "Enables of MSRs that are intercepted already, in filter updates of the hosts known to lack the patch by "
            "what they did since msrtrace started: counted in the time shown, multiplied to a day." + known,
            "CPU time of the calls on the left, of hosts that lack the patch by what they did since msrtrace started."
            + source
            + known,
            absent="no host known to lack it",
        ),
        *_a_day(
            UNPATCHABLE,
            "AMD",
            "Calls of filter updates, before 6.17, for MSRs that KVM intercepts for reads and writes anyway: counted "
            "in the time shown, multiplied to a day." + amd + old,
            "CPU time of the calls on the left." + source + amd + old,
            absent="no such host",
        ),
        table(
            "What patching would save, by kernel",
            "The hosts known to lack the patch by what they did since msrtrace started, and those of AMD before 6.17, "
            "for which there is none: their filter updates and the calls that patching would save, in the time shown, "
            "multiplied to a day."
            + source
            + " Least and most: by the kernel on which a call took the fewest instructions, and the most. Empty unless "
            "there is such a host.",
            _by_kernel(),
            [
                Column("kernel", "Kernel", variable="kernel"),
                Column("vendor", "Vendor", width=140),
                Column("Value #A", "Hosts", unit="none", width=100),
                Column("Value #B", "Filter updates a day", unit="short", decimals=1, width=190),
                Column("Value #C", "Avoidable calls a day", unit="short", decimals=1, width=190),
                Column("Value #D", "CPU time a day, least", unit="s", width=190),
                Column("Value #E", "CPU time a day, most", unit="s", width=190),
            ],
            sort="Avoidable calls a day",
            absent="no such host",
            size=(WIDTH, 7),
        ),
    ]


def _a_day(kind: Kind, vendor: str, of_calls: str, of_time: str, *, absent: str) -> list[Json]:
    """The panels on the calls and the CPU time that a kind of hosts would save, with their descriptions."""
    calls = f"{by('', kind.saved(), RANGE)} {_A_DAY}"
    size = (6, 5)
    return [
        stat(f"Avoidable calls a day, {vendor}", of_calls, calls, unit="short", absent=absent, decimals=1, size=size),
        stat(f"Avoidable CPU time a day, {vendor}", of_time, _cpu_time(kind), unit="s", absent=absent, size=size),
    ]


def _cpu_time(kind: Kind) -> Sequence[Query]:
    """Seconds a day, by each kernel on which it was measured."""
    calls = by("", kind.saved(), RANGE)
    return [
        Query(f"{calls} {_A_DAY} * {one.instructions} / {one.calls} / $ips", f"as on {one.kernel}")
        for one in kind.from_least()
    ]


def _by_kernel() -> list[str]:
    labels = "kernel, vendor"
    kinds = (PATCHABLE, UNPATCHABLE)

    def of_both(*each: str) -> str:
        return " or ".join(by(labels, joined(f"({one})", labels), RANGE) for one in each)

    updates = per_host("", UPDATES, over=RANGE)
    least, most = (
        [f"({kind.saved()}) * {one.instructions} / {one.calls}" for kind in kinds for one in [kind.from_least()[index]]]
        for index in (0, -1)
    )
    lacking = " or ".join(f"group by ({HOST}) ({kind.lacking})" for kind in kinds)
    hosts = f"group by ({HOST}, {labels}) ({TITLED}) and on ({HOST}) ({lacking})"
    return [
        f"count by ({labels}) {selected(hosts)}",
        f"({of_both(*(f'{updates} and on ({HOST}) {kind.lacking}' for kind in kinds))}) {_A_DAY}",
        f"({of_both(*(kind.saved() for kind in kinds))}) {_A_DAY}",
        f"({of_both(*least)}) {_A_DAY} / $ips",
        f"({of_both(*most)}) {_A_DAY} / $ips",
    ]
