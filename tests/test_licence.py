# SPDX-License-Identifier: GPL-2.0-or-later
"""Every source file has its licence in its first lines, as the kernel's do."""

from __future__ import annotations

import re
import subprocess

from project import PROJECT, REPO

_LINE = re.compile(r"SPDX-License-Identifier: (GPL-2\.0-(?:only|or-later))\b")
#: What cannot carry a comment, or is text to be read.
_WITHOUT_COMMENTS = {".json", ".png", ".md"}
_TEXTS = {"LICENSE", ".gitignore", "changelog", "copyright", "format"}


def _licences() -> dict[str, str]:
    """Path -> licence of every tracked source file; "" where its first two lines have none."""
    # Under sudo the checkout belongs to another user, which git asks to be told of.
    command = ["git", "-c", f"safe.directory={REPO}", "-C", str(REPO), "ls-files", "-z"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    found = {}
    for name in names:
        path = REPO / name
        if name and path.is_file() and path.suffix not in _WITHOUT_COMMENTS and path.name not in _TEXTS:
            first_lines = "\n".join(path.read_text().split("\n")[:2])  # the second, after a shebang
            match = _LINE.search(first_lines)
            found[name] = match[1] if match else ""
    return found


def test_every_source_file_names_its_licence() -> None:
    licences = _licences()
    assert len(licences) > 100
    assert [name for name, licence in licences.items() if not licence] == []


def test_only_what_goes_into_the_kernel_is_gpl_2_0_only() -> None:
    version_2_alone = {name for name, licence in _licences().items() if licence == "GPL-2.0-only"}
    assert version_2_alone == {name for name in _licences() if name.startswith("bpf/")} | {
        "tests/kvmhost/livepatch/livepatch.c",
        "tests/kvmhost/skip-svm.diff",
        "tests/kvmhost/unpatch.diff",
    }


def test_the_package_names_both_licences() -> None:
    assert PROJECT["license"] == "GPL-2.0-or-later AND GPL-2.0-only"
