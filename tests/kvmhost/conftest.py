# SPDX-License-Identifier: GPL-2.0-or-later
"""Boots each emulated host once, one a core at the same time, and hands out what the scenarios left.

Tests that need a boot of their own name a function that does it, and the host that must be asked for:
`@pytest.mark.beside(boot=function, host=WHOLE[0])`. It runs beside the other boots, once for all tests that name it,
and its result is the fixture `beside`. Those that take too long for `make test` name themselves in place of a host, and
are asked for by that name: `--hosts container`, `ansible`, `operators-hour`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import children
import pytest
from answers import AMD, LAYOUTS, PER_UPDATE, RECALCULATING
from dispositions import as_begun
from hosts import HOSTS
from qemu import WITH_IBPB

HERE = Path(__file__).parent
RUN = HERE / "run"
#: Booted as Debian packed it, with its decompressor and KASLR; the others without, which is faster.
PACKED = ["trixie-amd"]
#: Where everything is tried, with the oldest BCC; on the other hosts of AMD, what depends on the kernel; on those of
#: Intel, which take five times as long, what depends on the vendor.
WHOLE = ["bookworm-amd"]
#: Where scenarios/stress.py runs alone, on CPUS of them. QEMU runs each on a CPU of this machine, Bochs all in turn: of
#: Intel's hosts there are only those whose kernels may preempt everywhere.
ON_SEVERAL_CPUS = [*AMD, "sid", "backports"]
#: Hosts with both variants of kvm_intel: there the patch is a question.
PATCHABLE = ["bookworm", "trixie"]
CPUS = 2
#: Boots of Intel's other hosts with CPUS, for scenarios/swapping.py alone: in Bochs each takes 80 s of a CPU, too much
#: for `make test`, so they are asked for by these names (`--hosts trixie-2-cpus`).
ON_REQUEST = {f"{host}-{CPUS}-cpus": host for host in PATCHABLE}
#: Fixtures that give what the scenarios found, and on which hosts; `collected` is every host with one CPU.
FIXTURES = {
    "several_cpus": ON_SEVERAL_CPUS,
    "stressed": [host for host in LAYOUTS if host not in AMD],
    "swapping_on": [*(host for host in ON_SEVERAL_CPUS if not host.startswith("filter-only")), *ON_REQUEST],
    "with_ibpb": AMD,  # those of several CPUs
    "of_amd": AMD,
    "whole": WHOLE,
    "both": PATCHABLE,
    "other": [host for host in LAYOUTS if host not in PATCHABLE],
    "observed": [host for host, layout in LAYOUTS.items() if layout != "filter-only"],  # calls can be
    "with_bitmaps": [host for host in LAYOUTS if not host.startswith("filter-only")],  # that kernels describe
    "without_bitmaps": [host for host in LAYOUTS if host.startswith("filter-only")],
    "timed": [host for host in PER_UPDATE if host not in RECALCULATING],
    "toggled": ["bookworm"],
    "superseded": ["sid"],
    "filter_only": ["filter-only"],
}
#: Hosts on which fentry cannot be had, and what msrtrace says there.
NO_FENTRY = {
    **dict.fromkeys(
        ("filter-only", "filter-only-amd", "backports"),
        "the backend fentry cannot be used here: .*; --backend kprobe can",
    ),
}
#: Hosts whose kernel cannot tell who called a function with a probe on its return, such as the witness's.
CALLERS_HIDDEN = ["filter-only-amd"]
#: Hosts whose kernel may preempt a program at fentry, which then misses calls: there `auto` takes kprobes.
PREEMPTIBLE = ["sid", "sid-amd", "backports", "backports-amd"]
STATUS = 37  # what the scenarios end with, to see that it comes through
TIMEOUT_SECONDS = 3600
#: What a boot may take with all that must be built and downloaded before it.
LIMIT_SECONDS = 2 * TIMEOUT_SECONDS
#: What one that is told to end may take for that.
END_SECONDS = 60
#: One per core; each takes 2 GB of memory and more.
AT_ONCE = max(2, min(len(os.sched_getaffinity(0)), 4))


class Boot(NamedTuple):
    """Which host is booted, with how many CPUs."""

    host: str
    cpus: int = 1

    @property
    def name(self) -> str:
        """Of the folder that gets what it leaves."""
        return self.host if self.cpus == 1 else f"{self.host}-{self.cpus}-cpus"


#: In this order they start, and what boots beside them after them: what ends last is short, and leaves no core idle.
LONGEST_FIRST = [
    *(Boot("trixie"), Boot("bookworm"), Boot("sid"), Boot("backports"), Boot("filter-only")),
    *(Boot(host, CPUS) for host in ("sid", "backports", *ON_REQUEST.values())),
    *(Boot(host, cpus) for host in AMD for cpus in (1, CPUS)),
]


def rig(*words: str) -> subprocess.CompletedProcess[str]:
    """`run` with these words: its status and what it printed."""
    return subprocess.run(
        as_begun([sys.executable, RUN, *words]),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=LIMIT_SECONDS,
    )


def variants(host: str) -> list[str]:
    """Those of the HOST's module that have BTF, the stock one first."""
    return [variant for variant in HOSTS[host].variants if variant != "nobtf"]


def stress_runs(host: str) -> list[str]:
    """The runs of scenarios/stress.py on HOST with one CPU: the plain one, unless several are as good.

    Where the kernel preempts, both backends, as `auto` is decided by what each misses there.
    """
    if host in AMD:
        return []
    return ["kprobe", "fentry"] if host in PREEMPTIBLE else ["kprobe"]


@dataclass(frozen=True)
class Collected:
    """What one boot left: JSON per scenario, and the traces of the kernel's own tracer."""

    host: str
    folder: Path
    status: int
    log: str

    @property
    def variants(self) -> list[str]:
        """Of its module, the stock one first; those without BTF are apart."""
        return variants(self.host)

    def scenario(self, name: str) -> dict[str, Any]:
        """What a scenario found. The test fails if it broke, or if the boot did."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            pytest.fail(f"{self.host} left no {name} (status {self.status}):\n{self.log[-6000:]}", pytrace=False)
        found: dict[str, Any] = json.loads(file.read_text())
        if "broken" in found:
            pytest.fail(f"{name} broke on {self.host}:\n{found['broken']}", pytrace=False)
        return found


def _boot(boot: Boot, folder: Path) -> Collected:
    host, cpus = boot
    command = [str(RUN), "--host", host, "--in", str(HERE / "scenarios"), "--out", str(folder)]
    options = ["--timeout", str(TIMEOUT_SECONDS), "--keep-log", str(folder / "log"), "--"]
    # With one CPU time is instructions, for what waits and for what is measured: what is idle takes none of ours.
    options[:0] = ["--cpus", str(cpus)] if cpus > 1 else ["--count-instructions"]
    if cpus > 1 and host in AMD:
        options[:0] = ["--cpu-model", WITH_IBPB]
    if cpus == 1 and host in PACKED:
        options.insert(0, "--packed")
    if cpus > 1:
        what = ["python3", "/in/stress.py", *(["--swapping"] if host in ON_REQUEST.values() else [])]
    else:
        part = [] if host in WHOLE else ["--kernel"] if host in AMD else ["--vendor"]
        what = ["python3", "/in/everything.py", *part, f"--stress={','.join(stress_runs(host))}", *variants(host)]
    run = subprocess.Popen(
        as_begun([sys.executable, *command, *options, *what]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        output, _ = run.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        run.terminate()
        output, _ = run.communicate()
        output += f"\nended after {LIMIT_SECONDS} s\n"
    (folder / "output").write_text(output)
    return Collected(host, folder, run.returncode, output)


#: What a test marked `beside` needs: it gets an empty folder, boots a host, and returns what was seen.
Beside = Callable[[Path], Any]


def _emptied(folder: Path) -> Path:
    """FOLDER without what an earlier session left there."""
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    folder.mkdir(parents=True)
    return folder


class Boots:
    """The boots of a session: under way from its start, so that the unit tests pass the time."""

    def __init__(self, boots: list[Boot], beside: list[Beside], folder: Path) -> None:
        self._executor = ThreadPoolExecutor(AT_ONCE, thread_name_prefix=children.SESSION)
        self._results: dict[Boot, Future[Collected]] = {
            boot: self._executor.submit(_boot, boot, _emptied(folder / boot.name)) for boot in boots
        }
        self._beside: dict[Beside, Future[Any]] = {
            function: self._executor.submit(function, _emptied(folder / function.__name__)) for function in beside
        }

    def __getitem__(self, boot: Boot) -> Collected:
        return self._results[boot].result()

    def beside(self, function: Beside) -> Any:
        """What FUNCTION returned; raises what it raised."""
        return self._beside[function].result()

    def end(self) -> None:
        """End what still runs: a session that is cut short does not look at all of them."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        started = [future for future in (*self._results.values(), *self._beside.values()) if not future.cancelled()]
        for number in (signal.SIGTERM, signal.SIGKILL):
            if wait(started, 0 if number == signal.SIGTERM else END_SECONDS).not_done:
                for pid in children.of_session():
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
        self._executor.shutdown(wait=True)


_boots_key = pytest.StashKey[Boots]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "beside(boot, host): the function BOOT boots HOST beside the others, else WHOLE[0] (tests/kvmhost)"
    )


def _hosts(config: pytest.Config) -> list[str]:
    return [host for host in str(config.getoption("--hosts")).split(",") if host and host != "none"]


def _beside(item: pytest.Item) -> Beside | None:
    """The function that ITEM's marker names."""
    marker = item.get_closest_marker("beside")
    return marker.kwargs["boot"] if marker else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Say of tests that boot a host of their own why they do not; and put what waits for hosts behind all else."""
    items.sort(key=lambda item: bool(_beside(item) or _looks_at(item)))
    hosts = _hosts(config)
    for item in items:
        marker = item.get_closest_marker("beside")
        if marker and (host := marker.kwargs.get("host", WHOLE[0])) not in hosts:
            reason = f"{host} is not among --hosts {','.join(hosts)}" if hosts else "--hosts none: no hosts asked for"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Power on the hosts that any collected test will look at, and no others."""
    if session.config.option.collectonly:
        return
    looked_at = {boot for item in session.items for boot in _looks_at(item)}
    asked_for = [Boot(host, cpus) for cpus in (1, CPUS) for host in _hosts(session.config)]
    asked_for += [Boot(ON_REQUEST[name], CPUS) for name in _hosts(session.config) if name in ON_REQUEST]
    hosts = sorted({*asked_for} & looked_at, key=LONGEST_FIRST.index)
    marked = [_beside(item) for item in session.items if not item.get_closest_marker("skip")]
    beside = list(dict.fromkeys(function for function in marked if function))
    if hosts or beside:
        # Whichever a test waits for, those before it may take as long as they can.
        limit = pytest.mark.timeout(LIMIT_SECONDS * (1 + (len(hosts) + len(beside)) // AT_ONCE))
        for item in session.items:
            if _looks_at(item) or _beside(item):
                item.add_marker(limit)
        folder = session.config.rootpath / "build/collected"
        session.config.stash[_boots_key] = Boots(hosts, beside, folder)


def _looks_at(item: pytest.Item) -> list[Boot]:
    """The boots whose scenarios ITEM judges."""
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return [_boot_of(name, str(parameters[name])) for name in ("collected", *FIXTURES) if name in parameters]


def _boot_of(fixture: str, host: str) -> Boot:
    if host in ON_REQUEST:
        return Boot(ON_REQUEST[host], CPUS)
    return Boot(host, CPUS if fixture in ("several_cpus", "swapping_on", "with_ibpb") else 1)


def pytest_sessionfinish(session: pytest.Session) -> None:
    boots = session.config.stash.get(_boots_key, None)
    if boots:
        boots.end()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    hosts = _hosts(metafunc.config)
    for name in metafunc.fixturenames:
        if name == "collected" or name in FIXTURES:
            wanted = [host for host in hosts if host in FIXTURES.get(name, LAYOUTS)]
            metafunc.parametrize(name, wanted, indirect=True)


def _collected(request: pytest.FixtureRequest) -> Collected:
    """What the scenarios found on one host."""
    return request.config.stash[_boots_key][_boot_of(str(request.fixturename), request.param)]


collected = pytest.fixture(_collected)
several_cpus = pytest.fixture(_collected)
whole = pytest.fixture(_collected)
both = pytest.fixture(_collected)
other = pytest.fixture(_collected)
observed = pytest.fixture(_collected)
with_bitmaps = pytest.fixture(_collected)
without_bitmaps = pytest.fixture(_collected)
timed = pytest.fixture(_collected)
toggled = pytest.fixture(_collected)
stressed = pytest.fixture(_collected)
swapping_on = pytest.fixture(_collected)
with_ibpb = pytest.fixture(_collected)
of_amd = pytest.fixture(_collected)
superseded = pytest.fixture(_collected)
filter_only = pytest.fixture(_collected)


@pytest.fixture
def beside(request: pytest.FixtureRequest) -> Any:
    """What the function that the test's marker names returned."""
    function = _beside(request.node)
    assert function, "the fixture `beside` needs the marker of that name"
    return request.config.stash[_boots_key].beside(function)
