# SPDX-License-Identifier: GPL-2.0-or-later
"""Which kernel headers BCC is given, on machines made of files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tracer.kernel.headers import header_settings
from tracer.model.errors import MsrtraceError

COMMON, GENERATED = "include/linux/kconfig.h", "include/generated/autoconf.h"
RELEASE = os.uname().release


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BCC_KERNEL_SOURCE", raising=False)


def write(root: Path, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    for tree in {Path(file).parts[:3] for file in files if file.startswith("usr/src")}:
        (root / Path(*tree) / "arch/x86/include").mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize(
    "files",
    [
        [f"lib/modules/{RELEASE}/build/{COMMON}", f"lib/modules/{RELEASE}/build/{GENERATED}"],
        [f"lib/modules/{RELEASE}/source/{COMMON}", f"lib/modules/{RELEASE}/build/{GENERATED}"],
        ["sys/kernel/kheaders.tar.xz"],
    ],
)
def test_those_of_the_running_kernel_are_found_by_bcc(tmp_path: Path, files: list[str]) -> None:
    write(tmp_path, *files, f"usr/src/linux-headers-1/{COMMON}", f"usr/src/linux-headers-1/{GENERATED}")
    assert header_settings(tmp_path / "scratch", tmp_path) == {}


def test_a_module_that_carries_them_is_left_to_bcc(tmp_path: Path) -> None:
    dep = tmp_path / "lib/modules" / RELEASE / "modules.dep"
    dep.parent.mkdir(parents=True)
    dep.write_text("kernel/kernel/kheaders.ko.xz:\n")
    assert header_settings(tmp_path / "scratch", tmp_path) == {}


def test_what_the_user_sets_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BCC_KERNEL_SOURCE", "/elsewhere")
    assert header_settings(tmp_path / "scratch", tmp_path) == {}


@pytest.mark.parametrize(
    "tree",
    [
        "usr/src/linux-headers-6.8.0-45-generic",
        "usr/src/kernels/6.11",
        "lib/modules/1/build",
        "run/booted-system/kernel-modules/lib/modules/1/build",
    ],
)
def test_those_of_any_other_kernel_will_do(tmp_path: Path, tree: str) -> None:
    write(tmp_path, f"{tree}/{COMMON}", f"{tree}/{GENERATED}")
    assert header_settings(tmp_path / "scratch", tmp_path) == {"BCC_KERNEL_SOURCE": str(tmp_path / tree)}


def test_debians_two_trees_are_joined(tmp_path: Path) -> None:
    write(
        tmp_path,
        f"usr/src/linux-headers-6.12.117+deb13-amd64/{GENERATED}",
        f"usr/src/linux-headers-6.12.117+deb13-common/{COMMON}",
    )
    scratch = tmp_path / "scratch"
    assert header_settings(scratch, tmp_path) == {"BCC_KERNEL_SOURCE": str(scratch)}
    assert (scratch / COMMON).exists()
    assert (scratch / GENERATED).exists()


def test_the_two_trees_of_suse_are_joined(tmp_path: Path) -> None:
    """As links, of a kernel that does not run: source and build."""
    files = (f"usr/src/linux-6.11-obj/{GENERATED}", f"usr/src/linux-6.11/{COMMON}")
    write(tmp_path, *files)
    modules = tmp_path / "lib/modules/6.11-default"
    modules.mkdir(parents=True)
    (modules / "build").symlink_to(tmp_path / "usr/src/linux-6.11-obj")
    (modules / "source").symlink_to(tmp_path / "usr/src/linux-6.11")
    scratch = tmp_path / "scratch"
    assert header_settings(scratch, tmp_path) == {"BCC_KERNEL_SOURCE": str(scratch)}
    assert (scratch / COMMON).exists()
    assert (scratch / GENERATED).exists()


@pytest.mark.parametrize(
    "half", [f"usr/src/linux-headers-6-amd64/{GENERATED}", f"usr/src/linux-headers-6-common/{COMMON}"]
)
def test_one_of_the_two_is_not_enough(tmp_path: Path, half: str) -> None:
    write(tmp_path, half)
    with pytest.raises(MsrtraceError, match="there are no kernel headers"):
        header_settings(tmp_path / "scratch", tmp_path)
