# SPDX-License-Identifier: GPL-2.0-or-later
"""Which directories of tracer/ may import which, and that only the vendors' tables have what differs between them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
FILES = sorted((REPO / "tracer").rglob("*.py"))

#: Each directory, and the others that it may import.
ARROWS = {
    "model": set[str](),
    "kernel": {"model"},
    "program": {"model"},
    "trace": {"program", "kernel", "model"},
    "report": {"model"},
    "live": {"model"},
    "export": {"model"},
    "doctor": {"kernel", "model"},
    "cli": {"report", "live", "export", "doctor", "trace", "kernel", "model"},
}
TABLES = {REPO / f"tracer/model/{name}.py" for name in ("vmx", "svm", "msr/table", "msr/generate")}
#: crosvm is a VMM of either vendor.
_IDENTIFIER = re.compile(r"\w*(vmx|(?<!cro)svm|kvm_intel|kvm_amd|kvm-intel|kvm-amd)[\w.]*", re.IGNORECASE)


def room(file: Path) -> str:
    return file.relative_to(REPO / "tracer").parts[0]


def imported(tree: ast.Module) -> Iterator[str]:
    """The modules of ours that a file imports, at the top or in a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "tracer")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            if node.module and node.module.split(".")[0] == "tracer":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def vendors_words(tree: ast.Module) -> Iterator[str]:
    """Names, and strings that are a name or a path of a module, which only one vendor has; not sentences."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = re.split(r"[/\s|]", node.value) if " " not in node.value else []
        elif isinstance(node, ast.Name):
            words = [node.id]
        elif isinstance(node, ast.Attribute):
            words = [node.attr]
        elif isinstance(node, ast.arg | ast.keyword):
            words = [node.arg or ""]
        else:
            continue
        yield from (word for word in words if _IDENTIFIER.fullmatch(word))


def test_every_file_is_in_a_known_directory() -> None:
    assert {room(file) for file in FILES} == {"__init__.py", *ARROWS}


@pytest.mark.parametrize("name", ARROWS)
def test_imports_point_one_way(name: str) -> None:
    wrong = [
        f"{file.relative_to(REPO)} imports {module}"
        for file in FILES
        if room(file) == name
        for module in imported(ast.parse(file.read_text()))
        if module.split(".")[1] not in ARROWS[name] | {name}
    ]
    assert wrong == []


def test_imports_have_no_cycle() -> None:
    done: set[str] = set()
    while ready := [name for name in ARROWS if name not in done and ARROWS[name] <= done]:
        done.update(ready)
    assert done == ARROWS.keys()


def test_only_the_vendors_tables_name_vendors() -> None:
    exempt = {REPO / "tracer/model/vendors.py"}  # the list of the tables
    found = {
        str(file.relative_to(REPO)): sorted(set(vendors_words(ast.parse(file.read_text()))))
        for file in FILES
        if file not in TABLES | exempt
    }
    assert {file: words for file, words in found.items() if words} == {}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("vmx_free = 1", ["vmx_free"]),
        ("x = '/sys/module/kvm_intel'", ["kvm_intel"]),
        ("x = f'{y}vcpu_svm'", ["vcpu_svm"]),
        ("x.kvm_amd(vmx=1)", ["kvm_amd", "vmx"]),
        ("x = 'a sentence on kvm_intel'", []),
        ("x = 'crosvm_control'", []),
    ],
)
def test_names_of_vendors_are_found(code: str, words: list[str]) -> None:
    assert sorted(vendors_words(ast.parse(code))) == words
