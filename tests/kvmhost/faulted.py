# SPDX-License-Identifier: GPL-2.0-or-later
"""Boots on which faults are made to happen, and what is the same in judging them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from bench import tools
from cache import HERE, cached, sh
from conftest import CPUS, Collected, rig
from faults import Figures
from hosts import HOSTS, Host, build_chroot
from metrics_text import Metrics, created, nonzero
from witness import Counts, recorded

#: As FAULT_HOSTS of the Makefile. Before 6.17, so that all updates are for a new filter.
ON = ["bookworm-amd", "trixie-amd"]
#: MB by which msrtrace's memory may grow from the middle on.
GROWTH = 2


def livepatch(host: Host) -> Path:
    """The module of livepatch/ for HOST."""
    source = HERE / "livepatch"

    def make(work: Path) -> None:
        root = work / "root"
        sh(["cp", "-al", build_chroot(host), root])  # links: the build adds files and changes none
        shutil.copytree(source, root / "tmp/livepatch")
        headers = f"/usr/src/linux-headers-{host.release}"
        sh(["chroot", root, "make", "-C", headers, "M=/tmp/livepatch", "modules"], log=work / "log")
        shutil.copy(root / "tmp/livepatch/livepatch.ko", work)
        shutil.rmtree(root)

    return cached(f"livepatch-{host.name}", [host.release, *sorted(source.iterdir())], make) / "livepatch.ko"


def faulted(
    *command: str,
    timeout: int,
    options: Sequence[str] = ("--cpus", str(CPUS)),
    takes_along: bool = False,
) -> pytest.MarkDecorator:
    """Parametrizes a test with `host`: it gets as `beside` what the command, a scenario's, left on each of ON.

    The command may take so many seconds, and is followed by the scenario's words; `options` are those of `run`. It
    `takes_along` the tools of bench.py and a livepatch. Beside what it left, the file `minutes` says how long it took.
    """
    [scenario] = [Path(word).stem for word in command if word.startswith("/in/")]

    def booting(host: str) -> Callable[[Path], Collected]:
        def boot(folder: Path) -> Collected:
            into, out = folder / "in", folder / "out"
            shutil.copytree(HERE / "scenarios", into, ignore=shutil.ignore_patterns("__pycache__"))
            if takes_along:
                sh(["cp", "-al", tools(HOSTS[host]), into / "tools"])
                shutil.copy(livepatch(HOSTS[host]), into)
            given = ["--host", host, *options, "--timeout", str(timeout)]
            given += ["--in", str(into), "--out", str(out), "--keep-log", str(folder / "log")]
            begun = time.monotonic()
            run = rig(*given, "--", *command)
            out.mkdir(exist_ok=True)
            (out / "minutes").write_text(f"{(time.monotonic() - begun) / 60:.1f}")
            return Collected(host, out, run.returncode, run.stdout + run.stderr)

        boot.__name__ = f"{scenario}_on_{host}"
        return boot

    boots = {host: booting(host) for host in ON}
    return pytest.mark.parametrize(
        "host", [pytest.param(host, marks=pytest.mark.beside(boot=boots[host], host=host)) for host in ON]
    )


def equal(collected: Collected, found: dict[str, Any], name: str, figures: Figures) -> Counts:
    """What the witness of that name counted; fails unless msrtrace counted the same, and lost nothing."""
    counts = recorded(collected.folder / f"witness-{name}", updates_are_filters=True)
    before, after = (Metrics.of(found[when]).of_host() for when in ("before", "after"))
    assert nonzero(after.calls() - before.calls()) == nonzero(counts.calls)
    assert nonzero(after.redundant() - before.redundant()) == nonzero(counts.redundant)
    assert after.updates() - before.updates() == counts.updates > 0
    assert created(before, after)[0] == counts.vcpus
    assert after.lost() == []
    figures["calls"] = f"{counts.calls.total():,}, equal"
    figures["updates"] = f"{counts.updates:,}, equal"
    return counts


def flat(looks: Sequence[dict[str, Any]], in_all: float = 20) -> list[float]:
    """What memory msrtrace had each time, in MB; fails if that grows, or the number of its descriptors does.

    :param in_all: MB by which memory may be above the first look

    What is left of each VM or reload adds up, from the middle on as before. What the allocator keeps for a while, or a
    scrape that is going on has open, does not: so the least of several is compared.
    """
    memory, descriptors = [one["memory"] / 1000 for one in looks], [one["descriptors"] for one in looks]
    middle, several = len(looks) // 2, min(max(1, len(looks) // 8), 5)
    assert min(descriptors[-several:]) == min(descriptors[:several]), descriptors
    assert max(descriptors) <= min(descriptors) + 2, descriptors
    assert min(memory[-several:]) - min(memory[middle : middle + several]) < GROWTH, memory
    assert max(memory) - memory[0] < in_all, memory
    return memory


def in_mb(memory: Sequence[float]) -> str:
    """As figures show it."""
    return ", ".join(f"{one:.1f}" for one in memory) + " MB"
