# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian packages of any suite, without touching the machine's own package system.

Each suite has an apt state of its own below build/. Where packages come from is read from the machine's apt
configuration, so a mirror or a proxy that is set up there is used here too.
"""

from __future__ import annotations

import functools
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from cache import BUILD, RigError, locked, retried, sh

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
LISTS_GOOD_FOR_SECONDS = 24 * 3600


@functools.cache
def mirrors() -> tuple[str, str | None]:
    """The URIs of Debian's main and security archives as this machine's apt has them."""
    rows = sh(["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)", "Identifier: Packages"])
    found: dict[str, str] = {}
    for row in rows.splitlines():
        origin, label, uri = row.split("|")
        if origin == "Debian":
            found.setdefault(label, uri)
    if "Debian" not in found:
        raise RigError("apt knows no Debian archive on this machine; run `apt-get update` (this needs Debian)")
    return found["Debian"], found.get("Debian-Security")


@dataclass(frozen=True)
class Suite:
    """A Debian suite, such as `trixie`."""

    name: str

    @property
    def _root(self) -> Path:
        return BUILD / "apt" / self.name

    def sources(self, *, source_packages: bool = False) -> list[str]:
        """The sources.list lines of this suite."""
        main, security = mirrors()
        # sid alone: its Release file can be past its date on an archive that is not followed every day.
        unchecked = " check-valid-until=no" if self.name == "sid" else ""
        kinds = ["deb", "deb-src"] if source_packages else ["deb"]
        options = f"[signed-by={KEYRING}{unchecked}]"
        lines = [f"{kind} {options} {main} {self.name} main" for kind in kinds]
        if security and self.name != "sid" and not self.name.endswith("-backports"):
            lines.append(f"deb {options} {security} {self.name}-security main")
        return lines

    def _options(self) -> list[str]:
        root = self._root
        options = [f"Dir={root}", f"Dir::State::status={root}/var/lib/dpkg/status", "APT::Sandbox::User=root"]
        # Containers have apt keep no such file (/etc/apt/apt.conf.d/docker-clean): each question then takes 0.5 s.
        options += [f"Dir::Cache::{name}={name}.bin" for name in ("pkgcache", "srcpkgcache")]
        return [word for option in options for word in ("-o", option)]

    def _apt(self, program: str, *words: str, cwd: Path | None = None) -> str:
        return sh([program, *self._options(), *words], cwd=cwd)

    def refresh(self) -> None:
        """Fetch the package lists unless they were fetched in the last day."""
        stamp = self._root / "updated"
        with locked(f"apt-{self.name}"):
            if stamp.exists() and time.time() - stamp.stat().st_mtime < LISTS_GOOD_FOR_SECONDS:
                return
            folders = ["etc/apt/apt.conf.d", "etc/apt/preferences.d", "var/lib/apt/lists/partial"]
            for folder in [*folders, "var/cache/apt/archives/partial", "var/lib/dpkg"]:
                (self._root / folder).mkdir(parents=True, exist_ok=True)
            (self._root / "var/lib/dpkg/status").touch()
            lines = self.sources(source_packages=True)
            (self._root / "etc/apt/sources.list").write_text("\n".join(lines) + "\n")
            try:
                retried(f"package lists of {self.name}", lambda: self._apt("apt-get", "update", "--error-on=any"))
            except RigError:
                if not stamp.exists():
                    raise  # else: the archive is out of reach, but what was known yesterday still serves
            stamp.touch()

    @functools.cache  # noqa: B019 (there are four suites)
    def candidate(self, package: str) -> str:
        """The version of PACKAGE that apt would install."""
        self.refresh()
        found = re.search(r"Candidate: (\S+)", self._apt("apt-cache", "policy", package))
        if not found or found[1] == "(none)":
            raise RigError(f"Debian {self.name} has no package {package}")
        return found[1]

    @functools.cache  # noqa: B019
    def depends(self, package: str) -> list[str]:
        """The packages that PACKAGE depends on, alternatives included."""
        self.refresh()
        text = self._apt("apt-cache", "depends", "--no-suggests", "--no-recommends", package)
        return re.findall(r"Depends: ([a-z0-9][a-z0-9.+-]*)", text)

    def lacking(self, packages: list[str], tree: Path | None = None) -> list[str]:
        """What installing PACKAGES into TREE, a root tree of this suite, would add: they and what they depend on.

        Without TREE: into an empty one. A package is a name, or the path of a .deb file.
        """
        self.refresh()
        status = ["-o", f"Dir::State::status={tree}/var/lib/dpkg/status"] if tree else []
        options = [*status, "--no-install-recommends", "--simulate"]
        return re.findall(r"^Inst (\S+)", self._apt("apt-get", *options, "install", *packages), re.MULTILINE)

    def download(self, packages: list[str]) -> list[Path]:
        """The .deb files of PACKAGES, downloaded unless they have been before."""
        self.refresh()
        pool = BUILD / "apt/pool"
        pool.mkdir(exist_ok=True)
        listed = self._apt("apt-get", "download", "--print-uris", *packages)
        files = [pool / name for name in re.findall(r"^'\S+' (\S+\.deb) ", listed, re.MULTILINE)]
        with locked("apt-pool"):
            if any(not file.exists() for file in files):
                retried(
                    f"download of {len(files)} packages", lambda: self._apt("apt-get", "download", *packages, cwd=pool)
                )
        return files

    def unpack(self, packages: list[str], into: Path, downloads: Path) -> None:
        """Download PACKAGES and lay their files below INTO, running no script of theirs."""
        self.refresh()
        downloads.mkdir(exist_ok=True)
        retried(
            f"download of {' '.join(packages)}",
            lambda: self._apt("apt-get", "download", *packages, cwd=downloads),
        )
        for package in packages:
            [deb] = downloads.glob(f"{package}_*.deb")
            sh(["dpkg", "-x", deb, into])
            os.unlink(deb)

    def upstream_tarball(self, package: str) -> tuple[str, str]:
        """URI and checksum (`SHA256:...`) of the upstream tarball of source package PACKAGE."""
        self.refresh()
        for line in self._apt("apt-get", "--print-uris", "source", package).splitlines():
            found = re.match(r"'(\S+\.orig\.tar\.\S+)' \S+ \d+ (SHA256:\S+)", line)
            if found:
                return found[1], found[2]
        raise RigError(f"Debian {self.name} has no source of {package}")
