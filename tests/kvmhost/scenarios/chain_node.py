# SPDX-License-Identifier: GPL-2.0-or-later
"""One host of the chain that ends in Prometheus: `chain_node.py ADDRESS UPDATES MODULE...`.

msrtrace serves on ADDRESS. For each MODULE in turn it is loaded and the workload runs inside `msrtrace report`, whose
file goes to /out/MODULE.json. Whoever scrapes from outside has PAUSE_SECONDS on either side to see the counts at rest.
"""

from __future__ import annotations

import sys
import time

from guest import OUT, Msrtrace, load, output_of, scrape, vendor

PAUSE_SECONDS = 8  # some scrapes
LONGEST_SECONDS = 900
WORKLOAD = ["workload", "--vms", "2", "--vcpus", "2", "--interval", "250", "--initial-run", "--updates"]


def main() -> None:
    """Run it, and say on standard output how far it is."""
    address, updates, *modules = sys.argv[1:]
    load(modules[0])
    msrtrace = Msrtrace("--web.listen-address", address, "--backend", "kprobe")
    print("chain: serving", flush=True)
    for number, module in enumerate(modules):
        if number:
            load(module)
            msrtrace.wait_for(f"{vendor().module} was loaded again", number)
        time.sleep(PAUSE_SECONDS)
        command = ["msrtrace", "report", "--label", module, "-o", str(OUT / f"{module}.json"), "--"]
        done = output_of(*command, *WORKLOAD, updates, timeout=LONGEST_SECONDS)
        if done["status"]:
            raise RuntimeError(done)
        print(f"chain: {module} done", flush=True)
        time.sleep(PAUSE_SECONDS)
    (OUT / "metrics.txt").write_text(scrape(address))
    print(msrtrace.end()["log"], flush=True)


main()
