# SPDX-License-Identifier: GPL-2.0-or-later
"""The dashboard with real data: emulated hosts of both vendors, msrtrace on them, Prometheus, pictures of its answers.

`chain_pictures.py DIR` leaves DIR/*.png, and what the hosts said in DIR/chain.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from chain import REPO, SCRAPE_SECONDS, Node, chain

#: A minute under the workload, so that rates have something to show.
NODES = [
    Node("kvm1", ("unpatched",), "unpatched", 240),
    Node("kvm2", ("patched",), "patched", 240),
    Node("kvm3", ("unpatched",), "none", 480, host="trixie-amd"),  # it is there first, and to be busy until the last
]


def main() -> int:
    """Run the chain, then draw what Prometheus has of it, up to a moment at which all hosts were busy."""
    out = Path(sys.argv[1]).resolve()
    folder = out / "chain"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with chain(folder, NODES) as server:
        start = server.value(f"min(min_over_time(timestamp(up == 1)[2h:{SCRAPE_SECONDS}s]))")
        busy = f"rate(msrtrace_filter_updates_total[{5 * SCRAPE_SECONDS}s]) > 0"
        end = server.value(f"min(max_over_time(timestamp({busy})[2h:{SCRAPE_SECONDS}s]))") - 8 * SCRAPE_SECONDS
        options = ["--from", str(start), "--to", str(end), "--scrape-interval", str(SCRAPE_SECONDS), "--out", str(out)]
        check = [f"{REPO}/tests/dashboard/check", "--prometheus", server.url, *options]
        return subprocess.run(check, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
