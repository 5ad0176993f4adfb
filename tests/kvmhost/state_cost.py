# SPDX-License-Identifier: GPL-2.0-or-later
"""What a read of the states of all vCPUs costs (`make state-cost`): instructions on an emulated host, ms here.

A boot of an AMD host that counts instructions. The kernel's part is only measured there, as this machine may have no
vCPUs; what Python makes of the same records, here as well.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from answers import AMD
from cache import BUILD, HERE
from cost import instructions_per_second
from tabulate import tabulate

from tracer.program.structs import Member, Record
from tracer.trace.state_reader import readings

VCPUS = (100, 1000)
TIMEOUT_SECONDS = 1200
_REPEATS = 15


def milliseconds(work: Callable[[], object]) -> float:
    """The least CPU time that the work takes."""
    found = []
    for _ in range(_REPEATS):
        begun = time.thread_time()
        work()
        found.append(time.thread_time() - begun)
    return min(found) * 1000


def main() -> None:
    """Print the table of docs/cost.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("host", nargs="?", default="trixie-amd", choices=AMD)
    host = parser.parse_args().host
    with tempfile.TemporaryDirectory(prefix="state-cost-", dir=BUILD) as folder:
        command = [sys.executable, f"{HERE}/run", "--host", host, "--count-instructions", "--in", f"{HERE}/scenarios"]
        what = ["python3", "/in/state_cost_guest.py", *map(str, VCPUS)]
        options = ["--out", folder, "--timeout", str(TIMEOUT_SECONDS), "--", *what]
        if status := subprocess.call([*command, *options], stdout=sys.stderr):
            sys.exit(f"state-cost: the run on {host} ended with {status}")
        found = json.loads(Path(folder, "state_cost.json").read_text())
        rows: dict[str, list[str]] = {}
        for number in map(str, VCPUS):
            record = Record({name: Member(*place) for name, place in found[number]["members"].items()})
            content = Path(folder, f"{number}.raw").read_bytes()
            for step, seconds in found[number]["steps"].items():
                rows.setdefault(step, []).append(f"{seconds * instructions_per_second(host) / 1e6:,.1f}")
            here = milliseconds(lambda: readings([content], record))  # noqa: B023 (called at once)
            rows.setdefault("reading the records, ms here", []).append(f"{here:.1f}")
    table = [[step, *cells] for step, cells in rows.items()]
    headers = [f"millions of instructions on {host}", *(f"{number:,} vCPUs" for number in VCPUS)]
    print(tabulate(table, headers, tablefmt="github", colalign=["left", *["right"] * len(VCPUS)]))


if __name__ == "__main__":
    main()
