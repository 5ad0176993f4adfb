# SPDX-License-Identifier: GPL-2.0-or-later
"""What a host booted with systemd is like: health, sandboxes, packages from /in, and what outlives a reboot."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

OUT = Path("/out")
#: Properties of a service, and a command that its sandbox should not let through; each has a space of its own.
SANDBOXES = {
    "files": ("ProtectSystem=strict", "touch /etc/x"),
    "calls": ("SystemCallFilter=~@clock", "date -s 2020-01-01"),
    "namespaces": ("RestrictNamespaces=yes", "unshare -m true"),
    "processes": ("ProtectProc=invisible", "ls /proc/1"),
    "addresses": ("IPAddressDeny=any", "curl --max-time 2 http://127.0.0.1:9"),
    "memory": ("MemoryDenyWriteExecute=yes", "python3 -c __import__('mmap').mmap(-1,4096,prot=7)"),
}


def run(*command: str) -> dict[str, Any]:
    """Run COMMAND; its status and its output."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False
    )
    return {"status": done.returncode, "output": done.stdout}


def health() -> dict[str, Any]:
    """What systemd and the kernel say of themselves."""
    # This command is started by the last job of the boot.
    while (state := run("systemctl", "is-system-running")["output"].strip()) == "starting":
        time.sleep(0.2)
    return {
        "state": state,
        "failed": run("systemctl", "--failed", "--no-legend", "--plain")["output"],
        "init": Path("/proc/1/comm").read_text().strip(),
        "hostname": run("hostname")["output"].strip(),
        "machine-id": Path("/etc/machine-id").read_text().strip(),
        "modules": [line.split()[0] for line in Path("/proc/modules").read_text().splitlines()],
        "controllers": Path("/sys/fs/cgroup/cgroup.controllers").read_text().split(),
        "boots": run("journalctl", "--list-boots", "--quiet", "--no-pager")["output"].splitlines(),
    }


def sandboxed(option: str, command: str, *more: str) -> dict[str, Any]:
    """What becomes of COMMAND in a service with this OPTION."""
    options = ["-p", option, "-p", "User=nobody", "-p", "SystemCallErrorNumber=EPERM", *more]
    return run("systemd-run", "--quiet", "--wait", "--pipe", *options, *command.split(" "))


def main() -> None:
    """Collect, with a reboot in between; the second time the status says that all is there."""
    boot = int(os.environ["BOOT"])
    found: dict[str, Any] = {"health": health()}
    if boot == 1:
        found["verified"] = run("dpkg", "-V")
        found["sandboxed"] = {name: sandboxed(*how) for name, how in SANDBOXES.items()}
        found["user"] = sandboxed("DynamicUser=yes", "cat /proc/self/status", "-p", "AmbientCapabilities=CAP_BPF")
        found["modules"] = run("sh", "-c", "kvm-module nobtf && kvm-module none && kvm-module unpatched")
        sources = Path("/in/repository/kvmhost.list")
        Path("/etc/apt/sources.list.d/kvmhost.list").write_text(sources.read_text())
        found["update"] = run("apt-get", "update")
        found["install"] = run("apt-get", "install", "-y", "kvmhost-example")
        found["installed"] = run("jq", "-n", "6*7")
    (OUT / f"systemd-{boot}.json").write_text(json.dumps(found, indent=1))
    if boot == 1:
        print("before the reboot", flush=True)
        subprocess.run(["systemctl", "reboot"], check=True)
    print(f"boot {boot} ends", flush=True)
    raise SystemExit(40 + boot)


main()
