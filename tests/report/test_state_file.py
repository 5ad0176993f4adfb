# SPDX-License-Identifier: GPL-2.0-or-later
"""Files on states: what is in them, the schema, and what is none; damaged and hostile ones."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from filters import BOTH, allowing, denying
from hostile import anything, foreign, nested, oversized, places, replaced
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made import patched
from made_states import USUAL, amd_host, any_states, made, new_host, old_host, state_views
from vcpus import FS_BASE, SPEC_CTRL, TSC, rw, state, vcpu

from tracer.model.errors import MsrtraceError
from tracer.model.msr_filter import NO_FILTER, READ, WRITE, FilterRange, MsrFilter
from tracer.model.state import Vcpu, Vm
from tracer.report import file as reportfile
from tracer.report.file import STATE, decode, decode_as, encode, read_as
from tracer.report.state_file import StateFile, msr_range, range_text

SCHEMA = Path(reportfile.__file__).with_name("state.schema.json")
EXAMPLES = {"old": made(old_host()), "new": made(new_host()), "AMD": made(amd_host()), "none": made(state())}
EXAMPLE = encode(EXAMPLES["new"])


@pytest.fixture(scope="session")
def valid() -> jsonschema.protocols.Validator:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_schema_is_generated_from_the_types() -> None:
    command = [sys.executable, "-m", "tracer.report.file", "state"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == SCHEMA.read_text(), f"{' '.join(command)} > {SCHEMA}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_states_fit_the_schema(valid: jsonschema.protocols.Validator, name: str) -> None:
    valid.validate(json.loads(encode(EXAMPLES[name])))
    assert decode_as(STATE, encode(EXAMPLES[name])) == EXAMPLES[name]


@given(one=any_states)
def test_all_states_fit_the_schema_and_are_shown(valid: jsonschema.protocols.Validator, one: StateFile) -> None:
    valid.validate(json.loads(encode(one)))
    state_views(one)


# --- what is in them ---


def test_the_file_on_a_state() -> None:
    content = json.loads(EXAMPLE)
    assert content["schema"] == "msrtrace-state/1"
    assert content["taken"] == "2026-11-22T15:00:00.987+00:00"
    assert content["host"]["kvm_intel"] == {"ept": "Y", "nested": "Y"}
    guarded, secret, gone = content["vms"]
    assert guarded["filter"]["ranges"][0] == {"msrs": "0xc0000100", "access": "read_write", "denied": ["0xc0000100"]}
    one, other = guarded["vcpus"]
    assert (one["ids"], one["ran"], one["settled"]) == ([0], None, True)
    assert (other["ids"], other["ran"], other["settled"]) == ([1], False, False)
    assert one["passed"] == {
        "read": ["0x10", "0x174-0x176", "0xc0000101-0xc0000102"],
        "write": ["0x174-0x176", "0xc0000101-0xc0000102"],
    }
    [row] = [row for row in one["msrs"] if row["msrs"] == "0xc0000100"]
    assert row == {"msrs": "0xc0000100", "name": "FS_BASE", "read": "filter", "write": "filter", "in_filter": True}
    [spec] = [row for row in one["msrs"] if row["msrs"] == "0x48"]
    assert (spec["read"], spec["in_filter"]) == ("unrecorded", True)
    assert (secret["kind"], secret["vcpus"][0]["passed"], secret["vcpus"][0]["msrs"]) == ("TDX", None, [])
    assert (gone["owned"], gone["name"]) == (False, "")


def test_a_filter_that_cannot_be_read() -> None:
    vm = made(state(Vm(1, 1, (vcpu(USUAL, None),)))).vms[0]
    assert vm.filter is None
    assert {row.read for row in vm.vcpus[0].msrs} == {"passed", "unknown"}


def test_ranges_of_a_filter() -> None:
    """Of the last, KVM finds no access in it: its end is beyond 32 bits."""
    ranges = (
        allowing(0x10, 4, [0x11], READ),
        allowing(0x20, 1, [0x20], WRITE),
        allowing(0x30, 2),
        FilterRange(BOTH, 0xFFFFFFFF, 5, bytes(8)),
    )
    found = made(state(Vm(1, 1, (vcpu((), MsrFilter(False, ranges)),)))).vms[0].filter
    assert found
    assert found.default == "deny"
    assert [(row.msrs, row.access, row.denied) for row in found.ranges] == [
        ("0x10-0x13", "read", ["0x10", "0x12-0x13"]),
        ("0x20", "write", []),
        ("0x30-0x31", "read_write", ["0x30-0x31"]),
        ("0xffffffff", "none", []),
    ]


def test_what_a_filter_denies_is_marked_msr_by_msr() -> None:
    one = vcpu(USUAL, denying(0x175))
    rows = {row.msrs: row.in_filter for row in made(state(Vm(1, 1, (one,)))).vms[0].vcpus[0].msrs}
    assert [rows[msrs] for msrs in ("0x174", "0x175", "0x176")] == [False, True, False]


def test_the_same_is_found_once_and_vcpus_keep_their_ids() -> None:
    one, other = vcpu(USUAL, id=2), vcpu(USUAL, id=0)
    first, second = made(state(Vm(1, 1, (one, other)), Vm(2, 2, (replace(one, id=7),)))).vms
    assert ([group.ids for group in first.vcpus], [group.ids for group in second.vcpus]) == ([[0, 2]], [[7]])
    assert first.vcpus[0].msrs is second.vcpus[0].msrs
    assert first.count == 2


def test_an_msr_that_is_asked_for_is_in_it() -> None:
    found = made(state(Vm(1, 1, (vcpu(),))), also=(0xCE, 0xFFFFFFFF))
    assert {"0xce", "0xffffffff"} <= {row.msrs for row in found.vms[0].vcpus[0].msrs}


@given(st.integers(0, 2**32 - 1), st.integers(1, 5000))
def test_ranges_as_text(first: int, count: int) -> None:
    one = range(first, min(first + count, 2**32))
    assert msr_range(range_text(one)) == one


def test_an_unsettled_vcpu_that_passes_what_is_denied() -> None:
    one = vcpu(rw(FS_BASE), denying(FS_BASE), settled=False)
    group = made(state(Vm(1, 1, (one,)))).vms[0].vcpus[0]
    [row] = [row for row in group.msrs if row.msrs == "0xc0000100"]
    assert (row.read, row.write, group.settled) == ("pending_denied", "pending_denied", False)


def test_a_state_without_names_and_notes() -> None:
    plain = state(Vm(1, 1, (Vcpu(0, b"", NO_FILTER),)))
    found = made(plain)
    assert found.notes == []
    assert found.vms[0].title == "VM (pid 1)"
    assert {(row.read, row.write) for row in found.vms[0].vcpus[0].msrs} == {("kvm", "kvm")}
    assert {TSC, SPEC_CTRL} <= {msr for row in found.vms[0].vcpus[0].msrs for msr in msr_range(row.msrs)}


# --- large ones ---


def of_size(size: int) -> StateFile:
    """A state that takes as many bytes, to the byte, as JSON without indents."""
    filler = msgspec.structs.replace(EXAMPLES["none"], notes=["", ""])
    vm = EXAMPLES["new"].vms[0]
    vms, rest = divmod(size - len(msgspec.json.encode(filler)) + 1, len(msgspec.json.encode(vm)) + 1)  # and a comma
    notes = ["x" * (rest // 2), "x" * (rest - rest // 2)]
    return msgspec.structs.replace(filler, vms=[vm] * vms, notes=notes)


def test_a_large_state_is_written_without_indents() -> None:
    small, large = of_size(reportfile.SIZE_LIMIT // 4), of_size(reportfile.SIZE_LIMIT - 1)
    assert encode(small).count(b"\n") > 1000
    text = encode(large)
    assert (len(text), text.count(b"\n")) == (reportfile.SIZE_LIMIT, 1)
    assert decode_as(STATE, text) == large


def test_a_state_that_could_not_be_read_is_not_written() -> None:
    with pytest.raises(MsrtraceError) as error:
        encode(of_size(reportfile.SIZE_LIMIT))
    assert str(error.value) == (
        "the state takes 33 MB as JSON, and files of more than 32 MB cannot be read: "
        "select VMs (--vm, --pid), or write text"
    )


# --- what is no state ---


def refusal(data: bytes) -> str:
    with pytest.raises(MsrtraceError) as error:
        decode_as(STATE, data)
    return checked(str(error.value))


def checked(text: str) -> str:
    assert text.isprintable()
    assert len(text) < 500
    return text


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        *foreign(EXAMPLE, "msrtrace-state/1", "state"),
        (encode(patched()), "is not an msrtrace state but a report (msrtrace-report/1)"),
    ],
)
def test_what_is_not_a_state_is_refused(data: bytes, reason: str) -> None:
    assert refusal(data).startswith(reason)


@pytest.mark.parametrize("data", nested(EXAMPLE))
def test_deep_nesting_is_refused(data: bytes) -> None:
    assert "too deeply" in refusal(data)


@pytest.mark.parametrize("data", oversized(EXAMPLE, reportfile.SIZE_LIMIT))
def test_an_oversized_file_is_refused(data: bytes) -> None:
    before = time.process_time()
    refusal(data)
    assert time.process_time() - before < 10


def test_a_state_is_no_report() -> None:
    with pytest.raises(MsrtraceError, match=r"^is not an msrtrace report but a state \(msrtrace-state/1\)$"):
        decode(EXAMPLE)


def test_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(EXAMPLE)
    assert read_as(STATE, tmp_path / "state.json") == EXAMPLES["new"]
    with pytest.raises(MsrtraceError, match=r"^cannot read .*/none.json: No such file or directory$"):
        read_as(STATE, tmp_path / "none.json")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("vms", 0, "pid"), -1),
        (("vms", 0, "vcpus", 0, "ids", 0), "0"),
        (("vms", 0, "vcpus", 0, "msrs", 0, "read"), "perhaps"),
        (("vms", 0, "vcpus", 0, "msrs", 0, "msrs"), "0x1-0x2-0x3"),
        (("vms", 0, "vcpus", 0, "msrs", 0, "msrs"), "0x100000000"),
        (("vms", 0, "vcpus", 0, "passed", "read", 0), "-0x1"),
        (("vms", 0, "filter", "default"), "perhaps"),
        (("vms", 0, "filter", "ranges", 0, "access"), "execute"),
        (("host", "vendor"), "tdx"),
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(
    valid: jsonschema.protocols.Validator, place: tuple[Any, ...], value: object
) -> None:
    content = changed((place, value))
    assert not valid.is_valid(content)
    assert refusal(json.dumps(content).encode()).startswith("is a damaged state: ")


# --- hostile files ---


def changed(*changes: tuple[tuple[Any, ...], object]) -> Any:
    """The example with values replaced (...: taken away)."""
    return replaced(EXAMPLE, changes)


def survives(data: bytes) -> None:
    try:
        found = decode_as(STATE, data)
    except MsrtraceError as error:
        checked(str(error))
    else:
        for view in state_views(found).values():
            assert not {"\x1b", "\x00", "\u202e"} & {*view}
        assert decode_as(STATE, encode(found)) == found


PLACES = [
    place for place in places(json.loads(EXAMPLE)) if place and (place[4:5] != ("msrs",) or place[5:6] in ((), (0,)))
]


@given(st.lists(st.tuples(st.sampled_from(PLACES), st.one_of(anything, st.just(...))), min_size=1, max_size=3))
@example([(("vms", 0, "vcpus", 0, "msrs", 0, "msrs"), "0x0-0xffffffff")])
@example([(("vms", 0, "vcpus", 0, "msrs", 0, "msrs"), "0xffffffff-0x0")])
@example([(("vms", 0, "filter", "ranges", 0, "denied"), ["0x0-0xffffffff"])])
def test_a_state_with_replaced_values_is_read_or_refused(changes: list[tuple[tuple[Any, ...], object]]) -> None:
    survives(json.dumps(changed(*changes)).encode())


@given(st.lists(st.tuples(st.integers(0, len(EXAMPLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_state_with_replaced_bytes_is_read_or_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(EXAMPLE)
    for at, byte in changes:
        data[at] = byte
    survives(bytes(data))


@settings(max_examples=30)
@given(st.integers(0, len(EXAMPLE) - 1), st.integers(0, len(EXAMPLE) - 1), st.binary(max_size=9))
def test_a_state_with_a_piece_cut_out_is_read_or_refused(one: int, other: int, put: bytes) -> None:
    survives(EXAMPLE[: min(one, other)] + put + EXAMPLE[max(one, other) :])
