# SPDX-License-Identifier: GPL-2.0-or-later
"""The BPF program as it is compiled and as the verifier sees it."""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from known import KnownBtf, symbols
from kvm_standin import SOURCE, TABLES, TRIVIAL, enumeration, headers_of, loaded

from tracer.model.errors import MsrtraceError
from tracer.model.options import BACKENDS, Options
from tracer.model.snapshot import DURATION_BOUNDS
from tracer.model.vendors import VENDORS
from tracer.program import syscalls
from tracer.program.bpf_attr import Info
from tracer.program.compiler import PROGRAMS, build, compiled
from tracer.program.loading import load
from tracer.program.program import Target, Variant
from tracer.program.source import whole_text
from tracer.program.syscalls import MMAPABLE
from tracer.trace.plan import values, variants
from tracer.trace.reader import WITHIN_CREATION, WITHIN_FILTER_CHANGE, WITHIN_RECALC


class CastingBtf(KnownBtf):
    """Of a kernel that has bpf_rdonly_cast(), with numbers that are not this machine's."""

    def kernel_ids(self, function: str, structure: str) -> tuple[int, int]:
        return 1, 2


def configurations() -> dict[str, Variant]:
    """Every way in which the engine may load the program, by its name."""
    found: dict[str, Variant] = {}
    for vendor, layout in ((one, layout) for one in VENDORS for layout in one.layouts):
        for btf in (None, CastingBtf()) if layout.calls else (None,):
            for filter_known in (True, False) if layout.filter_set else (False,):
                for by_vm in (False, True):
                    for pid in (None, 4711):
                        options = Options(by_vm, pid)
                        there = symbols(layout, "" if filter_known else str(layout.filter_set))
                        given = values(layout, btf, there, options)
                        for backend in BACKENDS:
                            if backend == "kprobe" or (btf and layout.calls):
                                wanted = replace(options, backend=backend)
                                for variant in variants(layout, there, given, wanted, btf):
                                    words = [vendor.name, layout.name, backend]
                                    words += ["cast"] if variant.kfuncs else []
                                    words += [f"{name}={value}" for name, value in variant.values.items()]
                                    found["-".join(words)] = variant
    return found


CONFIGURATIONS = configurations()


KPROBE = {name: variant for name, variant in CONFIGURATIONS.items() if variant.backend == "kprobe"}


#: Loaded for functions of the kernel that this machine may not have; the emulated hosts do that.
ELSEWHERE = {name for name, variant in CONFIGURATIONS.items() if variant.backend == "fentry" or variant.kfuncs}


def test_it_is_compiled_twice() -> None:
    """All else that differs is put in at loading."""
    found = {variant.backend: {*variant.definitions} for variant in CONFIGURATIONS.values()}
    assert found == {"kprobe": set(), "fentry": {"FENTRY"}}
    assert set(re.findall(r"^#if(?:n?def)? (.+)", whole_text(SOURCE), re.MULTILINE)) == {"FENTRY"}


@pytest.mark.parametrize("configuration", [name for name in KPROBE if name not in ELSEWHERE])
@pytest.mark.usefixtures("headers")
def test_the_verifier_takes_it(configuration: str) -> None:
    made = build(SOURCE, [KPROBE[configuration]]).loaded
    try:
        assert set(made.functions) == set(KPROBE[configuration].functions)
    finally:
        made.close()


@pytest.mark.parametrize(("name", "definitions"), PROGRAMS, ids=lambda part: part if isinstance(part, str) else None)
def test_the_headers_make_no_difference(
    host: str, name: str, definitions: dict[str, int], headers: None, tmp_path: Path
) -> None:
    """So a program may be kept whatever the kernel's are."""
    source = SOURCE.with_name(name)
    made = compiled(source, definitions)
    with headers_of(host, tmp_path):
        assert compiled(source, definitions) == made


@pytest.mark.parametrize(("backend", "definitions"), [("kprobe", {}), ("fentry", {"FENTRY": 1})])
@pytest.mark.usefixtures("headers")
def test_values_and_functions_are_those_of_the_program(backend: str, definitions: dict[str, int]) -> None:
    """Each is used in some configuration, and none is asked for that is not there."""
    program = compiled(SOURCE, definitions)
    used = [variant for variant in CONFIGURATIONS.values() if variant.backend == backend]
    assert {name for variant in used for name in variant.functions} == set(program.functions)
    unused = {"kretprobe_trampoline", "fgraph_trampoline"}  # which these symbols are without
    unused |= {"enable_at", "disable_at", "set_at", "pass_at"} if backend == "kprobe" else {"claims"}
    assert {name for variant in used for name in variant.values} == set(program.values) - unused
    calls = {one.number for code in program.functions.values() for one in code.relocations if one.what == "kfunc"}
    assert {number for variant in used for number in variant.kfuncs} == calls
    capacities = {name for variant in used for name in variant.capacities}
    assert capacities == {"counters", "updates", "taken"} <= {one.name for one in program.maps}


@pytest.mark.usefixtures("headers")
def test_there_is_room_to_say_that_every_place_is_taken() -> None:
    for variant in KPROBE.values():
        size = {one.name: one.max_entries for one in compiled(SOURCE, {}).maps} | {**variant.capacities}
        assert size["taken"] == sum(size[name] for name in TABLES) + size["vcpus"]  # the last are for claim()


def test_what_is_loaded() -> None:
    whole, least = (
        KPROBE[name]
        for name in (
            "vmx-recalc-kprobe-cast-bitmap_offset=6840-exits_offset=5008-cast_type=2-exact=1-filter_offset=0"
            "-wanted_pid=4711-by_pid=1-leader_offset=1416-start_offset=1384-command_offset=1896",
            "vmx-toggle-kprobe-update_kind=1",
        )
    )
    assert set(whole.functions) == {
        "update_entered",
        "update_returned",
        "filter_set_entered",
        "filter_set_returned",
        "vcpu_created",
        "creation_ended",
        "vcpu_freed",
        "writer_entered",
        "set_entered",
        "settle_call",
        "counter_ended",
        "update_ended",
    }
    assert set(least.functions) == {
        "update_entered",
        "update_returned",
        "vcpu_created",
        "creation_ended",
        "vcpu_freed",
        "enable_entered",
        "disable_entered",
    }


CALL, ATOMIC, CMPXCHG = 0x85, 0xDB, 0xF1


def translated(program: int) -> list[tuple[int, int, int, int]]:
    """The instructions that a loaded PROGRAM has after verification: code, registers, offset, immediate."""
    sizes, code = struct.Struct("20xI"), bytearray()  # of struct bpf_prog_info: xlated_prog_len
    for _ in range(2):
        info = bytearray(256)
        struct.pack_into("<I8xQ", info, 20, len(code), syscalls._address(code) if code else 0)
        attributes = Info(bpf_fd=program, info_len=len(info), info=syscalls._address(info))
        syscalls._bpf(syscalls._OBJ_GET_INFO_BY_FD, attributes)
        code = code or bytearray(sizes.unpack_from(info)[0])
    return list(struct.iter_unpack("<BBhi", code))


def test_what_no_value_leads_to_is_gone_once_it_is_loaded(headers: None) -> None:
    """Each condition that is not met leaves its constant alone."""
    program = compiled(SOURCE, {})
    everything = {name: Target("kprobe") for name in ("update_entered", "vcpu_freed", "enable_entered")}

    def left(**given: int) -> dict[str, list[tuple[int, int, int, int]]]:
        made = load(
            program, Variant("kprobe", {}, everything, given, cmpxchg="exact" in given and "claims" not in given)
        )
        try:
            return {name: translated(fd) for name, fd in made.functions.items()}
        finally:
            made.close()

    def calls(code: list[tuple[int, int, int, int]]) -> int:
        return sum(operation == CALL for operation, *_ in code)

    def exchanges(code: list[tuple[int, int, int, int]]) -> int:
        return sum((operation, number) == (ATOMIC, CMPXCHG) for operation, *_, number in code)

    exact = {"exact": 1, "bitmap_offset": 6840, "update_kind": 1}
    blind, seen, old = left(update_kind=1), left(**exact), left(**exact, claims=1)
    assert {name: exchanges(code) for name, code in blind.items()} == dict.fromkeys(everything, 0)
    assert {name: exchanges(code) for name, code in seen.items()} == dict.fromkeys(everything, 1)
    assert {name: exchanges(code) for name, code in old.items()} == dict.fromkeys(everything, 0)
    # Nothing is read of the kernel; the place is given back.
    assert (calls(blind["vcpu_freed"]), calls(seen["vcpu_freed"])) == (1, 3)
    for more in ({"wanted_pid": 1}, {"by_pid": 1}, {"leader_offset": 8}):
        with_it = left(**exact, **more)
        assert len(with_it["enable_entered"]) > len(seen["enable_entered"]), more
    # What tells updates apart: in that function, and not in that of calls.
    told = left(exact=1, bitmap_offset=6840)
    assert len(told["update_entered"]) > len(seen["update_entered"])
    assert len(told["enable_entered"]) == len(seen["enable_entered"])


@pytest.mark.usefixtures("headers")
def test_the_verifier_refuses(tmp_path: Path) -> None:
    """An unbounded read, by the same way; with a bound it passes."""
    source = (
        "#include <uapi/linux/ptrace.h>\n"
        "BPF_ARRAY(numbers, u64, 1);\n"
        "int reads(struct pt_regs *ctx)\n"
        "{\n"
        "\tint zero = 0;\n"
        "\tu64 index = PT_REGS_PARM2(ctx), *value = numbers.lookup(&zero);\n\n"
        "\treturn value && CONDITION ? value[index] : 0;\n"
        "}\n"
    )
    loaded(source.replace("CONDITION", "index < 1"), tmp_path, "reads").close()
    reason = "the kernel refuses the BPF program reads: .*math between map_value pointer and register with unbounded"
    with pytest.raises(MsrtraceError, match=reason):
        loaded(source, tmp_path, "reads", CONDITION=1)


@pytest.mark.usefixtures("headers")
def test_what_the_compiler_says_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(MsrtraceError) as failure:
        loaded(TRIVIAL.replace("return 0", "return NOTHING"), tmp_path, "trivial")
    message = str(failure.value)
    assert "error: use of undeclared identifier 'NOTHING'" in message
    assert "\n" not in message


def test_what_an_update_is_for() -> None:
    assert enumeration("within") == ["NONE", "FILTER_CHANGE", "RECALC", "CREATION"]
    assert (WITHIN_FILTER_CHANGE, WITHIN_RECALC, WITHIN_CREATION) == (1, 2, 3)


@pytest.mark.usefixtures("headers")
def test_members_are_all_that_there_is() -> None:
    for one in (*compiled(SOURCE, {}).maps, *compiled(SOURCE.with_name("state.c"), {}).maps):
        if one.flags & MMAPABLE:
            ranges = (range(member.offset, member.offset + member.bytes) for member in one.members.values())
            assert {place for places in ranges for place in places} == {*range(one.value_size)}, one.name


def test_buckets() -> None:
    [buckets] = map(int, re.findall(r"^#define BUCKETS (\d+)\b", whole_text(SOURCE), re.MULTILINE))
    assert buckets >= len(DURATION_BOUNDS) + 2  # the first is not used, the last has the rest
    assert buckets.bit_count() == 1  # it is the mask that bounds an index, too
