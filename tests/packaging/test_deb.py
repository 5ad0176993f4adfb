# SPDX-License-Identifier: GPL-2.0-or-later
"""What Debian's packages say is what pyproject.toml says; and what they are made of, without making them."""

from __future__ import annotations

import re
import subprocess
from itertools import pairwise

import deb
import pytest
from apt import Suite
from cache import RigError
from project import PROJECT, PYPROJECT, REPO

CONTROL = (REPO / "packaging/debian/control").read_text()


def stocked(monkeypatch: pytest.MonkeyPatch, versions: dict[str, dict[str, str]]) -> None:
    """Suites have these packages and no others."""

    def candidate(suite: Suite, package: str) -> str:
        if package not in versions[suite.name]:
            raise RigError("no such package")
        return versions[suite.name][package]

    monkeypatch.setattr(Suite, "candidate", candidate)


def libraries() -> dict[str, str]:
    """Debian's packages of what msrtrace depends on, with the lowest versions of pyproject.toml."""
    return {f"python3-{name}": lowest for name, lowest in (line.split(">=") for line in PROJECT["dependencies"])}


def test_the_version_is_that_of_the_project() -> None:
    changelog = (REPO / "packaging/debian/changelog").read_text()
    assert re.match(r"msrtrace \((.+)-1\) ", changelog)[1] == PROJECT["version"]  # type: ignore[index]


@pytest.mark.parametrize("suite", ["bookworm", "trixie", "sid"])
def test_the_changelog_of_a_suite_is_valid(suite: str) -> None:
    command = ["dpkg-parsechangelog", "--file", "-", "--show-field"]
    for field, expected in (("Version", deb.version(suite)), ("Distribution", suite), ("Date", deb.date())):
        done = subprocess.run([*command, field], input=deb.changelog(suite), capture_output=True, text=True, check=True)
        assert (field, done.stdout.strip(), done.stderr) == (field, expected, "")


def test_what_an_upgrade_takes_is_the_news_of_the_package() -> None:
    """Every entry of CHANGELOG.md's section for this release, as dpkg reads it."""
    section = (REPO / "CHANGELOG.md").read_text().partition("### Upgrading\n\n")[2].partition("\n###")[0]
    news = deb.news("trixie")
    done = subprocess.run(
        ["dpkg-parsechangelog", "--file", "-", "--show-field", "Version"],
        input=news,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout.strip(), done.stderr) == (deb.version("trixie"), "")
    told = " ".join(news.split())
    for entry in section.removeprefix("- ").split("\n- "):
        assert " ".join(re.sub(r"\*\*|`", "", entry).split()) in told
    assert max(len(line) for line in news.splitlines() if line.startswith("  ")) <= 80


def test_a_newer_suite_has_a_higher_version() -> None:
    versions = [deb.version(suite) for suite in deb.SUITES]
    for older, newer in pairwise(versions):
        subprocess.run(["dpkg", "--compare-versions", older, "lt", newer], check=True)


def test_what_builds_the_package_is_not_older_than_what_runs_it() -> None:
    named = dict(re.findall(r"^ (python3-[\w-]+) \(>= ([\d.]+)\)", CONTROL, re.MULTILINE))
    assert named == libraries()


def test_everything_that_builds_the_wheel_builds_the_package() -> None:
    needed = {f"python3-{re.split('[<>=~]', line)[0]}" for line in PYPROJECT["build-system"]["requires"]}
    assert needed <= set(re.findall(r"^ (python3-[\w-]+)", CONTROL, re.MULTILINE))


def test_what_a_suite_lacks_or_has_too_old_is_bundled_from_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    all_of_them = libraries()
    without = {name: version for name, version in all_of_them.items() if name != "python3-msgspec"}
    old = {**all_of_them, "python3-rich": "1.0-1", "python3-msgspec": "0.18-9"}
    stocked(monkeypatch, {"bookworm": without, "trixie": old, "sid": all_of_them})
    assert deb.lacking(Suite("bookworm")) == {"msgspec": Suite("sid")}
    assert deb.lacking(Suite("trixie")) == {"msgspec": Suite("sid"), "rich": Suite("sid")}
    assert deb.lacking(Suite("sid")) == {}


def test_a_library_that_is_bundled_has_its_licence_in_the_package() -> None:
    """All that Debian 12 lacks; a build fails for another."""
    bundled = [directory.name for directory in (REPO / "packaging/debian/bundled").iterdir()]
    assert bundled == ["msgspec"]
    assert "\nLicense: " in (REPO / "packaging/debian/bundled/msgspec/copyright").read_text()


def test_what_builds_is_what_the_suite_has(monkeypatch: pytest.MonkeyPatch) -> None:
    stocked(monkeypatch, {"bookworm": {}, "trixie": libraries()})
    old, new = (deb.build_packages(Suite(name)) for name in ("bookworm", "trixie"))
    assert set(old) - set(new) == {"python3-dev"}
    assert set(new) - set(old) == {"python3-msgspec"}
    assert "linux-headers-amd64" in new


def test_every_file_that_the_packages_are_made_from_is_named() -> None:
    """Else a change of it would not be built."""
    needed = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    paths = {str(file.relative_to(REPO)) for file in deb.files()}
    assert all(any(path.startswith(part) for path in paths) for part in [*needed, "tracer/", "packaging/pages.py"])
    assert not any("__pycache__" in path or path.startswith("build/") for path in paths)
