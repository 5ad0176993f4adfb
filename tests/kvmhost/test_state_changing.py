# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace state --watch` prints what changed and nothing else, `--diff` names what differs: scenarios/changing.py."""

from __future__ import annotations

import json
import re
from typing import Any

from answers import AMD
from changing import NAME, UUIDS
from conftest import Collected

ALLOWS = "allows what no range decides"
FS, GS = "0xc0000100 FS_BASE", "0xc0000101 GS_BASE"
FS_DENIED, GS_DENIED = f"{FS}, read and write: denies it", f"{GS}, write: denies it"
UNREADABLE = r"msrtrace: warning: bitmaps cannot be read, so who intercepts what is unknown: [^\n]*\n"


def watched(collected: Collected) -> dict[str, Any]:
    found: dict[str, Any] = collected.scenario("changing")["watched"]
    return found


def lines(collected: Collected) -> list[str]:
    """What it printed after its first reading, without the times of day, which do not run backwards."""
    text = watched(collected)["stdout"]
    assert text.endswith("\n")
    printed = re.split(r"\n\n(?=\d\d:\d\d:\d\d\.\d{3} watching for changes, every 0\.2 s\n)", text)[1].splitlines()
    found = [re.fullmatch(r"(\d\d:\d\d:\d\d\.\d{3}) (.*)", line) for line in printed]
    assert all(found), printed
    times = [match[1] for match in found if match]
    assert sorted(times) == times or times[-1] < times[0]  # midnight
    return [match[2] for match in found if match][1:]


def expected(collected: Collected, *, readable: bool) -> list[str]:
    """Line by line; those on bitmaps only where these can be read."""
    first, second, third = watched(collected)["pids"]
    web, module = f"{NAME} (pid {first})", "kvm_amd" if collected.host in AMD else "kvm_intel"
    each = [f"{web}: vCPU {vcpu}" for vcpu in range(2)]
    both, rw, w = f"{web}: vCPU 0-1", f"read and write of {FS}", f"write of {GS}"
    accesses = [
        [f"{both}: {rw}: passed -> pending deny"] + [f"{vcpu}: {rw}: pending deny -> filter" for vcpu in each],
        [f"{both}: {rw}: filter -> pending allow", f"{both}: {w}: passed -> pending deny"]
        + [
            f"{vcpu}: {line}"
            for vcpu in each
            for line in (f"{rw}: pending allow -> passed", f"{w}: pending deny -> filter")
        ],
        [f"{both}: {w}: filter -> pending allow"] + [f"{vcpu}: {w}: pending allow -> passed" for vcpu in each],
    ]
    filters = [
        f"{web}: new filter: {ALLOWS}; {FS_DENIED}",
        f"{web}: filter replaced: new range {GS_DENIED}; range removed {FS_DENIED}",
        f"{web}: filter removed; it was: {ALLOWS}; {GS_DENIED}",
    ]
    wanted = [line for new, its in zip(filters, accesses, strict=True) for line in (new, *(its if readable else []))]
    return [
        *wanted,
        f"{NAME} (pid {second}): vCPU 0: new VM, filter: none",
        f"{NAME} (pid {second}): vCPU 0: VM gone",
        f"{both}: VM gone",
        f"{module} was unloaded",
        f"{module} was loaded again",
        f"{NAME} (pid {third}): vCPU 0: new VM, filter: none",
    ]


def test_each_change_is_a_line_and_there_are_no_others(of_amd: Collected) -> None:
    readable = not of_amd.host.startswith("filter-only")
    assert lines(of_amd) == expected(of_amd, readable=readable)
    assert watched(of_amd)["status"] == 0
    assert re.fullmatch("" if readable else UNREADABLE, watched(of_amd)["stderr"])


def difference(collected: Collected, sides: str) -> dict[str, Any]:
    """What --diff says, as JSON."""
    done = collected.scenario("changing")["compared"][sides]
    assert (done["status"], done["stderr"]) == (0, "")
    found: dict[str, Any] = json.loads(done["stdout"])
    return found


def wanted_rows(*, swapped: bool = False, readable: bool = True) -> list[dict[str, Any]]:
    """Of the VM without the filter and the one with it: FS_BASE, SYSENTER_CS's writes, and one that KVM intercepts."""
    rows = [
        ("0x174", "IA32_SYSENTER_CS", "write", "passed", "filter"),
        ("0x2ff", "MTRRdefType", "read_write", "kvm", "both"),
        ("0xc0000100", "FS_BASE", "read_write", "passed", "filter"),
    ]
    rows = rows if readable else []
    order = ("msrs", "name", "access", "b", "a") if swapped else ("msrs", "name", "access", "a", "b")
    msrs = [dict(zip(order, row, strict=True)) for row in rows]
    of_vcpus = {"vcpus": [0, 1], "unreadable": {"a": False, "b": False}, "msrs": msrs, "nested_msrs": []}
    return [of_vcpus] if msrs else []


def test_files_differ_in_what_the_new_filter_denies(of_amd: Collected) -> None:
    readable = not of_amd.host.startswith("filter-only")
    found = difference(of_amd, "files")
    [vm] = found["vms"]
    assert vm["a"]["uuid"] == vm["b"]["uuid"] == UUIDS[0]
    assert vm["differences"] == wanted_rows(readable=readable)
    assert [row["msrs"] for row in vm["filter"]["only_b"]] == ["0x174", "0x2ff", "0xc0000100"]
    assert vm["filter"]["only_a"] == []
    alike = found["no_difference" if readable else "not_compared"]
    assert [(one["name"], one["uuid"]) for one in alike] == [(NAME, UUIDS[1])]
    assert not any(found[part] for part in ("only_a", "only_b", "hosts", "warnings"))


def test_vms_of_one_name_are_told_apart_by_uuid(of_amd: Collected) -> None:
    readable = not of_amd.host.startswith("filter-only")
    compared = of_amd.scenario("changing")["compared"]
    [vm] = difference(of_amd, "UUIDs")["vms"]
    assert [vm[side]["uuid"] for side in "ab"] == UUIDS[:2]
    assert [vm[side]["pid"] for side in "ab"] == compared["vmms"]
    assert vm["differences"] == wanted_rows(swapped=True, readable=readable)
    pids = ", ".join(map(str, sorted(compared["vmms"])))
    assert compared["names"] == {
        "status": 1,
        "stdout": "",
        "stderr": f"msrtrace: error: 2 VMs are called {NAME}, and differ: give one of the pids {pids}\n",
    }
