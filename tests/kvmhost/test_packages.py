# SPDX-License-Identifier: GPL-2.0-or-later
"""The Debian packages, built in a clean chroot of their suite, and their life in another: see chroots.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import made
import pytest
from apt import Suite
from cache import REPO
from chroots import Life, life

from tracer.program.compiler import PROGRAMS, shipped_file
from tracer.report.file import encode

#: What packages of the suite that msrtrace depends on, apt and useradd leave when only msrtrace is purged.
_OF_OTHERS = re.compile(
    r"/etc/(alternatives|ca-certificates|python3|ssl)|/etc/(gshadow-|hosts|inputrc|localtime|networks|shadow-|timezone)$"
    r"|/usr/bin/pybabel$|/usr/local/(lib|share)|/usr/(lib|share)/python3.*/__pycache__|/var/cache/(apt|debconf|ldconfig|man)/"
    r"|/var/lib/(apt|dpkg|python)|/var/log/"
)
_CONFFILES = {
    "/etc/default/msrtrace",
    "/etc/grafana/provisioning/dashboards/msrtrace.yaml",
    "/etc/prometheus/msrtrace-scrape.yml",
    "/etc/prometheus/msrtrace-targets.yml",
}


@dataclass(frozen=True)
class Packages:
    """What was built for a suite, and what became of it."""

    suite: str
    built: Path
    life: Life

    @property
    def own(self) -> Path:
        """The package msrtrace."""
        [file] = self.built.glob("msrtrace_*_amd64.deb")
        return file

    def listed(self) -> dict[str, str]:
        """Path -> mode and owner of each file of it."""
        lines = subprocess.run(["dpkg-deb", "--contents", self.own], capture_output=True, text=True, check=True).stdout
        rows = [line.split() for line in lines.splitlines()]
        return {row[5].removeprefix("."): f"{row[0]} {row[1]}" for row in rows}

    def field(self, name: str) -> str:
        """A field of its control file."""
        command = ["dpkg-deb", "--field", str(self.own), name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _built_and_installed(suite: str) -> Callable[[Path], Packages]:
    def function(folder: Path) -> Packages:
        subprocess.run([sys.executable, REPO / "packaging/deb.py", "--out", folder, suite], check=True)
        report = folder / "report.json"
        report.write_bytes(encode(made.report()))
        debs = [file for file in (folder / suite).glob("*.deb") if "-dbgsym" not in file.name]
        return Packages(suite, folder / suite, life(Suite(suite), debs, report, folder))

    function.__name__ = f"packages-{suite}"
    return function


@pytest.fixture(
    params=[
        pytest.param(suite, marks=pytest.mark.beside(boot=_built_and_installed(suite), host=suite))
        for suite in ("bookworm", "trixie", "sid")
    ]
)
def packages(beside: Packages) -> Packages:
    return beside


def test_lintian_has_no_complaint(packages: Packages) -> None:
    said = (packages.built / "lintian").read_text().splitlines()
    # Pedantic: there is no public home page.
    assert [line for line in said if not line.startswith("P: ")] == []


def test_every_file_belongs_to_root_and_can_be_read(packages: Packages) -> None:
    listed = packages.listed()
    assert len(listed) > 150
    modes = {"drwxr-xr-x root/root", "-rw-r--r-- root/root", "-rwxr-xr-x root/root"}
    assert {path: mode for path, mode in listed.items() if mode not in modes} == {}


def test_it_has_the_programs_compiled_and_takes_them(packages: Packages) -> None:
    names = {shipped_file(Path("/usr/lib/msrtrace/tracer/bpf", name), flags) for name, flags in PROGRAMS}
    assert {str(name) for name in names} <= packages.listed().keys()
    shipped = packages.life.printed("shipped").splitlines()
    assert len(shipped) == len(PROGRAMS)
    assert all(line.endswith(" True") for line in shipped)


def test_it_needs_neither_a_compiler_nor_headers_nor_the_module_of_bcc(packages: Packages) -> None:
    installed = packages.life.printed("packages").split()
    assert "libbpfcc" in installed
    assert [name for name in installed if re.match(r"(gcc|clang)(-[\d.]+)?$|linux-headers|python3-bpfcc", name)] == []
    assert re.findall(r"^/.*", packages.life.printed("compilers"), re.MULTILINE) == []
    doctor = packages.life.printed("doctor")
    assert re.search(r"ok +headers +not needed", doctor)
    assert re.search(r"ok +bcc +not needed", doctor)
    assert re.search(r"ok +library +libbcc", doctor)


def test_only_a_library_that_the_suite_lacks_is_in_it(packages: Packages) -> None:
    top = {path.split("/")[4] for path in packages.listed() if re.match(r"/usr/lib/msrtrace/.", path)}
    libraries = {name for name in top if not re.match(r"tracer$|msrtrace-[\d.]+\.dist-info$", name)}
    bundled = packages.suite == "bookworm"
    assert {name.split("-")[0] for name in libraries} == ({"msgspec"} if bundled else set())
    assert ("python3-msgspec" in packages.field("Depends")) != bundled


def test_it_depends_on_the_lowest_versions_that_work(packages: Packages) -> None:
    for library in ("click", "jinja2", "prometheus-client", "rich"):
        assert re.search(rf"python3-{library} \(>= [\d.]+\)", packages.field("Depends"))
    assert packages.field("Recommends") == "python3-bcrypt, python3-yaml"


def test_an_older_version_is_upgraded_and_leaves_nothing(packages: Packages) -> None:
    seen = packages.life
    assert (seen.status("install-older"), seen.status("upgrade")) == (0, 0)
    assert seen.printed("older-version") == "msrtrace, version 0.0.1\n"
    assert re.fullmatch(r"msrtrace, version (?!0\.0\.1)\d.*\n", seen.printed("version"))
    assert [path for path in seen.files("installed") if "0.0.1" in path or "/gone." in path] == []


def test_dpkg_finds_every_file_as_it_was_packed(packages: Packages) -> None:
    for step in ("verify", "audit", "verify-both"):
        assert (step, packages.life.status(step), packages.life.printed(step)) == (step, 0, "")


def test_its_commands_work(packages: Packages) -> None:
    seen = packages.life
    assert seen.status("help") == 0
    assert "sudo msrtrace doctor" in seen.printed("help")
    assert seen.status("doctor") == 1  # there is no KVM in a chroot, and it says so
    assert "Traceback" not in seen.printed("doctor")
    assert "venv" not in seen.printed("doctor")
    assert seen.status("show") == 0
    assert "filter update" in seen.printed("show")
    assert (seen.status("html"), seen.printed("html")[:15].lower()) == (0, "<!doctype html>")
    assert (seen.status("man"), len(seen.printed("man").split())) == (0, 2)


def test_what_cannot_be_compiled_says_what_is_missing(packages: Packages) -> None:
    """Its child, which imports msrtrace too, finds it."""
    *_, error = packages.life.printed("compile").splitlines()
    assert error.endswith("install python3-bpfcc")


def test_all_of_it_is_compiled_to_bytecode(packages: Packages) -> None:
    assert packages.life.status("bytecode") == 0


def test_the_user_of_the_service_is_there(packages: Packages) -> None:
    name, _, user, _, _, home, shell = packages.life.printed("user").strip().split(":")
    assert (name, home, shell) == ("msrtrace", "/nonexistent", "/usr/sbin/nologin")
    assert int(user) < 1000


def test_removed_it_leaves_its_configuration_alone(packages: Packages) -> None:
    seen = packages.life
    assert seen.status("remove") == 0
    assert set(re.findall(r"^ (\S+) ", seen.printed("conffiles"), re.MULTILINE)) == _CONFFILES
    left = {path for path in seen.files("removed") - seen.files("before") if "msrtrace" in path}
    # dpkg and systemd know of it until it is purged.
    known = re.compile(
        r"/var/lib/(dpkg/info|systemd/deb-systemd-helper-\w+)/|/etc/systemd/system/[\w-]+\.target\.wants/"
    )
    assert {path for path in left if not known.match(path)} == _CONFFILES


def test_purged_it_leaves_nothing(packages: Packages) -> None:
    seen = packages.life
    assert seen.status("purge") == 0
    before, purged = seen.files("before"), seen.files("purged")
    assert before - purged == set()
    assert [path for path in purged if "msrtrace" in path] == []
    owned = seen.printed("owned").splitlines()
    owned += [f"/usr{path}" for path in owned]  # /bin and /lib are links
    assert [path for path in sorted(purged - before - {*owned}) if not _OF_OTHERS.match(path)] == []


def test_another_suite_upgrades_it(packages: Packages) -> None:
    order = {"bookworm": "~deb12", "trixie": "~deb13", "sid": ""}
    assert re.fullmatch(rf"[\d.]+-\d+{re.escape(order[packages.suite])}", packages.field("Version"))


def test_the_dashboard_is_where_grafana_looks(packages: Packages) -> None:
    listed = packages.life.files("removed") | packages.life.files("installed")
    assert "/etc/grafana/provisioning/dashboards/msrtrace.yaml" in listed
    [file] = packages.built.glob("msrtrace-monitoring_*_all.deb")
    command = f"dpkg-deb --fsys-tarfile {file} | tar -xO ./usr/share/msrtrace-monitoring/grafana.json"
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=True)
    assert json.loads(done.stdout) == json.loads((REPO / "dashboards/grafana.json").read_text())
