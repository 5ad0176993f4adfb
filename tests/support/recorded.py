# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m recorded OPTIONS`: record(**OPTIONS), with OPTIONS as JSON, and a tracer that only logs its calls.

What became of it is the last line on standard output. `follows` of OPTIONS says what comes of following reloads.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from tracer.model.module_change import ModuleChange
from tracer.model.snapshot import Call, Outcome, Snapshot
from tracer.trace.recording import CommandError, record

CHANGES = {
    "loaded": ModuleChange("kvm_intel", traced=True),
    "refused": ModuleChange("kvm_intel", traced=False, problem="why"),
}


class Tracer:
    """Ten calls between two snapshots."""

    def __init__(self, follows: list[str]) -> None:
        self.follows, self.snapshots = follows, 0

    def snapshot(self, patience: float = 0) -> Snapshot:
        """Ten more calls."""
        self.snapshots += 1
        return Snapshot("toggle", calls={Call(1, "read", "enable", "other", "f"): Outcome(10 * self.snapshots)})

    def follow(self) -> ModuleChange | None:
        """The next change of the module."""
        change = self.follows.pop(0) if self.follows else ""
        if change == "broken":
            raise OSError(change)
        return CHANGES.get(change)


#: What is ignored once a recording has ended.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def signals() -> tuple[set[Any], dict[int, Any]]:
    """The signal mask and dispositions of this process."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, []), {number: signal.getsignal(number) for number in range(1, 32)}


def main() -> None:
    """See the module."""
    options = json.loads(sys.argv[1])
    tracer, (mask, dispositions) = Tracer(options.pop("follows", [])), signals()
    passed: list[float] = []

    def progress(seconds: float) -> None:
        if not passed:
            os.write(1, b"started\n")  # at once: the command writes there, too
        passed.append(seconds)

    result: dict[str, Any] = {}
    try:
        made = record(tracer, progress=progress, **options)
    except CommandError as error:
        result |= {"error": str(error), "status": error.status}
    else:
        counts = [outcome.calls for outcome in made.counted.calls.values()]
        result |= {"seconds": made.seconds, "status": made.status, "notes": made.notes, "counts": counts}
        result |= {"started": made.started.isoformat()}
    wanted = dispositions | dict.fromkeys(ENDING, signal.SIG_IGN)
    result |= {"snapshots": tracer.snapshots, "progress": len(passed), "restored": signals() == (mask, wanted)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
