# SPDX-License-Identifier: GPL-2.0-or-later
"""A small apt repository for a host without a network: some packages, and all that they depend on and it lacks."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from cache import sh
from hosts import Host, userland

#: In the repository: what the guest copies to /etc/apt/sources.list.d, if the repository is at /in/repository.
SOURCES = "kvmhost.list"


def repository(
    host: Host, debs: Sequence[Path], into: Path, *, others: Sequence[str] = (), kind: str = "fresh"
) -> None:
    """Make the directory INTO a repository for HOST of the files DEBS, the packages OTHERS, and what they need.

    In the guest, with INTO at /in/repository:

        cp /in/repository/kvmhost.list /etc/apt/sources.list.d/
        apt-get update
        apt-get install msrtrace

    :param kind: of the userland that HOST is booted with: `fresh` (--fresh), or `systemd`
    """
    into.mkdir(parents=True, exist_ok=True)
    own = [sh(["dpkg-deb", "--field", deb, "Package"]).strip() for deb in debs]
    wanted = [*(str(deb.resolve()) for deb in debs), *others]
    needed = [name for name in host.userland.lacking(wanted, userland(host, kind)) if name not in own]
    for file in [*debs, *(host.userland.download(needed) if needed else [])]:
        shutil.copy(file, into)
    index = sh(["dpkg-scanpackages", "--multiversion", "."], cwd=into)
    (into / "Packages").write_text(index)
    (into / SOURCES).write_text("deb [trusted=yes] file:/in/repository ./\n")
