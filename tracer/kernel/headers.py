# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel headers for BCC. The BPF program asks nothing of them that differs between kernels, so any will do."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from tracer.model.errors import MsrtraceError

COMMON, GENERATED = "include/linux/kconfig.h", "include/generated/autoconf.h"
CARRIED = "/sys/kernel/kheaders.tar.xz"
#: NixOS has no /lib/modules.
_NIXOS = "run/*-system/kernel-modules/lib/modules/*/build"
#: What BCC reads of a tree (src/cc/frontends/clang/kbuild_helper.cc).
_PARTS = ("include", "arch/x86/include")


def headers_of_running_kernel(root: Path, release: str, override: str | None) -> tuple[str, list[str]]:
    """Where BCC looks first (src/cc/frontends/clang/loader.cc): the tree, and the files that it lacks.

    :param override: BCC_KERNEL_SOURCE
    """
    modules = f"/lib/modules/{release}"
    build = override or f"{modules}/build"

    def at(path: str) -> Path:
        return root / path.lstrip("/")

    # Debian and SUSE split the tree: common headers are in source, generated ones in build.
    split = not override and at(build).is_dir() and at(f"{modules}/source").is_dir()
    needed = (f"{modules}/source/{COMMON}" if split else f"{build}/{COMMON}", f"{build}/{GENERATED}")
    return build, [file for file in needed if not at(file).is_file()]


def kernel_carries_headers(root: Path, release: str) -> bool:
    """Whether the kernel has a copy of its headers, or a module with one, which BCC loads (CONFIG_IKHEADERS)."""
    try:
        modules = (root / f"lib/modules/{release}/modules.dep").read_text(errors="replace")
    except OSError:
        modules = ""
    return "/kheaders.ko" in modules or (root / CARRIED.lstrip("/")).exists()


def headers_of_any_kernel(root: Path) -> tuple[Path, ...]:
    """The tree of some kernel's headers, or the two into which Debian and SUSE split it; empty if there is none."""
    for tree in _trees(root):
        split = "source" if tree.name == "build" else tree.name.rpartition("-")[0] + "-common"
        for common in (tree, tree.with_name(split)):
            if (common / COMMON).is_file():
                return (tree,) if common == tree else (common, tree)
    return ()


def _trees(root: Path) -> Iterator[Path]:
    """What packages of headers leave: Debian's and Ubuntu's, Fedora's, and what modules link to; the newest first."""
    for pattern in ("usr/src/linux-headers-*", "usr/src/kernels/*", "lib/modules/*/build", _NIXOS):
        found = (path for path in root.glob(pattern) if (path / GENERATED).is_file())
        yield from sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def header_settings(scratch: Path, root: Path = Path("/")) -> dict[str, str]:
    """The environment with which BCC finds headers: of the running kernel, else of any other below `root`.

    Nothing is needed where BCC finds those of the running kernel, or where the user says where they are. Two trees are
    joined in the directory `scratch`. Raises MsrtraceError if there are no headers.
    """
    release = os.uname().release
    _, missing = headers_of_running_kernel(root, release, None)
    if "BCC_KERNEL_SOURCE" in os.environ or not missing or kernel_carries_headers(root, release):
        return {}
    trees = headers_of_any_kernel(root)
    if not trees:
        raise MsrtraceError("there are no kernel headers, which BCC needs to compile; those of any kernel will do")
    if len(trees) == 1:
        return {"BCC_KERNEL_SOURCE": str(trees[0])}
    join_headers(trees, scratch)
    return {"BCC_KERNEL_SOURCE": str(scratch)}


def join_headers(trees: Iterable[Path], joined: Path) -> None:
    """Make one tree of several, by links: from BCC_KERNEL_SOURCE, BCC takes everything from one."""
    for tree in trees:
        for part in _PARTS:
            (joined / part).mkdir(parents=True, exist_ok=True)
            for entry in (tree / part).iterdir():  # they have none in common
                (joined / part / entry.name).symlink_to(entry)
