# SPDX-License-Identifier: GPL-2.0-or-later
"""What tracers add to a filter update, in emulated instructions: msrtrace, its peers, and what an empty probe costs.

One boot per host, twenty minutes or so; in it each tracer runs alone on all variants of the KVM module. A tracer that
counts must have counted exactly what the workload did, else there is no table. How the numbers are made is said in
cost.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from answers import PER_UPDATE, PER_VCPU
from cache import BUILD, HERE, cached, sh
from cost import instructions_per_second, per_call
from hosts import HOSTS, Host, userland
from tabulate import tabulate

TOOLS = {"bpftrace": "bin/bpftrace", "linux-perf": "bin/perf", "bpfcc-tools": "sbin/kvmexit-bpfcc"}
#: How it is called, and with how many digits after the point it is shown.
TIMED = {"starts": ("A start of msrtrace, until it serves", 0), "scrapes": ("A scrape, with five VMs of two vCPUs", 1)}
TIMEOUT_SECONDS = 2400


def tools(host: Host) -> Path:
    """The programs of TOOLS for HOST, in bin, and in lib the libraries that they need and the image has not."""
    root = userland(host)
    packages = host.userland.lacking([*TOOLS], root)

    def make(work: Path) -> None:
        tree = work / "tree"
        tree.mkdir()
        host.userland.unpack(packages, tree, work / "downloads")
        for name in ("bin", "lib"):
            (work / name).mkdir()
        for program in TOOLS.values():
            shutil.copy(tree / "usr" / program, work / "bin")
        for folder in ("lib", "usr/lib"):
            for library in (tree / folder).glob("x86_64-linux-gnu/*.so*"):
                shutil.copy(library, work / "lib", follow_symlinks=False)
        for spare in (tree, work / "downloads"):
            shutil.rmtree(spare)

    inputs = [root.parent.name, [f"{package} {host.userland.candidate(package)}" for package in packages]]
    return cached(f"tools-{host.userland.name}", inputs, make)


def measure(host: str, only: str, variants: list[str]) -> dict[str, Any]:
    """What scenarios/bench_guest.py found on HOST, of the tracers with ONLY in their names. Exits if it broke."""
    kit = tools(HOSTS[host])
    with tempfile.TemporaryDirectory(prefix="bench-", dir=BUILD) as folder:
        into, out = Path(folder, "in"), Path(folder, "out")
        shutil.copytree(HERE / "scenarios", into)
        shutil.copy(HERE / "metrics_text.py", into)
        sh(["cp", "-al", kit, into / "tools"])
        command = [
            sys.executable,
            f"{HERE}/run",
            "--host",
            host,
            "--count-instructions",
            "--in",
            str(into),
            "--out",
            str(out),
        ]
        what = ["python3", "/in/bench_guest.py", f"--only={only}", *variants]
        status = subprocess.call([*command, "--timeout", str(TIMEOUT_SECONDS), "--", *what], stdout=sys.stderr)
        if status:
            sys.exit(f"bench: the run on {host} ended with {status}")
        found: dict[str, Any] = json.loads((out / "bench.json").read_text())
        return found


def miscounted(host: str, measured: dict[str, Any]) -> list[str]:
    """Every tracer that did not count what the workload did: a price without the goods."""
    wrong, updates = [], measured["updates"]
    for variant, by_tracer in measured["results"].items():
        calls, redundant = (updates * number for number in PER_UPDATE[host][variant])
        for tracer, found in by_tracer.items():
            if "calls" not in found:
                continue
            counted = (found["calls"], found["redundant"], found["updates"])
            created, useless = PER_VCPU[host]
            expected = (calls + created, None if found["redundant"] is None else redundant + useless, updates)
            if counted != expected:
                wrong.append(f"{tracer} on {variant} counted {counted}, not {expected}")
    return wrong


def table(host: str, measured: dict[str, Any]) -> str:
    """The table of one host as Markdown."""
    results, headers = measured["results"], ["tracer", "tells redundant"]
    for variant in results:
        calls, _ = PER_UPDATE[host][variant]
        headers += [f"{variant} ({calls} calls): KVM_RUN", "added", "per call"]
    rows = []
    for tracer, first in next(iter(results.values())).items():
        row: list[str] = [tracer, "yes" if first.get("redundant") is not None else "no" if "calls" in first else ""]
        for variant, by_tracer in results.items():
            found, untraced = by_tracer[tracer], by_tracer["none"]["ticks"]
            if tracer == "none":
                row += [f"{untraced:,}", "", ""]
            else:
                ticks = found["ticks"]
                row += [f"{ticks:,}", f"{ticks - untraced:,}", f"{per_call(host, variant, ticks, untraced):,.0f}"]
        rows.append(row)
    lines = [
        f"{host}, Linux {measured['release']}: instructions of the KVM_RUN that applies a filter update, median of "
        f"{measured['updates']}, emulated: the TSC ticks once an instruction",
        "",
        tabulate(rows, headers, tablefmt="github", colalign=["left", "left", *["right"] * 3 * len(results)]),
    ]
    for what, (words, digits) in TIMED.items():
        found = [
            f"{which}: {s * instructions_per_second(host) / 1e6:,.{digits}f}" for which, s in measured[what].items()
        ]
        if found:
            lines += ["", f"{words}, in millions of instructions: {'; '.join(found)}"]
    return "\n".join(lines) + "\n"


def parts_table(host: str, measured: dict[str, Any]) -> str:
    """What each thing that a program may do adds to a call, as Markdown."""
    [(variant, results)] = measured["results"].items()
    costs = {
        name.removeprefix("part: "): per_call(host, variant, found["ticks"], results["none"]["ticks"])
        for name, found in results.items()
        if name != "none"
    }
    rows = [[name, f"{cost - costs['nothing']:,.0f}"] for name, cost in costs.items() if name != "nothing"]
    lines = [
        f"{host}, Linux {measured['release']}: instructions that a program at a kprobe takes more than one that does "
        f"nothing, which takes {costs['nothing']:,.0f}",
        "",
        tabulate(rows, ["it does", "instructions"], tablefmt="github", colalign=["left", "right"]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print a table for each host."""
    parser = argparse.ArgumentParser(description=__doc__)
    both = [name for name, host in HOSTS.items() if host.built]
    parser.add_argument("hosts", nargs="*", default=both, help=f"those with both variants: {', '.join(both)}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="gets HOST.json, as measured, and HOST.md")
    parser.add_argument("--only", default="", metavar="WORD", help="the tracers that have WORD in their names")
    parser.add_argument("--parts", action="store_true", help="instead: what the parts of a BPF program take")
    args = parser.parse_args()
    for host in args.hosts:
        variants = [variant for variant in HOSTS[host].variants if variant != "nobtf"]
        found = measure(host, "part" if args.parts else args.only, variants[: 1 if args.parts else None])
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"{host}.json").write_text(json.dumps(found, indent=1) + "\n")
        wrong = miscounted(host, found)
        if wrong:
            sys.exit("bench: " + "\n".join(wrong))
        text = (parts_table if args.parts else table)(host, found)
        print(text, flush=True)
        if args.out:
            (args.out / f"{host}.md").write_text(text)


if __name__ == "__main__":
    main()
