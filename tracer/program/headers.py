# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel headers for BCC. The BPF program asks nothing of them that differs between kernels, so any will do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tracer.model.errors import MsrtraceError

_COMMON, _GENERATED = "include/linux/kconfig.h", "include/generated/autoconf.h"
#: What BCC reads of a tree (src/cc/frontends/clang/kbuild_helper.cc).
_PARTS = ("include", "arch/x86/include")


def header_settings(scratch: Path, root: Path = Path("/")) -> dict[str, str]:
    """The environment with which BCC finds headers: of the running kernel, else of any other below `root`.

    Nothing is needed where BCC finds those of the running kernel (src/cc/frontends/clang/loader.cc), or where the user
    says where they are. Debian splits them into two trees, which are joined in the directory `scratch`, by links.
    Raises MsrtraceError if there are none.
    """
    if "BCC_KERNEL_SOURCE" in os.environ or _running_kernel_has_them(root):
        return {}
    for tree in _trees(root):
        common = tree if (tree / _COMMON).exists() else tree.with_name(tree.name.rpartition("-")[0] + "-common")
        if not (common / _COMMON).exists():
            continue
        if common != tree:
            _join((common, tree), scratch)
            tree = scratch
        return {"BCC_KERNEL_SOURCE": str(tree)}
    raise MsrtraceError("there are no kernel headers, which BCC needs to compile; those of any kernel will do")


def _running_kernel_has_them(root: Path) -> bool:
    modules = root / "lib/modules" / os.uname().release
    build = modules / "build"
    common = modules / "source" if build.is_dir() and (modules / "source").is_dir() else build
    there = (common / _COMMON).exists() and (build / _GENERATED).exists()
    return there or (root / "sys/kernel/kheaders.tar.xz").exists()


def _trees(root: Path) -> Iterator[Path]:
    """What packages of headers leave: Debian's and Ubuntu's, Fedora's, and what modules link to; the newest first."""
    for pattern in ("usr/src/linux-headers-*", "usr/src/kernels/*", "lib/modules/*/build"):
        found = (path for path in root.glob(pattern) if (path / _GENERATED).exists())
        yield from sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _join(trees: tuple[Path, ...], joined: Path) -> None:
    for tree in trees:
        for part in _PARTS:
            (joined / part).mkdir(parents=True, exist_ok=True)
            for entry in (tree / part).iterdir():  # the two have none in common
                (joined / part / entry.name).symlink_to(entry)
