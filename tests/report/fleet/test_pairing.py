# SPDX-License-Identifier: GPL-2.0-or-later
"""Which hosts of two windows are the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.report.fleet.pairing import Targets, unpaired


def host(*several: str) -> Targets:
    """A host by its labels, `a=1 b=2`, under several sets of them."""
    return frozenset(
        tuple(sorted((name, value) for name, _, value in (pair.partition("=") for pair in labels.split())))
        for labels in several
    )


PLAIN, OTHER = "job=m instance=a:9753", "job=m instance=b:9753"
AGENT = "job=m instance=127.0.0.1:9753"


@pytest.mark.parametrize(
    ("base", "new", "alone"),
    [
        ([PLAIN, OTHER], [OTHER, PLAIN], ([], [])),
        ([PLAIN, OTHER], [PLAIN], ([1], [])),
        ([PLAIN], [OTHER, PLAIN], ([], [0])),
        ([PLAIN], [OTHER], ([0], [0])),
        # an upgrade changes a label that says what is installed
        ([f"{PLAIN} patch=no", f"{OTHER} patch=no"], [f"{PLAIN} patch=yes", f"{OTHER} patch=yes"], ([], [])),
        ([PLAIN, OTHER], [f"{PLAIN} dc=x", f"{OTHER} dc=x"], ([], [])),
        # replicas are no other hosts
        ([f"{PLAIN} prometheus_replica=0"], [f"{PLAIN} prometheus_replica=1"], ([], [])),
        # another pod on the same node
        (["job=m instance=10.0.0.7:9753 node=n1"], ["job=m instance=10.0.0.9:9753 node=n1"], ([], [])),
        (["job=m instance=10.0.0.7:9753 node=n1"], ["job=m instance=10.0.0.7:9753 node=n2"], ([0], [0])),
        # agents on the hosts, told apart by another label
        ([f"{AGENT} host=a", f"{AGENT} host=b"], [f"{AGENT} host=b", f"{AGENT} host=a"], ([], [])),
        ([f"{AGENT} host=a patch=no"], [f"{AGENT} host=a patch=yes"], ([], [])),
        ([f"{AGENT} host=a"], [f"{AGENT} host=b"], ([0], [0])),
        ([f"{AGENT} box=a", f"{AGENT} box=b"], [f"{AGENT} box=a", f"{AGENT} box=c"], ([1], [1])),
        ([f"{AGENT} box=a"], [f"{AGENT} box=b"], ([0], [0])),
        # where labels do not decide
        ([f"{PLAIN} box=a", f"{PLAIN} box=b"], [f"{PLAIN} box=c", f"{PLAIN} box=d"], ([0, 1], [0, 1])),
        (["job=m instance=a:9753"], ["job=n instance=a:9753"], ([0], [0])),
        (["job=m"], ["job=m x=y"], ([0], [0])),
        # federated
        (["job=f instance=f:9090 exported_job=m exported_instance=a:9753"], [PLAIN], ([], [])),
        ([], [PLAIN], ([], [0])),
    ],
)
def test_hosts_are_paired_by_their_labels(base: list[str], new: list[str], alone: tuple[list[int], list[int]]) -> None:
    assert unpaired([host(one) for one in base], [host(one) for one in new]) == alone
    assert unpaired([host(one) for one in new], [host(one) for one in base]) == alone[::-1]


def test_a_host_is_known_by_any_of_its_label_sets() -> None:
    assert unpaired([host(f"{PLAIN} dc=x", PLAIN)], [host(PLAIN)]) == ([], [])


hosts = st.lists(
    st.builds(
        lambda *labels: host(" ".join(labels)),
        *(st.sampled_from([f"{name}={value}" for value in "abc"]) for name in ("job", "instance", "patch")),
    ),
    unique=True,
    max_size=5,
)


@given(hosts, hosts)
def test_as_many_are_paired_on_either_side(base: list[Targets], new: list[Targets]) -> None:
    one, other = unpaired(base, new)
    assert len(base) - len(one) == len(new) - len(other)
    assert unpaired(base, base) == ([], [])
