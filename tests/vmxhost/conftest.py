"""Boots each emulated host once, all at the same time, and hands out what the scenarios left."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
RUN = HERE / "run"
VARIANTS = {"bookworm": ["patched", "unpatched"], "trixie": ["patched", "unpatched"]}
#: Where everything is tried; on the other hosts, what depends on the kernel.
WHOLE = ["bookworm"]
STATUS = 37  # what the scenarios end with, to see that it comes through
TIMEOUT_SECONDS = 2400


@dataclass(frozen=True)
class Collected:
    """What one boot left: JSON per scenario, and the traces of the kernel's own tracer."""

    host: str
    folder: Path
    status: int
    log: str

    @property
    def variants(self) -> list[str]:
        return VARIANTS.get(self.host, ["patched"])

    def scenario(self, name: str) -> dict[str, Any]:
        """What a scenario found. The test fails if it broke, or if the boot did."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            pytest.fail(f"{self.host} left no {name} (status {self.status}):\n{self.log[-6000:]}", pytrace=False)
        found: dict[str, Any] = json.loads(file.read_text())
        if "broken" in found:
            pytest.fail(f"{name} broke on {self.host}:\n{found['broken']}", pytrace=False)
        return found


def _boot(host: str, folder: Path) -> Collected:
    folder.mkdir(parents=True)
    command = [str(RUN), "--host", host, "--in", str(HERE / "scenarios"), "--out", str(folder)]
    options = ["--timeout", str(TIMEOUT_SECONDS), "--keep-log", str(folder / "log"), "--"]
    what = ["python3", "/in/everything.py", *([] if host in WHOLE else ["--kernel"]), *VARIANTS.get(host, ["patched"])]
    done = subprocess.run(
        [sys.executable, *command, *options, *what],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    (folder / "output").write_text(done.stdout)
    return Collected(host, folder, done.returncode, done.stdout)


class Boots:
    """The boots of a session: under way from its start, so that the unit tests pass the time."""

    def __init__(self, hosts: list[str], folder: Path) -> None:
        self._executor = ThreadPoolExecutor(max_workers=2)  # one per core
        self._results: dict[str, Future[Collected]] = {
            host: self._executor.submit(_boot, host, folder / host) for host in hosts
        }

    def __getitem__(self, host: str) -> Collected:
        return self._results[host].result()

    def end(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


_boots_key = pytest.StashKey[Boots]()


def _hosts(config: pytest.Config) -> list[str]:
    return [host for host in str(config.getoption("--hosts")).split(",") if host and host != "none"]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Power the hosts on if any collected test will look at them."""
    wanted = [h for h in _hosts(session.config) if any(f"[{h}" in item.nodeid for item in session.items)]
    if wanted and not session.config.option.collectonly:
        folder = session.config.rootpath / "build/collected"
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        session.config.stash[_boots_key] = Boots(wanted, folder)


def pytest_sessionfinish(session: pytest.Session) -> None:
    boots = session.config.stash.get(_boots_key, None)
    if boots:
        boots.end()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    hosts = _hosts(metafunc.config)
    if "collected" in metafunc.fixturenames:
        metafunc.parametrize("collected", hosts, indirect=True)
    if "whole" in metafunc.fixturenames:
        metafunc.parametrize("whole", [host for host in hosts if host in WHOLE], indirect=True)


@pytest.fixture
def collected(request: pytest.FixtureRequest) -> Collected:
    """What the scenarios found on one host."""
    return request.config.stash[_boots_key][request.param]


@pytest.fixture
def whole(request: pytest.FixtureRequest) -> Collected:
    """The same, on a host where everything was tried."""
    return request.config.stash[_boots_key][request.param]
