# SPDX-License-Identifier: GPL-2.0-or-later
"""The server in a process of its own, so that memory, threads and descriptors are its own.

`python -m serving '{"collection": 0.2, ...}'` prints its URL; for each line of standard input, what of its memory is in
use; at the end, how long each collection took.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from command import ON_STANDIN
from made import crowd
from needs import tool
from prometheus_client import CollectorRegistry

from tracer.export import server as server_module
from tracer.export.metrics import SnapshotCollector
from tracer.export.security import TlsFiles
from tracer.export.server import Server
from tracer.export.web_config import WebConfig
from tracer.model.snapshot import Snapshot


class Served:
    """The process, as the tests see it."""

    def __init__(self, process: subprocess.Popen[str], err: Path) -> None:
        assert process.stdout
        self.process, self._err = process, err
        self.url = process.stdout.readline().strip()
        assert self.url, err.read_text()
        self.port = int(self.url.rpartition(":")[2].partition("/")[0])

    def said(self) -> str:
        """What it wrote to standard error."""
        return self._err.read_text()

    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def resident(self) -> float:
        """Resident memory, in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def in_use(self) -> tuple[float, int]:
        """MB that malloc() has given out, and how many of Python's own blocks are: not what waits to be used again."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        memory, blocks = self.process.stdout.readline().split()
        return int(memory) / 1e6, int(blocks)

    def processor(self) -> float:
        """CPU time, in seconds."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100

    def collected(self) -> list[float]:
        """How long each collection's reading took, in seconds; this ends the process."""
        out, _ = self.process.communicate("", timeout=30)
        found: list[float] = json.loads(out)
        return found


@contextmanager
def served(directory: Path, **options: Any) -> Iterator[Served]:
    """The server, with these options (see `main`)."""
    err = directory / "err"
    with (
        err.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "serving", json.dumps(options)],
            env=ON_STANDIN,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            yield Served(process, err)
        finally:
            process.kill()


def certificate(directory: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    cert, key = directory / f"{name}.pem", directory / f"{name}.key"
    request = [tool("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subject = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run([*request, *subject, "-keyout", key, "-out", cert], capture_output=True, check=True, timeout=60)
    return cert, key


def main(*, collection: float = 0, patience: float = 30, vms: int = 1, config: str = "", **tls: str) -> None:
    """Serve until standard input ends.

    :param collection: how long it takes to read the counts, in seconds
    :param patience: how long the server waits for a client, in seconds
    :param vms: so many times 69 series
    :param config: a file for --web.config.file
    :param tls: `cert`, `key` and `ca` of TlsFiles
    """
    counts, took = crowd(vms), list[float]()

    def take() -> Snapshot:
        started = time.monotonic()
        time.sleep(collection)
        took.append(time.monotonic() - started)
        return counts

    def complain(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    server_module._PATIENCE = patience
    registry = CollectorRegistry()
    registry.register(SnapshotCollector(take, "0.1.0"))
    security = WebConfig(config, complain) if config else TlsFiles(**tls, on_error=complain)
    server = Server(registry, ("127.0.0.1", 0), security=security, on_error=complain).start()
    print(server.url, flush=True)
    for _ in sys.stdin:
        gc.collect()  # what waits for that is 6,000 to 8,000 blocks, by chance
        print(_given_out(), sys.getallocatedblocks() - len(took), flush=True)
    print(json.dumps(took))


class _Mallinfo2(ctypes.Structure):
    """mallinfo(3)."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names.split())


def _given_out() -> int:
    """What malloc() has given out, in bytes."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo2
    info = libc.mallinfo2()
    return int(info.uordblks + info.hblkhd)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
