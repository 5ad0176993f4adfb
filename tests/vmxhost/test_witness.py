"""Every count equals that of the kernel's own tracer, which watched the same calls and the same bits."""

from __future__ import annotations

from conftest import Collected
from metrics_text import Metrics, nonzero
from witness import Counts, recorded


def both(collected: Collected, variant: str) -> tuple[Counts, Metrics, Metrics]:
    """The witness's counts, and msrtrace's scrapes before and after."""
    scrapes = collected.scenario("counts")["scrapes"]
    counts = recorded(collected.folder / f"witness-{variant}", updates_are_filters=collected.host != "sid")
    return counts, Metrics.of(scrapes[f"{variant} after"]), Metrics.of(scrapes[f"{variant} witnessed"])


def test_every_count_equals_the_kernels_own(collected: Collected) -> None:
    for variant in collected.variants:
        counts, before, after = both(collected, variant)
        assert nonzero(after.calls() - before.calls()) == nonzero(counts.calls)
        assert nonzero(after.redundant() - before.redundant()) == nonzero(counts.redundant)
        assert after.updates() - before.updates() == counts.updates
        assert not after.lost()


def test_the_witness_saw_all_that_the_workload_did(collected: Collected) -> None:
    for variant in collected.variants:
        counts, _, _ = both(collected, variant)
        did = collected.scenario("counts")["witnessed"][variant]
        assert counts.updates == sum(d["applied"] for d in did)
        if collected.host == "filter-only":
            assert not counts.calls
            continue
        causes = {key[3] for key in counts.calls}
        created = "recalc" if collected.host == "sid" else "vcpu_create"
        assert causes >= {"filter_change", "msr_write", created}
        # Refused, redundant and effective calls, of both actions: the equality above compared something.
        assert counts.refused
        assert sum(counts.redundant.values()) < sum(counts.calls.values())
        assert {key[2] for key in counts.calls} == {"enable", "disable"}
        if collected.host != "sid":
            vcpus = sum(d["created_vcpus"] for d in did)
            assert sum(v for k, v in counts.calls.items() if k[3] == "vcpu_create") == 7 * vcpus
            assert not [k for k in counts.redundant if k[3] == "vcpu_create"]
