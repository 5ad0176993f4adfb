# SPDX-License-Identifier: GPL-2.0-or-later
"""A state in words: what is shown of it, in which width, and what is together."""

from __future__ import annotations

import pytest
from filters import allowing, denying
from made_states import USUAL, USUALLY, amd_host, made, new_host, old_host, rows_shown, same, state_views, text
from vcpus import FS_BASE, SPEC_CTRL, TSC, rw, state, vcpu

from tracer.model.errors import MsrtraceError
from tracer.model.msr_filter import NO_FILTER, READ, MsrFilter
from tracer.model.nested import NESTED_SAID
from tracer.model.state import SAID, WORDS, State, Vcpu, Vm
from tracer.report.formats import FORMATS, OF_STATES, write_state
from tracer.report.state_view import RowChoice, ids_text

EVERYTHING = RowChoice(everything=True)


def one(vm_filter: MsrFilter | None = NO_FILTER, **changes: object) -> State:
    """A host of 6.18 with a VM of one vCPU."""
    return state(Vm(812, 1, (vcpu(USUAL, vm_filter, **changes),), name="web"))  # type: ignore[arg-type]


def test_a_host_as_text() -> None:
    denied = denying(FS_BASE, SPEC_CTRL)
    plain, filtered = vcpu(USUAL), vcpu(USUAL - rw(FS_BASE), denied)
    found = state(
        Vm(812, 1, same(0, 1, 2, 3, one=plain), name="web-01"),
        Vm(844, 2, same(0, 1, 2, 3, one=plain), name="web-02"),
        Vm(901, 3, same(0, 2, one=filtered), name="guarded"),
    )
    assert text(found) == GOLDEN


GOLDEN = """\
ada (Linux 6.1.0-53-amd64, Intel VMX): 3 VMs, 10 vCPUs

web-01 (pid 812), web-02 (pid 844): vCPU 0-3
  filter: none
  not shown: 20 ranges of other MSRs (--all)
  MSR                    name                         read    write
  ---------------------  ---------------------------  ------  -------
  0x10                   IA32_TSC                     passed  kvm
  0x174-0x176            IA32_SYSENTER_CS and 2 more  passed  passed
  0xc0000100-0xc0000102  FS_BASE and 2 more           passed  passed

guarded (pid 901): vCPU 0, 2
  filter: allows what no range decides
  0xc0000100 FS_BASE, read and write: denies it
  0x48 IA32_SPEC_CTRL, read and write: denies it
  not shown: 21 ranges of other MSRs (--all)
  MSR                    name                         read        write
  ---------------------  ---------------------------  ----------  ----------
  0x10                   IA32_TSC                     passed      kvm
  0x48                   IA32_SPEC_CTRL               unrecorded  unrecorded
  0x174-0x176            IA32_SYSENTER_CS and 2 more  passed      passed
  0xc0000100             FS_BASE                      filter      filter
  0xc0000101-0xc0000102  GS_BASE and 1 more           passed      passed

Words
  passed: passed through: the guest has the MSR itself
  kvm: intercepted since KVM itself wants that
  filter: intercepted since the VM's filter denies it; KVM would pass it through
  unrecorded: intercepted; this kernel does not record whether KVM itself wants
    that
"""


def test_as_markdown() -> None:
    found = state(Vm(812, 1, (vcpu(USUAL, denying(FS_BASE)),), name="web_01"))
    assert write_state(made(found), USUALLY, "markdown").decode() == MARKDOWN


MARKDOWN = r"""**ada (Linux 6.1.0-53-amd64, Intel VMX): 1 VM, 1 vCPU**

### web\_01 (pid 812): vCPU 0

- filter: allows what no range decides
- 0xc0000100 FS\_BASE, read and write: denies it
- not shown: 20 ranges of other MSRs (--all)

| MSR                   | name                          | read         | write        |
|-----------------------|-------------------------------|--------------|--------------|
| 0x10                  | IA32\_TSC                     | passed       | kvm          |
| 0x174-0x176           | IA32\_SYSENTER\_CS and 2 more | passed       | passed       |
| 0xc0000100            | FS\_BASE                      | pending deny | pending deny |
| 0xc0000101-0xc0000102 | GS\_BASE and 1 more           | passed       | passed       |

### Words

- passed: passed through: the guest has the MSR itself
- kvm: intercepted since KVM itself wants that
- pending deny: the filter denies it, but this is not yet applied to the vCPU: accesses still pass
"""


@pytest.mark.parametrize("made_up", [old_host, new_host, amd_host, state], ids=lambda host: str(host.__name__))
@pytest.mark.parametrize("shown", [RowChoice(), EVERYTHING], ids=["default", "all"])
@pytest.mark.parametrize("columns", [80, 60, 200])
def test_lines_fit(made_up: object, shown: RowChoice, columns: int) -> None:
    assert callable(made_up)
    lines = text(made_up(), shown, columns).splitlines()
    assert [line for line in lines if len(line) > columns] == []


def test_no_vm() -> None:
    assert text(state()) == "ada (Linux 6.1.0-53-amd64, Intel VMX): no VM has a vCPU\n"
    assert "1 VM, 1 vCPU\n" in text(one())


def test_every_word_is_explained_where_it_is_used() -> None:
    meanings = SAID | NESTED_SAID
    assert WORDS.keys() == meanings.keys()
    for view in (text(old_host()), text(new_host()), text(new_host(), EVERYTHING)):
        table, _, legend = view.partition("\nWords\n")
        for said, word in WORDS.items():
            assert (f"  {word}: {meanings[said][:30]}" in legend) == any(
                line.rstrip().endswith(word) or f"  {word}  " in line
                for line in table.splitlines()
                if line[:4] == "  0x"
            ), word


# --- which MSRs are shown ---


def test_what_passes_or_the_filter_denies_is_shown() -> None:
    assert [*rows_shown(one())] == ["0x10", "0x174-0x176", "0xc0000100-0xc0000102"]
    found = rows_shown(one(denying(0xCE, SPEC_CTRL)))
    assert found["0xce"][1:] == ["both", "both"]
    assert found["0x48"][1:] == ["unrecorded", "unrecorded"]
    assert "0x49" not in found


def test_all_are_shown_that_kvm_may_pass() -> None:
    found = rows_shown(one(), EVERYTHING)
    assert found["0x40-0x49"][1:] == ["kvm", "kvm"]
    assert found["0x6a4-0x6a7"][1:] == ["kvm", "kvm"]
    assert "not shown" not in text(one(), EVERYTHING)


def test_a_default_that_denies_shows_what_kvm_may_want() -> None:
    deny = MsrFilter(False, (allowing(TSC, 1, [TSC]), allowing(0x174, 3, [0x174, 0x175, 0x176])))
    found = rows_shown(state(Vm(1, 1, (vcpu(USUAL - rw(FS_BASE, 0xC0000101, 0xC0000102), deny),))))
    assert found["0xc0000100-0xc0000102"][1:] == ["filter", "filter"]
    assert found["0x1c4"][1:] == ["unrecorded", "unrecorded"]
    assert "filter: denies what no range decides" in text(one(deny))


def test_of_a_vcpu_that_never_ran_what_kvm_may_want_is_not_shown() -> None:
    """All of it would be unrecorded; what the filter denies is there."""
    never = vcpu((), denying(SPEC_CTRL), settled=False, ran=False)
    found = rows_shown(state(Vm(1, 1, (never,))))
    assert [*found] == ["0x10", "0x48", "0x174-0x176", "0xc0000100-0xc0000102"]
    assert found["0xc0000100-0xc0000102"][1:] == ["pending allow", "pending allow"]


def test_msrs_that_are_asked_for_have_rows_of_their_own() -> None:
    asked = (0x175, 0xCE, 0x12345678)
    found = rows_shown(one(), RowChoice(only=frozenset(asked)), asked)
    assert [*found] == ["0xce", "0x175", "0x12345678"]
    assert found["0x175"][1:] == ["passed", "passed"]
    assert "SYSENTER" in found["0x175"][0]
    assert found["0x12345678"] == ["", "kvm", "kvm"]
    assert "not shown" not in text(one(), RowChoice(only=frozenset(asked)), also=asked)


def test_a_filter_that_denies_every_second_msr_does_not_fill_the_screen() -> None:
    """What it denies alone stays; of the others KVM intercepts everything anyway."""
    wide = MsrFilter(True, (allowing(0x1000, 2000, range(0x1000, 0x17D0, 2)), allowing(FS_BASE, 1)))
    found = state(Vm(1, 1, (vcpu(USUAL - rw(FS_BASE), wide),)))
    assert rows_shown(found).keys() == {"0x10", "0x174-0x176", "0xc0000100", "0xc0000101-0xc0000102"}
    assert "  0x1000-0x17cf, read and write: denies 1000 of them\n" in text(found)
    assert len(rows_shown(found, EVERYTHING)) > 1000


# --- what is together ---


def heading(*vms: Vm) -> list[str]:
    return [line for line in text(state(*vms)).splitlines() if "vCPU " in line and line[0] != " " and ": vCPU" in line]


def test_vms_of_which_the_same_is_said_are_together() -> None:
    plain, other = vcpu(USUAL), vcpu(USUAL - rw(FS_BASE))
    assert heading(
        Vm(1, 1, same(0, 1, one=plain), name="a"),
        Vm(2, 2, same(0, one=plain), name="b"),
        Vm(3, 3, same(0, 1, one=plain), name="c"),
        Vm(4, 4, (plain, *same(1, 2, one=other)), name="d"),
    ) == ["a (pid 1), c (pid 3): vCPU 0-1; b (pid 2), d (pid 4): vCPU 0", "d (pid 4): vCPU 1-2"]


@pytest.mark.parametrize(
    "different",
    [
        Vm(2, 2, (vcpu(USUAL - rw(FS_BASE)),)),
        Vm(2, 2, (vcpu(USUAL, MsrFilter(True, (allowing(0x20, 1, [0x20]),))),)),
        Vm(2, 2, (vcpu(USUAL, settled=False),)),
        Vm(2, 2, (vcpu(USUAL, ran=False),)),
        Vm(2, 2, (vcpu(USUAL),), owned=False),
        Vm(2, 2, (vcpu(USUAL),), kind="TDX"),
    ],
)
def test_vms_that_differ_are_apart(different: Vm) -> None:
    assert len(heading(Vm(1, 1, (vcpu(USUAL, ran=None),)), different)) == 2
    assert len(heading(Vm(1, 1, (vcpu(USUAL, ran=None),)), Vm(2, 2, (vcpu(USUAL, ran=True),)))) == 1


def test_many_vms_are_not_all_named() -> None:
    vms = [Vm(pid, pid, (vcpu(USUAL),), name=f"vm{pid}") for pid in range(1, 31)]
    shown = " ".join(text(state(*vms)).split())
    assert "vm5 (pid 5), vm6 (pid 6) and 24 more: vCPU 0 filter" in shown
    assert "vm7" not in shown


def test_vms_of_one_process_are_named_once() -> None:
    assert heading(*(Vm(1, key, (vcpu(USUAL),), name="a") for key in range(3))) == ["a (pid 1), 3 VMs: vCPU 0"]


def test_uuids_are_those_of_the_vms_that_are_named() -> None:
    uuids = [f"6f1d7d5e-0c1b-4b6e-9a58-2d0a6f4f00{number:02}" for number in range(8)]
    vms = [Vm(pid, pid, (vcpu(USUAL),), name="web", uuid=uuids[pid]) for pid in range(1, 8)]
    assert f"web (pid 3): vCPU 0\n  UUID: {uuids[3]}\n  filter: none\n" in text(state(vms[2]))
    both = text(state(vms[0], Vm(2, 2, (vcpu(USUAL),), name="web"), vms[2]))
    assert f"\n  UUID of web (pid 1): {uuids[1]}\n  UUID of web (pid 3): {uuids[3]}\n  filter: none\n" in both
    assert [uuid in text(state(*vms)) for uuid in uuids] == [False, *[True] * 6, False]
    assert "UUID" not in text(state(Vm(1, 1, (vcpu(USUAL),), name="web")))


@pytest.mark.parametrize(("ids", "shown"), [([], ""), ([3], "3"), ([0, 1, 2, 8, 10, 11], "0-2, 8, 10-11")])
def test_ids(ids: list[int], shown: str) -> None:
    assert ids_text(ids) == shown


# --- filters and notes ---


def test_filters_in_words() -> None:
    ranges = (
        allowing(0x10, 1, [0x10], READ),
        allowing(0x20, 4, [0x21]),
        allowing(0x30, 2),
        allowing(0xFFFFFFFF, 2),
    )
    lines = text(one(MsrFilter(True, ranges))).splitlines()
    assert lines[3:8] == [
        "  filter: allows what no range decides",
        "  0x10 IA32_TSC, read: allows all of it",
        "  0x20-0x23 KNC_PERFCTR0, read and write: denies 3 of them",
        "  0x30-0x31, read and write: denies all of it",
        "  0xffffffff, none: decides nothing",
    ]
    assert "filter: could not be read" in text(one(None))
    assert "filter: none" in text(one(MsrFilter()))


def test_what_is_said_of_vcpus() -> None:
    found = " ".join(text(new_host()).split())
    assert "has not run yet its bitmap changes, or is to be computed anew when it next enters the guest" in found
    assert "TDX: its bitmaps are not KVM's, so what it intercepts is unknown" in found
    assert "the process that made this VM is gone; the one named here holds a descriptor, and cannot run it" in found
    amd = " ".join(text(amd_host()).split())
    assert "what it intercepts cannot be read" in amd
    assert "Notes bitmaps cannot be read" in amd
    assert "AMD SVM" in amd


def test_a_cpu_without_bitmaps() -> None:
    found = rows_shown(state(Vm(1, 1, (Vcpu(0, b"", denying(FS_BASE)),))))
    assert found == {"0xc0000100": [r"FS\_BASE", "both", "both"]}


def test_hostile_names_stay_in_their_place() -> None:
    hostile = "a|b\n# \x1b[31m\u202egpj `x`"
    found = state(Vm(1, 1, (vcpu(USUAL),), name=hostile), notes=(hostile,))
    views = state_views(made(found))
    for name, view in views.items():
        assert not {"\x1b", "\u202e"} & {*view}, name
    assert "\n# " not in views["text"]
    assert views["markdown"].count("\n# ") == 0


# --- formats ---


def test_formats() -> None:
    assert OF_STATES == ["text", "markdown", "json"]
    with pytest.raises(MsrtraceError, match=r"^states are not written as html$"):
        write_state(made(one()), RowChoice(), "html")
    assert FORMATS["html"].state is None
