# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's livepatches: which functions each replaces. Documentation/ABI/testing/sysfs-kernel-livepatch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

LIVEPATCHES = Path("/sys/kernel/livepatch")

#: The object that stands for the kernel image (struct klp_object, kernel/livepatch/core.c).
IMAGE = "vmlinux"


@dataclass(frozen=True)
class Livepatch:
    """A livepatch: its module, whether it is enabled, and what it replaces, as pairs of object and function."""

    module: str
    enabled: bool
    replaced: frozenset[tuple[str, str]]

    def functions(self, objects: Collection[str]) -> set[str]:
        """The functions that it replaces in these objects: modules, or IMAGE for the kernel image."""
        return {function for where, function in self.replaced if where in objects}


def read_livepatches(directory: Path = LIVEPATCHES) -> tuple[Livepatch, ...]:
    """The loaded livepatches, from `<patch>/<object>/<function>,<sympos>`; none if the directory cannot be read."""
    try:
        patches = sorted(path for path in directory.iterdir() if path.is_dir())
        return tuple(_livepatch(patch) for patch in patches)
    except OSError:  # no livepatching in this kernel, or one that was unloaded in the meantime
        return ()


def _livepatch(patch: Path) -> Livepatch:
    replaced = frozenset(
        (where.name, function.name.rpartition(",")[0])
        for where in patch.iterdir()
        if where.is_dir()
        for function in where.iterdir()
        if function.is_dir()
    )
    return Livepatch(patch.name, (patch / "enabled").read_text().strip() == "1", replaced)
