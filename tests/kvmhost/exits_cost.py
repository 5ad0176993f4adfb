# SPDX-License-Identifier: GPL-2.0-or-later
"""What tracers add to an exit of RDMSR or WRMSR (`make bench-exits`), in emulated instructions.

A boot of each host. A tracer that counts must have counted exactly the exits that the guest made, else there is no
table; but perf on kvm_exit counts those of other instructions, too, and is only held to count no fewer.
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

sys.path.insert(0, str(Path(__file__).parent))

from bench import tools
from cache import BUILD, HERE, sh
from hosts import HOSTS
from tabulate import tabulate

DEFAULT = ("bookworm-amd", "trixie-amd", "bookworm", "trixie")
TIMEOUT_SECONDS = 2400
#: In scenarios/exits_cost_guest.py
KVMEXIT = "kvmexit of BCC's tools"


def measure(host: str) -> dict[str, Any]:
    """What scenarios/exits_cost_guest.py found. Exits if it broke, or a tracer counted wrongly."""
    with tempfile.TemporaryDirectory(prefix="exits-cost-", dir=BUILD) as folder:
        into, out = Path(folder, "in"), Path(folder, "out")
        shutil.copytree(HERE / "scenarios", into)
        shutil.copy(HERE / "metrics_text.py", into)
        sh(["cp", "-al", tools(HOSTS[host]), into / "tools"])
        run = [sys.executable, f"{HERE}/run", "--host", host, "--count-instructions", "--in", str(into)]
        run += ["--out", str(out), "--timeout", str(TIMEOUT_SECONDS), "--", "python3", "/in/exits_cost_guest.py"]
        if status := subprocess.call(run, stdout=sys.stderr):
            sys.exit(f"exits-cost: the run on {host} ended with {status}")
        found: dict[str, Any] = json.loads((out / "exits_cost.json").read_text())
    made = found["made"]
    if found["tracers"].get(KVMEXIT, {}).get("exits") == 0:  # Debian 12's on 6.1 shows none
        print(f"exits-cost: {KVMEXIT} counted nothing on {host}, and is left out", file=sys.stderr)
        del found["tracers"][KVMEXIT]
    counted = {name: one["exits"] for name, one in found["tracers"].items() if "exits" in one}
    wrong = {name: n for name, n in counted.items() if n < made or (n > made and name != "perf stat on kvm_exit")}
    if wrong:
        sys.exit(f"exits-cost: the guest made {made} exits; counted were {wrong}")
    return found


def table(host: str, found: dict[str, Any]) -> str:
    """As Markdown: what an exit takes without a tracer, and what each adds to it."""
    tracers = found["tracers"]
    kinds = [*tracers["none"]["instructions"]]
    rows = []
    for name, one in tracers.items():
        least = {kind: tracers["none"]["instructions"][kind] if name != "none" else 0 for kind in kinds}
        rows.append([name, *(f"{one['instructions'][kind] - least[kind]:,.0f}" for kind in kinds)])
    rows[0][0] = "none: the exit itself"
    return tabulate(rows, [host, *kinds], tablefmt="github", colalign=["left", *["right"] * len(kinds)])


def main() -> None:
    """Print a table for each host."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("hosts", nargs="*", default=DEFAULT, help=f"by default {', '.join(DEFAULT)}")
    for host in parser.parse_args().hosts:
        print(table(host, measure(host)), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
