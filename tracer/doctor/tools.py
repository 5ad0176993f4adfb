# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks of what compiles the BPF program: BCC and kernel headers. BCC is found without an import, which loads LLVM."""

from __future__ import annotations

import re
from importlib.machinery import PathFinder
from pathlib import Path

from tracer.doctor.check import Found, State
from tracer.doctor.packages import install_command
from tracer.kernel.headers import (
    CARRIED,
    COMMON,
    headers_of_any_kernel,
    headers_of_running_kernel,
    kernel_carries_headers,
)
from tracer.kernel.machine import Machine, search

_COMPILED = "the BPF program is already compiled"
_WHY = "this msrtrace came without the compiled BPF program"
#: What attaches: tracer/program/bcc_library.py.
_LIBRARIES = ("libbcc_bpf.so.0", "libbcc.so.0")


def check_library(machine: Machine) -> Found:
    """BCC's library, which attaches probes; the dynamic linker lists every one that it knows, but musl has no list."""
    cache = machine.at("/etc/ld.so.cache")
    if not cache.exists() or "LD_LIBRARY_PATH" in machine.environ:
        return State.OK, "looked for when tracing starts: the dynamic linker has no list here", None
    known = cache.read_bytes()
    for name in _LIBRARIES:
        if name.encode() in known:
            return State.OK, name, None
    install = install_command(machine, 2) or "install BCC's library (libbcc) with the system's package manager"
    return State.FAILED, f"BCC's library, which attaches probes, is missing ({' and '.join(_LIBRARIES)})", install


def check_headers(machine: Machine) -> Found:
    """Those of the running kernel, which BCC finds itself, or of any other kernel."""
    if machine.compiled:
        return State.OK, f"not needed: {_COMPILED}", None
    root, override = machine.root, machine.environ.get("BCC_KERNEL_SOURCE")
    tree, missing = headers_of_running_kernel(root, machine.release, override)
    if not missing:
        return State.OK, tree, None
    if missing[0].endswith(COMMON) and kernel_carries_headers(root, machine.release):
        return State.OK, f"the kernel's own copy, {CARRIED}, which BCC unpacks", None
    if override:
        return State.FAILED, f"BCC_KERNEL_SOURCE is set, but there is no {missing[0]}", "unset BCC_KERNEL_SOURCE"
    if others := headers_of_any_kernel(root):
        return State.OK, f"{others[-1]}: those of another kernel, which will do", None
    detail = f"no kernel headers, which BCC needs to compile ({_WHY}): {missing[0]} does not exist"
    if machine.at("/.dockerenv").exists() or machine.at("/run/.containerenv").exists():
        detail += " (in a container, mount the host's: -v /lib/modules:/lib/modules:ro -v /usr/src:/usr/src:ro)"
    generic = f"install the headers of kernel {machine.release}, or set BCC_KERNEL_SOURCE to them"
    return State.FAILED, detail, install_command(machine, 0) or generic


def check_bcc(machine: Machine) -> Found:
    """BCC's Python module, which compiles, for the running Python."""
    if machine.compiled:
        return State.OK, f"not needed: {_COMPILED}", None
    install = install_command(machine, 1) or "install BCC's Python module with the system's package manager"
    spec = PathFinder.find_spec("bcc", list(machine.python_path))
    if spec is None or spec.origin is None:
        if not any(machine.at("/usr/lib").glob("python3*/*-packages/bcc")):
            return State.FAILED, f"BCC is not installed ({_WHY}; PyPI's bcc is an unrelated package)", install
        detail = f"BCC is installed for /usr/bin/python3, but {machine.python} does not find it"
        venv = f"/usr/bin/python3 -m venv --clear --system-site-packages {machine.venv or 'msrtrace-venv'}"
        return State.FAILED, detail, f"{venv}, then install msrtrace there"
    origin = Path(spec.origin)
    package = origin.parent if origin.name == "__init__.py" else origin
    if not re.search(r"^class BPF\b", origin.read_text(errors="replace"), re.MULTILINE):
        if package.parent == Path.cwd():
            return State.FAILED, f"{package} in the working directory hides BCC", "start msrtrace elsewhere: cd /"
        detail = f"{package} is not BCC but PyPI's unrelated package bcc (it has no BPF)"
        return State.FAILED, detail, f"{machine.python} -m pip uninstall bcc && {install}"
    version = search(r"__version__ = '([^']+)'", (package / "version.py").read_text())
    return State.OK, f"{version} in {package}", None
