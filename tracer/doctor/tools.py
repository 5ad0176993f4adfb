# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks of what compiles the BPF program: BCC and kernel headers. BCC is found without an import, which loads LLVM."""

from __future__ import annotations

import re
from importlib.machinery import PathFinder
from pathlib import Path

from tracer.doctor.check import Found, State
from tracer.doctor.containers import in_container, in_wsl
from tracer.doctor.kernels import is_of_a_distribution
from tracer.doctor.packages import distribution, install_bcc, install_headers, install_library, os_release
from tracer.kernel.headers import (
    CARRIED,
    COMMON,
    headers_of_any_kernel,
    headers_of_running_kernel,
    kernel_carries_headers,
)
from tracer.kernel.machine import Machine, search
from tracer.model.options import BACKENDS

#: What attaches: tracer/program/bcc_library.py.
_LIBRARIES = ("libbcc_bpf.so.0", "libbcc.so.0")
#: Where the dynamic linker looks for what is not in its list (ld.so(8)), as Debian and others have these directories.
_USUAL_PLACES = ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib")

_MOUNTS = "-v /lib/modules:/lib/modules:ro -v /usr/src:/usr/src:ro"

#: The oldest Python that msrtrace runs in (pyproject.toml).
OLDEST_PYTHON = (3, 10)
_SHIPPED = "install a wheel of msrtrace that has the compiled BPF program (make wheel): it needs BCC's library alone"


def check_library(machine: Machine) -> Found:
    """BCC's library, which attaches probes.

    The dynamic linker has a list of all that it knows (musl has none), and also looks where libraries usually are: the
    list is not yet new while a package manager starts the service of what it has just installed.
    """
    cache = machine.at("/etc/ld.so.cache")
    if not cache.exists() or "LD_LIBRARY_PATH" in machine.environ:
        return State.OK, "looked for when tracing starts: the dynamic linker has no list here", None
    known = cache.read_bytes()
    for name in _LIBRARIES:
        if name.encode() in known or any(machine.at(f"{place}/{name}").exists() for place in _USUAL_PLACES):
            return State.OK, name, None
    install = install_library(machine) or "install BCC's library (libbcc) with the system's package manager"
    return State.FAILED, f"BCC's library, which attaches probes, is missing ({' and '.join(_LIBRARIES)})", install


def _compiled(machine: Machine) -> str:
    """That nothing needs to be compiled, as a backend that would be tried already is; "" if none is."""
    compiled = " and ".join(sorted(machine.compiled))
    others = sorted({*BACKENDS} - machine.compiled)
    if not others:  # which backend would be tried need not be asked, which takes time
        return f"not needed: the BPF program is already compiled, for {compiled}"
    if not machine.compiled.intersection(machine.backends or BACKENDS):
        return ""
    return f"not needed: the BPF program is already compiled for {compiled} (not for {' and '.join(others)})"


def _why(machine: Machine) -> str:
    """Why the BPF program must be compiled."""
    if machine.compiled:
        return f"the BPF program is compiled only for {' and '.join(sorted(machine.compiled))}, which is not used here"
    return "this msrtrace came without the compiled BPF program"


def check_headers(machine: Machine) -> Found:
    """Those of the running kernel, which BCC finds itself, or of any other kernel."""
    if done := _compiled(machine):
        return State.OK, done, None
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
    return _no_headers(
        machine, f"no kernel headers, which BCC needs to compile ({_why(machine)}): {missing[0]} does not exist"
    )


def _no_headers(machine: Machine, detail: str) -> Found:
    """What to do where there are none: a package, if one certainly has those of the running kernel."""
    install, contained = install_headers(machine), in_container(machine)
    if install:
        detail += f" (in a container, mount the host's: {_MOUNTS})" if contained else ""
        return State.FAILED, detail, install
    if distribution(machine):
        detail += f"; and that kernel is not known to be one of {os_release(machine).get('NAME', 'its distribution')}'s"
    return State.FAILED, detail, _other_headers(machine, contained)


def _other_headers(machine: Machine, contained: bool) -> str:
    """What to do where no package of the distribution certainly has the headers of the running kernel."""
    needed = f"the headers of kernel {machine.release} (those of any kernel will do)"
    if in_wsl(machine):
        own = "sudo modprobe kheaders, if the kernel carries its headers"
        return f"{own}; else set BCC_KERNEL_SOURCE to its prepared sources, or to {needed}"
    if contained or is_of_a_distribution(machine.release):
        where = "" if contained else "if this is a container, "
        return f"{where}mount the headers of the host ({_MOUNTS}); or set BCC_KERNEL_SOURCE to {needed}"
    return f"install {needed}, or set BCC_KERNEL_SOURCE to them"


def check_bcc(machine: Machine) -> Found:
    """BCC's Python module, which compiles, for the running Python."""
    if done := _compiled(machine):
        return State.OK, done, None
    install = install_bcc(machine) or "install BCC's Python module with the system's package manager"
    spec = PathFinder.find_spec("bcc", list(machine.python_path))
    if spec is None or spec.origin is None:
        return _no_bcc(machine, install)
    origin = Path(spec.origin)
    package = origin.parent if origin.name == "__init__.py" else origin
    if not re.search(r"^class BPF\b", origin.read_text(errors="replace"), re.MULTILINE):
        if package.parent == Path.cwd():
            return State.FAILED, f"{package} in the working directory hides BCC", "start msrtrace elsewhere: cd /"
        detail = f"{package} is not BCC but PyPI's unrelated package bcc (it has no BPF)"
        return State.FAILED, detail, f"{machine.python} -m pip uninstall bcc && {install}"
    version = search(r"__version__ = '([^']+)'", (package / "version.py").read_text())
    return State.OK, f"{version} in {package}", None


def _no_bcc(machine: Machine, install: str) -> Found:
    """Why the running Python does not find BCC: for the system's Python it may be installed."""
    found = _bcc_of_the_system(machine)
    if old := _too_old(machine, found):
        needed = ".".join(map(str, OLDEST_PYTHON))
        detail = f"BCC's package is for Python {old}, and msrtrace needs {needed} ({_why(machine)})"
        return State.FAILED, detail, _SHIPPED
    if found is None:
        return State.FAILED, f"BCC is not installed ({_why(machine)}; PyPI's bcc is an unrelated package)", install
    detail = f"BCC is installed for /usr/bin/python3, but {machine.python} does not find it"
    venv = f"/usr/bin/python3 -m venv --clear --system-site-packages {machine.venv or 'msrtrace-venv'}"
    return State.FAILED, detail, f"{venv}, then install msrtrace there"


def _bcc_of_the_system(machine: Machine) -> Path | None:
    """BCC's module for the system's Python: Debian's is in python3, others have a version in that name."""
    return next(iter(sorted(machine.at("/usr/lib").glob("python3*/*-packages/bcc"))), None)


def _too_old(machine: Machine, bcc: Path | None) -> str:
    """The version of the Python that BCC's package is for, if it is known and too old for msrtrace, else "".

    That is by its directory, or by /usr/bin/python3, which is a link to a name with the version.
    """
    name = bcc.parent.parent.name if bcc else ""
    if name in ("", "python3"):
        try:
            name = machine.at("/usr/bin/python3").readlink().name
        except OSError:  # no link
            return ""
    version = search(r"^(?:platform-)?python(3\.\d+)$", name)
    return version if version and tuple(map(int, version.split("."))) < OLDEST_PYTHON else ""
