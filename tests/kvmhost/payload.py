# SPDX-License-Identifier: GPL-2.0-or-later
"""What goes into a guest beside its image: the checkout as an installed wheel, programs that drive KVM, a module."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from cache import HERE, REPO, cached, retried, sh
from hosts import Host, kernel, other_module, userland

#: What the wheel is made from.
PARTS = ["tracer", "bpf", "dashboards"]


def guest_programs() -> Path:
    """A directory of programs for the guest, static so that they run under any userland."""
    headers = [HERE / "program.h", *sorted((HERE / "accesses").glob("*.h"))]
    sources = {"workload": [HERE / "workload.c"], "accesses": sorted((HERE / "accesses").glob("*.[cS]"))}
    for files in sources.values():
        files.append(HERE / "program.c")

    def make(work: Path) -> None:
        options = ["-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread"]
        for program, files in sources.items():
            sh(["gcc", *options, "-o", work / program, *files])

    return cached("programs", [*headers, *(file for files in sources.values() for file in files)], make)


def pip() -> list[str | Path]:
    """The command of a pip of this machine's Python, whether or not Debian's is installed."""

    def make(work: Path) -> None:
        sh(["/usr/bin/python3", "-m", "venv", work / "venv"])

    python = cached("pip", [sh(["/usr/bin/python3", "--version"])], make) / "venv/bin/python"
    return [python, "-m", "pip", "--disable-pip-version-check"]


def own_wheel() -> Path:
    """A directory that holds one wheel: the checkout's."""
    files = [f for part in PARTS for f in sorted((REPO / part).rglob("*")) if f.is_file() and f.suffix != ".pyc"]
    files += [REPO / name for name in ("pyproject.toml", "hatch_build.py", "README.md")]

    def make(work: Path) -> None:
        source = work / "source"
        for file in files:
            copy = source / file.relative_to(REPO)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
        build = ["env", "MSRTRACE_COMPILED=no", *pip(), "wheel", "--quiet", "--no-deps", "--wheel-dir", work, source]
        retried("wheel", lambda: sh(build))
        shutil.rmtree(source)

    return cached("wheel", [[str(f.relative_to(REPO)) for f in files], *files], make)


def some_headers(host: Host) -> Path:
    """A directory of kernel headers, to compile BPF programs with: HOST's, else those of its userland's suite."""
    own = kernel(host) / "usr/src"
    return own if own.exists() else kernel(Host(host.userland.name, host.userland, host.userland)) / "usr/src"


def guest_site(host: Host) -> Path:
    """The site-packages directory of HOST's Python with msrtrace installed, as a package has it, and with bytecode.

    Its dependencies come from PyPI as wheels for the guest's version of Python. Compiling Python takes long in the
    emulator, so the guest's own interpreter does it here, in a chroot; so does its BCC with the BPF programs.
    """
    root, wheel = userland(host), own_wheel()

    def make(work: Path) -> None:
        scratch = work / "root"  # links: what is written there is new
        sh(["cp", "-al", root, scratch])
        site = scratch / "mnt/site"
        [file] = wheel.glob("*.whl")
        ask = "import site, sys; print('%d.%d' % sys.version_info[:2], site.getsitepackages()[0])"
        version, inside = sh(["chroot", scratch, "python3", "-c", ask]).split()
        # pip takes environment markers from the Python that runs it: that of Debian 12 or newer, so guests get no less.
        options = ["--quiet", "--upgrade", "--only-binary=:all:", "--no-compile", "--python-version", version]
        install = [*pip(), "install", *options, "--target", site, file]
        retried("packages for the guest", lambda: sh(install))
        for headers in some_headers(host).iterdir():
            sh(["cp", "-al", headers, scratch / "usr/src"])
        ship = ["python3", "-m", "tracer.trace.shipped", "/mnt/site/tracer/bpf", "/mnt/site/tracer/bpf"]
        sh(["chroot", scratch, "env", "PYTHONPATH=/mnt/site", *ship])
        sh(["chroot", scratch, "python3", "-m", "compileall", "-q", "-s", "/mnt/site", "-p", inside, "/mnt/site"])
        site.rename(work / "site")
        shutil.rmtree(scratch)

    return cached(f"site-{host.userland.name}", [wheel.name, root.parent.name], make) / "site"


def guest_bin(host: Host) -> Path:
    """What lies in /usr/local/bin of the guest: its programs, and the command lines of the installed wheels."""
    site, programs = guest_site(host), guest_programs()

    def make(work: Path) -> None:
        for program in programs.iterdir():
            shutil.copy(program, work)
        script = (site / "bin/msrtrace").read_text()
        (work / "msrtrace").write_text(re.sub(r"\A#!.*", "#!/usr/bin/python3", script))
        (work / "msrtrace").chmod(0o755)

    return cached(f"bin-{host.userland.name}", [site.parent.name, programs.name], make)


def guest_modules(host: Host) -> Path:
    """A directory of the variant of HOST's KVM module that Debian does not ship, as `kvm-module` looks for it."""
    module, variant = other_module(host), host.vendor.built

    def make(work: Path) -> None:
        (work / variant).mkdir()
        shutil.copy(module, work / variant)

    return cached(f"modules-{host.name}", [variant, module], make)
