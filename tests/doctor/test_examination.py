# SPDX-License-Identifier: GPL-2.0-or-later
"""The whole examination of machines made of files: what it finds, and how that is printed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from machines import (
    AMD_NAMES,
    EXITS,
    FAILED,
    MODPROBE,
    NAMES,
    OK,
    PASS,
    RELEASE,
    TOGGLE,
    UNKNOWN,
    WARNING,
    Host,
    status,
)

from tracer.doctor.check import Check
from tracer.doctor.examination import examine, explain_eperm, obstacle
from tracer.doctor.output import as_json, as_text
from tracer.kernel.machine import Machine
from tracer.kernel.symbols import Symbols


def test_a_good_host_needs_no_fix(host: Host) -> None:
    assert [(c.name, c.state, c.fix) for c in examine(host.machine)] == [(name, OK, None) for name in NAMES]
    assert obstacle(host.machine) is None
    assert {c.name: c.detail for c in examine(host.machine)} == {
        "cpu": "Xeon Gold 6338 has VMX",
        "kvm-intel": "loaded nested=Y enable_apicv=N",
        "symbols": f"layout toggle (kernels 5.13-6.16): {', '.join(TOGGLE)}",
        "exits": f"--exits probes {', '.join(EXITS)}; "
        "no exits: accesses that pass, that the virtual APIC serves, or that a guest's user space tries",
        "livepatch": "no livepatch or other module has a function that msrtrace probes",
        "library": "libbcc.so.0",
        "headers": f"/lib/modules/{RELEASE}/build",
        "bcc": f"0.26.0 in {host.site}/bcc",
        "btf": "vmcs01.msr_bitmap is at 0x1ab8 in struct vcpu_vmx",
        "lockdown": "none",
        "capabilities": "CAP_SYS_ADMIN",
        "perf-event-paranoid": "3, which does not affect root",
        "bpf": "the kernel has BPF and kprobes",
        "processes": "those of VMs are seen",
        "tracefs": "mounted at /sys/kernel/tracing",
    }


def test_a_good_host_with_an_amd_cpu_needs_no_fix(amd: Host) -> None:
    assert [(c.name, c.state, c.fix) for c in examine(amd.machine)] == [(name, OK, None) for name in AMD_NAMES]
    assert obstacle(amd.machine) is None
    assert {c.name: c.detail for c in examine(amd.machine)[:3]} == {
        "cpu": "AMD EPYC 7543 has SVM",
        "kvm-amd": "loaded nested=1 avic=N",
        "symbols": f"layout pass (kernels 5.10-6.16): {', '.join(PASS)}",
    }


def test_several_obstacles_are_all_named(host: Host) -> None:
    host.remove("usr/src")
    host.remove("usr/lib/python3/dist-packages/bcc")
    host.write("proc/sys/kernel/ftrace_enabled", "0\n")
    host.unload()
    assert obstacle(host.machine) == (
        f"kvm_intel is not loaded: {MODPROBE}; and not only that (headers, bcc, tracefs): sudo msrtrace doctor"
    )


def _garbage(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\0[:=\n1 2\n" * 3)


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _absent(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("spoil", [_garbage, _empty, _directory, _absent])
def test_no_damaged_file_makes_it_raise(host: Host, spoil: Callable[[Path], None]) -> None:
    for file in [f for f in host.root.rglob("*") if f.is_file() and not f.is_symlink()]:
        before = file.read_bytes()
        spoil(file)
        host.check("cpu")
        explain_eperm(host.machine)
        obstacle(host.machine)
        as_json(examine(host.machine), host.machine)
        if file.is_dir():
            file.rmdir()
        file.write_bytes(before)
    assert obstacle(host.machine) is None


def test_what_an_empty_machine_cannot_show_is_unknown(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "nothing", 1000, RELEASE)
    states = {check.name: check.state for check in examine(machine)}
    assert [name for name in NAMES if states[name] is UNKNOWN] == [
        "cpu",
        "kvm-intel",
        "symbols",
        "exits",
        "livepatch",
        "btf",
        "capabilities",
        "perf-event-paranoid",
    ]
    checks = {check.name: check for check in examine(machine)}
    assert checks["cpu"].detail == f"cannot read {tmp_path}/nothing/proc/cpuinfo: No such file or directory"
    assert checks["cpu"].fix == "sudo msrtrace doctor"


def test_symbols_are_read_once_before_tracing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Mock(wraps=Symbols.read)
    monkeypatch.setattr(Symbols, "read", read)
    assert obstacle(host.machine) is None
    assert host.machine.symbols.find("vmx_msr_filter_changed")
    assert read.call_count == 1
    host.remove("proc/kallsyms")
    unknown = {check.name for check in examine(host.machine) if check.state is UNKNOWN}
    assert unknown == {"symbols", "exits", "livepatch", "btf"}  # read again


def test_the_checks_import_neither_bcc_nor_click() -> None:
    code = (
        "import sys\nfrom tracer.doctor.examination import *\nfrom tracer.doctor.output import *\n"
        "machine = Machine.here()\nchecks = examine(machine)\n"
        "obstacle(machine), explain_eperm(machine), as_text(checks), as_json(checks, machine)\n"
        "assert not {'bcc', 'click'} & set(sys.modules)\nprint(*(check.name for check in checks))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout.split()[2:]) == (0, "", NAMES[2:])


def test_eperm_by_seccomp(host: Host) -> None:
    host.write("proc/self/status", status(seccomp=2))
    assert explain_eperm(host.machine) == (
        "the kernel refused: probably the seccomp filter of the container or service: allow bpf and perf_event_open: "
        "docker run --cap-add SYS_ADMIN, which older seccomp profiles ask for, or --security-opt seccomp=unconfined "
        "(systemd: SystemCallFilter=)"
    )


def test_eperm_by_something_unknown(host: Host) -> None:
    assert explain_eperm(host.machine) == (
        "the kernel refused: probably SELinux or another security module: see sudo dmesg and "
        "sudo ausearch -m avc -ts recent"
    )


CHECKS = [
    Check("cpu", OK, "has VMX"),
    Check("kvm-intel", FAILED, "not loaded", MODPROBE),
    Check("btf", UNKNOWN, "not yet", "fix kvm-intel first"),
    Check("tracefs", WARNING, "not mounted", "mount it"),
]


def test_each_fix_is_below_its_check() -> None:
    assert as_text(CHECKS) == (
        "ok       cpu        has VMX\n"
        "FAILED   kvm-intel  not loaded\n"
        "           -> sudo modprobe kvm_intel\n"
        "unknown  btf        not yet\n"
        "           -> fix kvm-intel first\n"
        "warning  tracefs    not mounted\n"
        "           -> mount it\n"
        "\n"
        "1 to fix before msrtrace can trace here"
    )
    assert as_text(CHECKS[:1]).endswith("\n\nnothing found that prevents tracing here")
    assert as_text([]) == "\nnothing found that prevents tracing here"


def test_colors_change_nothing_else() -> None:
    colored = as_text(CHECKS, color=True)
    assert "\x1b[1;31mFAILED \x1b[0m  kvm-intel  not loaded" in colored
    for code in ("\x1b[32m", "\x1b[33m", "\x1b[36m", "\x1b[1;31m", "\x1b[0m"):
        colored = colored.replace(code, "")
    assert colored == as_text(CHECKS)


def test_the_json_of_checks(host: Host) -> None:
    assert as_json(CHECKS[:2], host.machine) == (
        '{\n  "schema": "msrtrace-doctor/1",\n  "kernel": "6.1.0-56-amd64",\n  "layout": "toggle",\n  "ok": false,\n'
        '  "checks": [\n    {\n      "name": "cpu",\n      "state": "ok",\n      "detail": "has VMX",\n'
        '      "fix": null\n    },\n    {\n      "name": "kvm-intel",\n      "state": "failed",\n'
        '      "detail": "not loaded",\n      "fix": "sudo modprobe kvm_intel"\n    }\n  ]\n}'
    )


def test_the_json_names_kernel_and_layout(host: Host) -> None:
    document = json.loads(as_json(examine(host.machine), host.machine))
    assert list(document) == ["schema", "kernel", "layout", "ok", "checks"]
    assert (document["ok"], [check["name"] for check in document["checks"]]) == (True, NAMES)
    host.unload()
    document = json.loads(as_json(examine(host.machine), host.machine))
    assert (document["ok"], document["layout"]) == (False, None)
