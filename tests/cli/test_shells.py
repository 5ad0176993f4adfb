# SPDX-License-Identifier: GPL-2.0-or-later
"""Tab completes msrtrace's command line in real shells: bash and zsh on a terminal, fish by its own means."""

from __future__ import annotations

import pytest
from needs import missing, tool
from shells import BASH_COMPLETION, START, Shells

#: What is typed, and the arguments that msrtrace is then run with.
TYPED = {
    "msrtrace st\t": ["state"],
    "sudo msrtrace st\t": ["state"],
    "true; msrtrace comp\t": ["compare"],
    "msrtrace run --web.li\t": ["run", "--web.listen-address"],
    "msrtrace state --wa\t": ["state", "--watch"],
    "msrtrace show --format m\t": ["show", "--format", "markdown"],
    "msrtrace show --format=m\t": ["show", "--format=markdown"],
    "msrtrace top --backend k\t": ["top", "--backend", "kprobe"],
    "msrtrace state --msr ia32_spec_c\t": ["state", "--msr", "IA32_SPEC_CTRL"],
    "msrtrace state --msr SPEC_C\t": ["state", "--msr", "IA32_SPEC_CTRL"],
    "msrtrace state --vm we\t": ["state", "--vm", "web:01"],
    "msrtrace state --vm web:\t": ["state", "--vm", "web:01"],
    "msrtrace state --vm=we\t": ["state", "--vm=web:01"],
    "msrtrace state --vm da\t": ["state", "--vm", "data base"],
    "msrtrace state --diff da\tweb\t": ["state", "--diff", "data base", "web:01"],
    "msrtrace top --pid 91\t": ["top", "--pid", "9173"],
    "msrtrace show bef\t": ["show", "before.json"],
    "msrtrace show my\t": ["show", "my report.json"],
    "msrtrace show sub\tde\t": ["show", "subdir/deep.json"],
    "msrtrace compare bef\tmy\t": ["compare", "before.json", "my report.json"],
    "msrtrace compare --base bef\t--new my\t": ["compare", "--base", "before.json", "--new", "my report.json"],
    "msrtrace state -o oth\t": ["state", "-o", "other.txt"],
    "msrtrace report -- workload-of-m\toth\t": ["report", "--", "workload-of-mine", "other.txt"],
}


@pytest.fixture(scope="module")
def shells(tmp_path_factory: pytest.TempPathFactory) -> Shells:
    made = Shells(tmp_path_factory.mktemp("shells"))
    made.vm(812, "guest=web:01")
    made.vm(9173, "guest=data base")
    return made


BASH, ZSH = ["--norc", "--noprofile", "-i"], ["-f", "-i"]


def test_tab_completes_in_bash(shells: Shells) -> None:
    if not BASH_COMPLETION.exists():
        missing("bash-completion", "bash-completion is missing: `make test` installs it")
    found = shells.type([tool("bash"), *BASH], START["bash"], list(TYPED))
    assert dict(zip(TYPED, found, strict=True)) == TYPED


def test_tab_completes_in_bash_without_bash_completion(shells: Shells) -> None:
    lines = [line for line in TYPED if not line.startswith("sudo")]
    found = shells.type([tool("bash"), *BASH], START["bash alone"], lines)
    assert dict(zip(lines, found, strict=True)) == {line: TYPED[line] for line in lines}


def test_tab_completes_in_zsh(shells: Shells) -> None:
    found = shells.type([tool("zsh"), *ZSH], START["zsh"], list(TYPED))
    assert dict(zip(TYPED, found, strict=True)) == TYPED


def test_fish_offers_the_same(shells: Shells) -> None:
    """Fish quotes what it inserts: it offers words as they are."""
    lines = [line for line in TYPED if line.count("\t") == 1]
    offered = shells.fish(tool("fish"), [line.rstrip("\t") for line in lines])
    assert [line for line, found in zip(lines, offered, strict=True) if TYPED[line][-1] not in found] == []


def test_fish_knows_the_words_before_and_says_what_values_are(shells: Shells) -> None:
    offered = {
        "msrtrace state --diff 'data base' w": {"web:01": "pid 812, qemu"},
        "msrtrace state --vm ": {"web:01": "pid 812, qemu", "data base": "pid 9173, qemu"},
        "msrtrace show subdir/de": {"subdir/deep.json": ""},
        "msrtrace report -- workload-of-mine oth": {"other.txt": ""},
        "msrtrace top --exi": {"--exits": "Count the exits of guests' RDMSR and WRMSR, too"},
    }
    assert dict(zip(offered, shells.fish(tool("fish"), list(offered)), strict=True)) == offered


def test_errors_are_silent(shells: Shells) -> None:
    """A tab in the middle of what makes no sense leaves the line as it is."""
    lines = ["msrtrace nonsense x\t", "msrtrace state --nonsense\t", "msrtrace state 'x\t'"]
    found = shells.type([tool("bash"), *BASH], START["bash alone"], lines)
    assert found == [["nonsense", "x"], ["state", "--nonsense"], ["state", "x"]]
