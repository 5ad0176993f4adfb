# SPDX-License-Identifier: GPL-2.0-or-later
"""The container image, built by Podman from packaging/container/Containerfile, and what runs it on an emulated host."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from apt import Suite
from cache import REPO, cached, remove_tree, retried, sh
from deb import packages
from disks import module_files, unpacked_copy
from hosts import Host, kernel, mmdebstrap, userland

CONTAINERFILE = REPO / "packaging/container/Containerfile"
#: Of what FROM names: Debian's images are made by the same tool, from the same packages.
BASE = "localhost/debian:trixie-slim"
SUITE = Suite("trixie")
NAME = "msrtrace"
#: Packages with seccomp profiles, and where these are. Debian's docker.io has Docker's compiled in, from this file.
PROFILES = {
    "docker": (SUITE, "golang-github-docker-docker-dev", "docker/profiles/seccomp/default.json"),
    "bookworm": (Suite("bookworm"), "golang-github-containers-common", "usr/share/containers/seccomp.json"),
}


def image(file: Path) -> Path:
    """A store of Podman's that has the image alone, as one layer: with the package FILE."""

    def make(work: Path) -> None:
        # Of Debian's slim images, too, there is no documentation.
        mmdebstrap(SUITE, ["ca-certificates"], work / "base")
        sh(["tar", "-c", "-C", work / "base", "-f", work / "base.tar", "."])
        (work / "context").mkdir()
        shutil.copy(file, work / "context")
        # What Podman needs while it runs has a path of 50 characters at most.
        with tempfile.TemporaryDirectory(prefix="podman-") as runs:

            def podman(store: str, *words: str | Path) -> None:
                storage: list[str | Path] = ["--root", work / store, "--runroot", f"{runs}/{store}"]
                sh(["podman", *storage, "--storage-driver=overlay", *words], log=work / "log")

            podman("building", "import", work / "base.tar", BASE)
            build = ["build", "--squash-all", "--isolation=chroot", "--network=host", "--format=docker"]
            build += [f"--from={BASE}", f"--tag={NAME}", f"--file={CONTAINERFILE}"]
            retried("image", lambda: podman("building", *build, work / "context"))
            podman("building", "save", "--format=docker-archive", f"--output={work}/image.tar", NAME)
            podman("store", "load", f"--input={work}/image.tar")
        for spare in ("base", "building", "context"):
            remove_tree(work / spare)
        if (work / "store/overlay").is_mount():
            sh(["umount", work / "store/overlay"])
        for tarball in ("base.tar", "image.tar"):
            (work / tarball).unlink()

    versions = [SUITE.candidate(name) for name in ("libbpfcc", "libc6", "python3")]
    return cached("container", [file, CONTAINERFILE, versions], make) / "store"


def runtime(host: Host) -> Path:
    """Debian's Podman with all that HOST's root tree lacks for it, a kernel module, and seccomp profiles."""
    root, tree, release = userland(host), kernel(host), host.release
    needed = host.userland.lacking(["podman"], root)

    def make(work: Path) -> None:
        downloads = work / "downloads"
        host.userland.unpack(needed, work / "runtime", downloads)
        [module] = module_files(tree, release, ["overlay"])
        unpacked_copy(module, work / "overlay.ko")
        for name, (suite, package, file) in PROFILES.items():
            suite.unpack([package], work / name, downloads)
            [profile] = [found for found in (work / name).rglob("*.json") if str(found).endswith(file)]
            shutil.copy(profile, work / f"seccomp-{name}.json")
            shutil.rmtree(work / name)
        shutil.rmtree(downloads)

    versions = [host.userland.candidate("podman"), *(suite.candidate(name) for suite, name, _ in PROFILES.values())]
    return cached(f"podman-{host.userland.name}", [needed, root.parent.name, tree.name, versions], make)


def package() -> Path:
    """msrtrace's package of SUITE, made from this checkout as `make deb` does."""
    [file] = packages(SUITE).glob("msrtrace_*_amd64.deb")
    return file


def fill(folder: Path, host: Host) -> None:
    """Put into FOLDER, which a run shows at /in, all that runs the image on HOST."""
    sh(["cp", "-al", *runtime(host).iterdir(), image(package()), folder])
