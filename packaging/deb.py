#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""`make deb`: the Debian packages, built for each suite in a clean chroot of it that has no network.

A library that a suite lacks, or has too old, comes along as source: as a newer suite has it, in a directory of the
source package (debian/rules compiles it). docs/packaging.md says more.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/kvmhost"))

from apt import Suite
from bochs import fetch
from cache import RigError, cached, retried, say, sh
from hosts import mmdebstrap
from project import PROJECT, REPO

#: What orders the packages of one version, so that an upgrade of the host upgrades them: the older suite first.
SUITES = {"bookworm": "~deb12", "trixie": "~deb13", "sid": ""}
#: What the packages are made from, beside packaging/debian.
PARTS = ["tracer", "bpf", "dashboards", "docs", "packaging", "pyproject.toml", "hatch_build.py", "README.md"]
PARTS += ["CHANGELOG.md", "LICENSE"]
LINTIAN = "--display-info --pedantic --fail-on none --allow-root"
#: What a suite's says and does not apply. The version of the policy is Debian 13's: Debian 12 knows an older one, by
#: which there should be a script of sysvinit, and sid's moves. In Debian itself a bug would ask for the package.
_NOT_APPLICABLE = {
    "bookworm": ["newer-standards-version", "package-supports-alternative-init-but-no-init.d-script"],
    "sid": ["out-of-date-standards-version", "initial-upload-closes-no-bugs"],
}


def version(suite: str) -> str:
    """The version of the packages of SUITE."""
    return f"{PROJECT['version']}-1{SUITES[suite]}"


def files() -> list[Path]:
    """What the packages are made from."""
    found = [file for part in PARTS for file in (sorted((REPO / part).rglob("*")) or [REPO / part])]
    return [file for file in found if file.is_file() and "__pycache__" not in file.parts]


def changelog(suite: str) -> str:
    """debian/changelog as the packages of SUITE have it."""
    whole = (REPO / "packaging/debian/changelog").read_text()
    return re.sub(r"\A.*", f"msrtrace ({version(suite)}) {suite}; urgency=medium", whole)


def date() -> str:
    """When this version was made, as debian/changelog has it: what depends on the time takes it from there."""
    [found, *_] = re.findall(r"^ -- .+>  (.+)$", changelog("sid"), re.MULTILINE)
    return str(found)


def news(suite: str) -> str:
    """debian/NEWS, which apt-listchanges shows before an upgrade: what CHANGELOG.md has under `Upgrading`; or ""."""
    releases = re.split(r"^## ", (REPO / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    [release] = [one for one in releases if one.startswith(f"{PROJECT['version']} ")]
    section = re.search(r"^### Upgrading\n\n(.*?)(?=\n###|\Z)", release, re.MULTILINE | re.DOTALL)
    if not section:
        return ""
    head, *_, tail = changelog(suite).strip().splitlines()
    entries = [re.sub(r"\*\*|`", "", " ".join(one.split())) for one in section[1].split("\n- ")]
    paragraphs = (
        textwrap.fill(one.removeprefix("- "), 78, initial_indent="  ", subsequent_indent="  ") for one in entries
    )
    return "\n\n".join([head, *paragraphs, tail]) + "\n"


def lacking(suite: Suite) -> dict[str, Suite]:
    """The libraries of pyproject.toml that SUITE lacks or has too old, and the first newer suite that has them."""
    names = list(SUITES)
    newer = [Suite(name) for name in names[names.index(suite.name) + 1 :]]
    found = {}
    for requirement in PROJECT["dependencies"]:
        library, lowest = requirement.split(">=")
        if not _has(suite, library, lowest):
            found[library] = next(other for other in newer if _has(other, library, lowest))
    return found


def _has(suite: Suite, library: str, lowest: str) -> bool:
    try:
        there = suite.candidate(f"python3-{library}")
    except RigError:
        return False
    command = ["dpkg", "--compare-versions", there, "ge", lowest]
    return not subprocess.run(command, check=False).returncode


def build_packages(suite: Suite) -> list[str]:
    """Build-Depends as SUITE satisfies it: of alternatives, the first that it has."""
    control = re.sub(r"^#.*\n", "", (REPO / "packaging/debian/control").read_text(), flags=re.MULTILINE)
    [wanted] = re.findall(r"^Build-Depends:\n((?: .*\n)+)", control, re.MULTILINE)
    packages = []
    for line in wanted.splitlines():
        names = re.sub(r"\([^)]*\)|[ ,]", "", line).split("|")
        packages.append(next(name for name in names if name == names[-1] or _is_in(suite, name)))
    return packages


def _is_in(suite: Suite, package: str) -> bool:
    try:
        return bool(suite.candidate(package))
    except RigError:
        return False


def build_root(suite: Suite) -> Path:
    """A root tree of SUITE with what builds and examines the packages."""
    packages = ["build-essential", "fakeroot", "lintian", *build_packages(suite)]

    def make(work: Path) -> None:
        mmdebstrap(suite, packages, work / "root", whole=True)

    versions = [suite.candidate(name) for name in ("debhelper", "python3-bpfcc", "linux-headers-amd64", "lintian")]
    return cached(f"debroot-{suite.name}", [packages, versions], make) / "root"


def unpack_source(suite: Suite, work: Path) -> Path:
    """The source tree, as dpkg-source wants it beside the tarballs that it was unpacked from."""
    stem = f"msrtrace-{PROJECT['version']}"
    tree, plain = work / stem, ["--owner=0", "--group=0", "--numeric-owner", "--mode=u=rwX,go=rX", "--sort=name"]
    for file in files():
        copy = tree / file.relative_to(REPO)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    tarball = work / f"{stem.replace('-', '_')}.orig.tar.xz"
    sh(["tar", "-c", "-J", "-f", tarball, "-C", work, *plain, f"--mtime={date()}", stem])
    for library, newer in lacking(suite).items():
        component = _download(library, newer, work / f"{stem.replace('-', '_')}.orig-{library}.tar")
        (tree / library).mkdir()
        sh(["tar", "-x", "-f", component, "-C", tree / library, "--strip-components=1"])
    shutil.copytree(REPO / "packaging/debian", tree / "debian")
    (tree / "debian/changelog").write_text(changelog(suite.name))
    if told := news(suite.name):
        (tree / "debian/NEWS").write_text(told)
    for library in lacking(suite):
        for addition in (tree / "debian/bundled" / library).iterdir():
            with (tree / "debian" / addition.name).open("a") as whole:
                whole.write(addition.read_text())
    return tree


def _download(library: str, suite: Suite, file: Path) -> Path:
    """The upstream tarball of a library as SUITE has it, called FILE and how it is compressed."""
    uri, checksum = suite.upstream_tarball(f"python3-{library}")
    file = file.with_name(file.name + Path(uri).suffix)
    retried(f"download of {Path(uri).name}", lambda: fetch(uri, file, checksum))
    return file


def run_in(root: Path, *command: str, log: Path) -> None:
    """Run COMMAND as root in the tree ROOT, with processes and mounts of its own and no network."""
    apart = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", f"--mount-proc={root / 'proc'}"]
    environment = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8"]
    sh([*apart, "chroot", root, *environment, *command], log=log)


def build(suite: Suite, work: Path) -> None:
    """Leave in WORK the packages of SUITE and the source package, the log of the build and what lintian says."""
    root = work / "root"
    sh(["cp", "-al", build_root(suite), root])  # links: the build adds files and changes none
    (root / "build").mkdir()
    tree = unpack_source(suite, root / "build")
    suppressed = [f"--suppress-tags={tag}" for tag in _NOT_APPLICABLE.get(suite.name, [])]
    lintian = " ".join(["lintian", LINTIAN, *suppressed])
    steps = f'cd "$1" && dpkg-buildpackage --no-sign && {lintian} ../*.changes > ../lintian'
    run_in(root, "sh", "-c", steps, "-", f"/build/{tree.name}", log=work / "log")
    for file in (root / "build").iterdir():
        if file.is_file():
            shutil.copy(file, work)
    shutil.rmtree(root)


def packages(suite: Suite) -> Path:
    """The directory of what `build` leaves, built once for what it is made from."""
    bundled = [newer.upstream_tarball(f"python3-{library}") for library, newer in lacking(suite).items()]
    names = [str(file.relative_to(REPO)) for file in files()]
    inputs = [build_root(suite).parent.name, bundled, version(suite.name), names, *files()]
    return cached(f"deb-{suite.name}", inputs, lambda work: build(suite, work))


def main() -> None:
    """Build the packages of each suite that is named."""
    parser = argparse.ArgumentParser(prog="packaging/deb.py", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; by default all")
    parser.add_argument("--out", type=Path, default=REPO / "build/deb", metavar="DIR", help="gets DIR/SUITE/*.deb")
    args = parser.parse_args()
    if unknown := {*args.suites} - {*SUITES}:
        parser.error(f"no such suite: {', '.join(unknown)}")
    for name in args.suites or SUITES:
        made, there = packages(Suite(name)), args.out / name
        shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(made, there)
        say(f"packages of {name} are in {there}")


if __name__ == "__main__":
    try:
        main()
    except RigError as error:
        sys.exit(str(error))
