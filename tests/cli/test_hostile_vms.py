# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs whose names are hostile, from the command lines of their VMMs through everything that shows them."""

from __future__ import annotations

import html
import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from faults import Figures
from fleets import LOCAL, fleet_reports
from fleets import host as stored_host
from made import report, toggle, views
from made_states import made, state_views
from made_vms import state, vm
from needs import tool
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as text_format
from rich.cells import cell_len
from sampled import shown

from tracer.export.exposition import exposed
from tracer.export.metrics import SnapshotCollector
from tracer.live.table import View
from tracer.live.top import frame
from tracer.live.view import LEVELS
from tracer.model.snapshot import Snapshot, VmInfo
from tracer.report.report import Report
from tracer.report.state_file import StateFile
from tracer.trace.vm_info import NAME_LIMIT, VmInfos, vm_info

#: Given to -name of QEMU; no argument has a NUL.
NAMES: dict[str, bytes] = {
    "terminal sequences": b"\x1b[2J\x1b]0;owned\x07\x1b[31mweb\x9b0m",
    "quotes": b'a",pid="1",vm="other',
    "backslashes": rb"a\",b\\n\x00\\" + b"\\",
    "lines": b'web\nmsrtrace_up 1\n# HELP x\r\n# EOF\nmsrtrace_build_info{version="9"} 1',
    "invalid UTF-8": b"web\xff\xfe\xc0\x80\xed\xa0\x80\xf4\x90\x80\x80",
    "right-to-left marks": "web\u202egpj.exe\u2066\u200f\u061c".encode(),
    "invisible": "\u200b\ufeff\u2028\u2029\u00ad\U000e0041".encode(),
    "many marks on a letter": ("a" + "\u0301" * 5000).encode(),
    "wide": "\u6f22\U0001f600".encode() * 500,
    "markup": b"<script>alert(1)</script>&lt;|a|`x`**b**[c](javascript:d)",
    "templates": b"{{ 7 * 7 }}{% raw %}${HOME}$(id)%s%n{0}",
    "a megabyte": b"x" * (1 << 20),
    "a megabyte of escapes": b"\x1b[31m" * 200_000,
    "a formula": b'=HYPERLINK("http://x")',
    "only spaces": b" \t ",
}


def start(proc: Path, pid: int, name: bytes, comm: bytes = b"qemu-system-x86") -> None:
    """A process of a VMM, in a /proc that is made up."""
    directory = proc / str(pid)
    directory.mkdir()
    (directory / "cmdline").write_bytes(b"qemu-system-x86_64\0-name\0guest=" + name.replace(b",", b",,") + b"\0")
    (directory / "comm").write_bytes(comm + b"\n")
    (directory / "stat").write_text(f"{pid} (x) S {'0 ' * 18}{pid * 7} 1 2\n")


@pytest.fixture(scope="module")
def infos(tmp_path_factory: pytest.TempPathFactory) -> dict[int, VmInfo]:
    """What msrtrace knows of such VMs, by pid."""
    proc = tmp_path_factory.mktemp("proc")
    found: dict[int, VmInfo] = {}
    for pid, name in enumerate(NAMES.values(), 1000):
        start(proc, pid, name, comm=name[:15])
        info = vm_info(pid, proc)
        assert info
        found[pid] = info
    return found


def snapshot(infos: dict[int, VmInfo]) -> Snapshot:
    counted = [toggle(101, pid=pid) for pid in infos]
    return replace(
        counted[0],
        calls={call: outcome for one in counted for call, outcome in one.calls.items()},
        updates={pid: seen for one in counted for pid, seen in one.updates.items()},
        vms=infos,
    )


def exposition(counted: Snapshot, as_openmetrics: bool) -> str:
    registry = CollectorRegistry()
    registry.register(SnapshotCollector(lambda: counted, "0.1.0"))
    return exposed(registry, as_openmetrics).decode()


@pytest.mark.fault("hostile", "names of VMs in /metrics", f"{len(NAMES)} names: {', '.join(NAMES)}")
def test_names_are_read_back_as_they_are_known(infos: dict[int, VmInfo], figures: Figures) -> None:
    counted = snapshot(infos)
    longest = 0
    for as_openmetrics, parse in ((False, text_format), (True, openmetrics)):
        text = exposition(counted, as_openmetrics)
        families = list(parse(text))
        names = {
            int(sample.labels["pid"]): sample.labels["vm"]
            for family in families
            for sample in family.samples
            if "vm" in sample.labels
        }
        assert names == {pid: info.name for pid, info in infos.items()}
        assert not [family for family in families if not family.name.startswith("msrtrace_")]
        assert text.replace("\n", "").isprintable()
        longest = max(longest, *map(len, text.splitlines()))
    promtool = [tool("promtool"), "check", "metrics"]
    done = subprocess.run(promtool, input=exposition(counted, False), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) in ((0, ""), (3, "")), done.stderr  # 3: of style
    assert max(len(info.name) for info in infos.values()) == NAME_LIMIT
    figures["read back"] = f"{2 * len(infos)} of {2 * len(infos)}, by prometheus_client; promtool accepts all"
    figures["longest line"] = f"{longest} characters"


def texts(infos: dict[int, VmInfo]) -> Iterator[tuple[str, str]]:
    """All that shows VMs: what it is called, and the text."""
    for width in (40, 80, 200):
        for level in range(len(LEVELS)):
            lines = shown(frame(replace(snapshot(infos), by_vm=True), 2.0), View(level=level), width)
            yield f"top, {width} columns, level {level}", "\n".join(lines)
    found = made(state(*(vm(info.name, pid, uuid=info.uuid) for pid, info in infos.items())))
    assert isinstance(found, StateFile)
    yield from ((f"state {name}", text) for name, text in state_views(found).items())
    whole = report(snapshot(infos))
    yield from ((f"report {name}", text) for name, text in views(whole).items())
    for report_of_host in hosts(infos):
        yield from ((f"fleet {name}", text) for name, text in views(report_of_host).items())


def hosts(infos: dict[int, VmInfo]) -> list[Report]:
    """Reports of hosts whose target labels, in Prometheus, are what VMs were meant to be called."""
    raw = [name.decode(errors="replace")[:5000] for name in NAMES.values()]
    now = 1_000_000.0
    found = []
    for name in raw:
        stored = stored_host({**LOCAL, "instance": name}, [now - 30, now - 15, now])
        found += fleet_reports(stored, now, window=60)
    return found


@pytest.mark.fault(
    "hostile",
    "names of VMs, and labels, wherever they are shown",
    "top, states, reports, comparisons, fleets: every format",
)
def test_nothing_that_is_shown_has_a_control_character(infos: dict[int, VmInfo], figures: Figures) -> None:
    kinds, longest = set(), 0
    for kind, text in texts(infos):
        kinds.add(kind)
        bad = {letter for letter in text.replace("\n", "") if not letter.isprintable()}
        assert not bad, (kind, bad)
        longest = max(longest, len(text))
        if "top" in kind:
            assert max(map(cell_len, text.splitlines())) <= int(kind.split()[1])
        if "html" in kind:
            assert "<script>alert" not in text
            assert "javascript:d" not in html.unescape(text).replace("[c](javascript:d)", "")
        if "json" in kind:
            json.loads(text)
    assert len(kinds) > 20
    figures["texts"] = f"{len(kinds)} kinds, without a control character"
    figures["the longest"] = f"{longest / 1000:.0f} KB"


@pytest.mark.fault(
    "hostile", "10,000 VMs, each with another name", "one after another, 20 of them at a time", dear=True
)
def test_names_of_vms_that_ended_are_not_kept(tmp_path: Path, figures: Figures) -> None:
    vms = VmInfos(tmp_path)
    started = time.process_time()
    most = 0
    for pid in range(1, 10_001):
        start(tmp_path, pid, b"vm-%d" % pid)
        if pid > 20:
            for file in (tmp_path / str(pid - 20)).iterdir():
                file.unlink()
            (tmp_path / str(pid - 20)).rmdir()
        found = vms.info(pid)
        assert found
        assert found.name == f"vm-{pid}"
        most = max(most, len(vms._infos), len(vms._started))
    used = time.process_time() - started
    assert most <= 2 * 20 + 101
    figures["names kept"] = f"{most} at most"
    figures["CPU time"] = f"{used / 10_000 * 1e6:.0f} \u00b5s a VM, with the files of this test"


@pytest.mark.fault("hostile", "10,000 VMs at a time, each with another name", "in /metrics, --by-vm")
def test_the_metrics_of_many_vms_are_bounded_by_the_vms(figures: Figures) -> None:
    counted = replace(toggle(pid=1), vms={pid: VmInfo(f"{pid:0128d}") for pid in range(1, 10_001)})
    started = time.process_time()
    text = exposition(counted, False)
    used = time.process_time() - started
    vms = text.count("\nmsrtrace_vm_info{")
    assert vms == 10_000
    assert len(text) < 10_000 * 400
    assert used < 5
    figures["series of what VMs are called"] = f"{vms}"
    figures["size"] = f"{len(text) / 1e6:.1f} MB"
    figures["CPU time"] = f"{used:.2f} s"
