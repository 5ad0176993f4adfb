# SPDX-License-Identifier: GPL-2.0-or-later
"""What the patch saves a filter update with no tracer attached: calls, and instructions of the KVM_RUN that applies it.

The workload reads the TSC around each KVM_RUN, and the TSC of an emulated host ticks once an instruction. Both variants
of the KVM module are loaded in one boot, one vCPU each, one MSR denied and allowed in turn. Calls are counted
afterwards, by the kernel's own kprobe events.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hosts import AMD, HOSTS, INTEL
from tabulate import tabulate

HERE = Path(__file__).resolve().parent
UPDATES = 101
#: What changes intercepts. AMD's guests get a CPUID: Linux 6.12 takes one without for Intel's, and so intercepts more.
CALLS = {INTEL: "vmx_enable_intercept_for_msr vmx_disable_intercept_for_msr", AMD: "set_msr_interception_bitmap"}
OPTIONS = {INTEL: "--initial-run", AMD: "--initial-run --cpuid 1"}
TICKS = re.compile(r"^(\w+): ticks: n=(\d+) min=(\d+) median=(\d+) p90=(\d+) max=(\d+)$", re.MULTILINE)
HITS = re.compile(r"^(\w+): (\d+) updates: (\d+) calls$", re.MULTILINE)
INSIDE = """
cd /sys/kernel/tracing
for variant in unpatched patched; do
  kvm-module $variant
  workload {options} --updates {updates} --ticks | sed -n "s/^ticks: /$variant: &/p"
  for updates in 0 {updates}; do
    for function in {calls}; do echo "p:saving/$function $function" >>kprobe_events; done
    echo 1 >events/saving/enable
    workload {options} --updates $updates >/dev/null
    echo "$variant: $updates updates: $(awk '{{ sum += $2 }} END {{ print sum + 0 }}' kprobe_profile) calls"
    echo 0 >events/saving/enable
    echo >kprobe_events
  done
done"""


@dataclass(frozen=True)
class Ticks:
    """Instructions of a KVM_RUN that applied a filter update, over `count` of them."""

    count: int
    least: int
    median: int
    p90: int
    most: int


def measure(host: str) -> dict[str, tuple[Ticks, int]]:
    """The ticks, and the calls an update, by variant of the KVM module on HOST. Exits if they cannot be had."""
    vendor = HOSTS[host].vendor
    inside = INSIDE.format(options=OPTIONS[vendor], updates=UPDATES, calls=CALLS[vendor])
    command = [sys.executable, f"{HERE}/run", "--host", host, "--count-instructions", "--timeout", "600"]
    done = subprocess.run([*command, "--", "sh", "-e", "-c", inside], stdout=subprocess.PIPE, text=True, check=False)
    ticks = {name: Ticks(*map(int, numbers)) for name, *numbers in TICKS.findall(done.stdout)}
    calls: dict[str, dict[int, int]] = {name: {} for name in ticks}
    for name, updates, number in HITS.findall(done.stdout):
        calls[name][int(updates)] = int(number)
    if done.returncode or any(by_updates.keys() != {0, UPDATES} for by_updates in calls.values()):
        sys.exit(f"saving: the run on {host} ended with {done.returncode} and said: {done.stdout}")
    return {name: (ticks[name], (calls[name][UPDATES] - calls[name][0]) // UPDATES) for name in ticks}


def main() -> None:
    """Print a row for each host."""
    parser = argparse.ArgumentParser(description=__doc__)
    both = [name for name, host in HOSTS.items() if host.built]
    parser.add_argument("hosts", nargs="*", default=both, help=", ".join(both))
    hosts = parser.parse_args().hosts
    if not {*hosts} <= {*both}:
        parser.error(f"hosts with both modules are {', '.join(both)}")
    rows = []
    for host in hosts:
        found = measure(host)
        (unpatched, calls_unpatched), (patched, calls_patched) = found["unpatched"], found["patched"]
        saved = unpatched.median - patched.median
        spread = "; ".join(f"{t.least:,} to {t.most:,}" for t in (unpatched, patched))
        calls = f"{calls_unpatched}; {calls_patched}"
        rows.append((host, calls, unpatched.median, patched.median, saved, f"{saved / unpatched.median:.1%}", spread))
    headers = ("host", "calls", "unpatched", "patched", "saved", "", "unpatched; patched: least to most")
    print("A filter update without (unpatched) and with the patch, no tracer attached: calls, and")
    print(f"instructions of the KVM_RUN that applies it, median of {UPDATES}")
    print(tabulate(rows, headers, tablefmt="github", intfmt=","))


if __name__ == "__main__":
    main()
