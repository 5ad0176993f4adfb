# SPDX-License-Identifier: GPL-2.0-or-later
"""What the patch saves a filter update, in emulated instructions: the KVM_RUN that applies it, with no tracer attached.

The workload reads the TSC around each KVM_RUN, and Bochs' TSC ticks once an instruction. Both kvm_intel are loaded in
one boot, one vCPU each, one MSR denied and allowed in turn.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

HERE = Path(__file__).resolve().parent
UPDATES = 101
TICKS = re.compile(r"^(\w+): ticks: n=(\d+) min=(\d+) median=(\d+) p90=(\d+) max=(\d+)$", re.MULTILINE)
INSIDE = f"""
for variant in unpatched patched; do
  kvm-module $variant
  workload --updates {UPDATES} --initial-run --ticks | sed -n "s/^ticks: /$variant: &/p"
done"""


@dataclass(frozen=True)
class Ticks:
    """Instructions of a KVM_RUN that applied a filter update, over `count` of them."""

    count: int
    least: int
    median: int
    p90: int
    most: int


def measure(host: str) -> dict[str, Ticks]:
    """The ticks by variant of kvm_intel on HOST. Exits if they cannot be had."""
    command = [sys.executable, f"{HERE}/run", "--host", host, "--timeout", "600", "--", "sh", "-c", INSIDE]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    found = {name: Ticks(*map(int, numbers)) for name, *numbers in TICKS.findall(done.stdout)}
    if done.returncode or found.keys() != {"unpatched", "patched"}:
        sys.exit(f"saving: the run on {host} ended with {done.returncode} and said: {done.stdout}")
    return found


def main() -> None:
    """Print a row for each host."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "hosts", nargs="*", default=["bookworm", "trixie"], help="bookworm and trixie have both modules"
    )
    rows = []
    for host in parser.parse_args().hosts:
        found = measure(host)
        unpatched, patched = found["unpatched"], found["patched"]
        saved = unpatched.median - patched.median
        spread = "; ".join(f"{t.least:,} to {t.most:,}" for t in (unpatched, patched))
        rows.append((host, unpatched.median, patched.median, saved, f"{saved / unpatched.median:.1%}", spread))
    headers = ("host", "unpatched", "patched", "saved", "", "unpatched; patched: least to most")
    print(f"Instructions of a KVM_RUN that applies a filter update, median of {UPDATES}, no tracer attached")
    print(tabulate(rows, headers, tablefmt="github", intfmt=","))


if __name__ == "__main__":
    main()
