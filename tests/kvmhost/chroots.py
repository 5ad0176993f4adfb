# SPDX-License-Identifier: GPL-2.0-or-later
"""A Debian package from its installation to its removal, in a clean chroot of its suite: what each step left."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from apt import Suite
from cache import BUILD, HERE, cached, locked, retried, sh
from hosts import mmdebstrap

#: What a host of Debian has that a root tree of essential packages has not: here, what the packages use if it is there.
PACKAGES = ["man-db", "systemd"]
_DOCUMENTATION = [f"--dpkgopt=path-include=/usr/share/{name}/*" for name in ("doc", "man", "locale", "info", "lintian")]


def clean_root(suite: Suite) -> Path:
    """A root tree of SUITE as an installation has it, with documentation."""

    def make(work: Path) -> None:
        mmdebstrap(suite, PACKAGES, work / "root", *_DOCUMENTATION)

    inputs = [PACKAGES, [suite.candidate(name) for name in ("apt", "dpkg", "libc6", *PACKAGES)]]
    return cached(f"clean-{suite.name}", inputs, make) / "root"


def older(package: Path, into: Path) -> Path:
    """A package as PACKAGE, of version 0.0.1, with a module that is gone since then: what is upgraded."""
    tree = into / "older"
    sh(["dpkg-deb", "--raw-extract", package, tree])
    private = tree / "usr/lib/msrtrace"
    [metadata] = private.glob("msrtrace-*.dist-info/METADATA")
    for file in (tree / "DEBIAN/control", metadata):
        file.write_text(re.sub(r"^Version: .*", "Version: 0.0.1", file.read_text(), flags=re.MULTILINE))
    metadata.parent.rename(private / "msrtrace-0.0.1.dist-info")
    (private / "tracer/gone.py").touch()
    file = into / "older.deb"
    sh(["dpkg-deb", "--root-owner-group", "--build", tree, file])
    shutil.rmtree(tree)
    return file


@dataclass(frozen=True)
class Life:
    """What the steps of tests/kvmhost/package-life left, by their names."""

    folder: Path

    def printed(self, step: str) -> str:
        """What a step printed, on stdout and stderr."""
        return (self.folder / step).read_text()

    def status(self, step: str) -> int:
        """How a step ended."""
        return int((self.folder / f"{step}.status").read_text())

    def files(self, step: str) -> set[str]:
        """The paths of the whole root tree after a step that lists them."""
        return set(self.printed(step).split("\0"))


def life(suite: Suite, packages: list[Path], report: Path, folder: Path) -> Life:
    """The life of msrtrace's PACKAGES in a chroot of SUITE, which has the network; FOLDER gets what its steps left.

    :param report: of msrtrace, in JSON, to be shown
    """
    root, given = folder / "root", folder / "root/in"
    sh(["cp", "-a", clean_root(suite), root])
    given.mkdir()
    for package in packages:
        shutil.copy(package, given)
    [own] = given.glob("msrtrace_*.deb")
    older(own, given)
    shutil.copy(report, given / "report.json")
    shutil.copy(HERE / "package-life", given)
    shutil.copy("/etc/resolv.conf", root / "etc")
    archives = BUILD / "apt/archives" / suite.name
    (archives / "partial").mkdir(parents=True, exist_ok=True)
    # A namespace of its own: what is mounted is gone with the last process, however that ends.
    mounts = f"mount --bind {archives} {root}/var/cache/apt/archives && mount -t devpts devpts {root}/dev/pts"
    apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", f"--mount-proc={root / 'proc'}"]
    environment = "env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive"
    log = folder / "log"
    with locked(f"life-{suite.name}"):
        command = f"{mounts} && exec chroot {root} {environment} sh /in/package-life"
        retried(f"life of msrtrace in {suite.name}", lambda: sh([*apart, "sh", "-c", command], log=log), attempts=2)
    for file in (root / "out").iterdir():
        shutil.copy(file, folder)
    shutil.rmtree(root)
    return Life(folder)
