# SPDX-License-Identifier: GPL-2.0-or-later
"""What a start of msrtrace costs here, up to its first scrape: milliseconds of CPU (user and system) by step.

`make start-cost` prints the table in docs/cost.md. Each start is a process of its own, the compiler's included;
the best of several, since what is more is other people's work. This machine may have no kvm_intel, so the program is
compiled for bookworm's kernel, the BTF is that of the kernel here, and the probes are attached nowhere: `make bench`
has a whole start, on an emulated host.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "support"), str(HERE / "kvmhost")]

_REPEATS = 5


def spent() -> float:
    """The CPU time of this process and its children, in milliseconds."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages) * 1000


def start() -> dict[str, float]:
    """The cost of each step of one start."""
    seen = {"Python": spent()}

    def step(name: str) -> None:
        seen[name] = spent() - sum(seen.values())

    from prometheus_client import CollectorRegistry, ProcessCollector

    import tracer.cli.run  # noqa: F401
    from tracer.export.exposition import exposed
    from tracer.export.metrics import SnapshotCollector
    from tracer.export.server import Server
    from tracer.kernel.btf import Btf, BtfError
    from tracer.kernel.symbols import Symbols
    from tracer.model.options import Options
    from tracer.model.vmx import VMX
    from tracer.program.compiler import compiled
    from tracer.program.loading import load
    from tracer.program.resources import resource as file
    from tracer.trace.plan import values, variants

    step("imports")
    Symbols.read()
    step("/proc/kallsyms")
    try:
        Btf.of_kernel().kernel_ids("schedule", "task_struct")
        step("BTF")
    except BtfError:
        pass  # this kernel has none
    from known import KnownBtf, symbols
    from made import crowd

    layout = next(layout for layout in VMX.layouts if layout.name == "toggle")
    there, options = symbols(layout), Options(backend="kprobe")
    btf = KnownBtf()
    [variant] = variants(layout, there, values(layout, btf, there, options), options, btf)
    step("of this measurement")
    program = compiled(file("bpf/msrtrace.c"), variant.definitions)
    step("BCC and LLVM, or the cached program")
    loaded = load(program, variant)
    step("loading it into the kernel")
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(SnapshotCollector(lambda: crowd(1), "0.1.0"))
    server = Server(registry, ("127.0.0.1", 0)).start()
    exposed(registry)
    server.shutdown()
    server.server_close()
    step("server and first text")
    loaded.close()
    del seen["of this measurement"]
    return seen


def best(headers: Path, cold: bool) -> dict[str, float]:
    """The least cost of each step of several starts; `cold`: with an empty cache."""
    runs = []
    with tempfile.TemporaryDirectory() as kept:
        for number in range(_REPEATS + (not cold)):
            cache = f"{kept}/{number if cold else 'same'}"
            environment = {**os.environ, "BCC_KERNEL_SOURCE": str(headers), "CACHE_DIRECTORY": cache}
            command = [sys.executable, __file__, "--once"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            runs.append(json.loads(done.stdout))
    del runs[: not cold]  # the one that filled it
    return {name: min(run[name] for run in runs) for name in runs[0]}


def main() -> None:
    """Print the table."""
    if "--once" in sys.argv:
        print(json.dumps(start()))
        return
    from hosts import HOSTS, kernel
    from known import one_tree
    from tabulate import tabulate

    with tempfile.TemporaryDirectory() as directory:
        one_tree(kernel(HOSTS["bookworm"]) / "usr/src", Path(directory))
        columns = [best(Path(directory), cold) for cold in (True, False)]
    rows = [[name, *(f"{column[name]:,.0f}" for column in columns)] for name in columns[0]]
    rows.append(["all", *(f"{sum(column.values()):,.0f}" for column in columns)])
    headers = ["ms of CPU", "first start", "later ones"]
    print(tabulate(rows, headers, tablefmt="github", colalign=["left", "right", "right"], disable_numparse=True))


if __name__ == "__main__":
    main()
