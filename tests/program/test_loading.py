# SPDX-License-Identifier: GPL-2.0-or-later
"""What is put into programs when they are loaded, and what the kernel refuses."""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import replace

import pytest
from needs import ROOT_ALONE

from tracer.program import relocation
from tracer.program.loading import load, translate_errors
from tracer.program.program import Function, MapDefinition, NotPermitted, Program, Target, Variant, VariantRejected

as_root = pytest.mark.skipif(os.geteuid() != 0, reason=ROOT_ALONE)


def instruction(code: int, registers: int, immediate: int, offset: int = 0) -> bytes:
    return struct.pack("<BBhi", code, registers, offset, immediate)


def test_what_is_put_in_at_loading() -> None:
    """Descriptors, values and ids go where they belong, and nowhere else."""
    mark, kfunc, cmpxchg = relocation._VALUE_MARK, relocation._FIRST_KFUNC + 1, instruction(0xDB, 0x1A, 0xF1, -8)
    code = b"".join(
        (
            instruction(0x18, 0x12, 7) + instruction(0, 0, 0),  # a map
            instruction(0x18, 0x03, 1) + instruction(0, 0, mark),  # a value
            instruction(0x18, 0x03, 0) + instruction(0, 0, mark),  # one that is not given
            instruction(0x18, 0x03, 1) + instruction(0, 0, 7),  # any number
            instruction(0x18, 0x03, 0x85) + instruction(0, 0, 0x18),
            instruction(0x85, 0, 14),  # a helper
            instruction(0x85, 0, kfunc),  # a function of the kernel
            instruction(0x85, 0x10, 99),  # a function of the program
            cmpxchg,
            instruction(0xDB, 0x1A, 0, -8),  # another atomic operation
            instruction(0x95, 0, 0),
        )
    )
    variant = Variant("kprobe", {}, {}, values={"given": 0xFFFFFFFF81234567}, kfuncs={kfunc: 4242})
    function = relocation.relocated(code, {7: 1})
    assert function == relocation.relocated(code.replace(b"\7", b"\x08", 1), {8: 1})  # whatever it was
    resolved = relocation.resolved(function, [50, 51], ["absent", "given"], variant)
    words = list(struct.iter_unpack("<BBhi", resolved))
    assert [words[n][3] for n in (0, 2, 4, 6, 8, 10, 11, 12)] == [51, 0x81234567 - 2**32, 0, 1, 0x85, 14, 4242, 99]
    assert [words[n][3] for n in (3, 5, 7, 9)] == [-1, 0, 7, 0x18]
    assert [words[n][1] for n in (10, 11, 12)] == [0, 0x20, 0x10]
    assert resolved[13 * 8 :] == code[13 * 8 :]
    without = relocation.resolved(function, [50, 51], ["absent", "given"], replace(variant, kfuncs={}, cmpxchg=False))
    # A jump to the next instruction; and the call stays what BCC made of it.
    assert without[13 * 8 :] == instruction(0x05, 0, 0) + code[14 * 8 :]
    assert without[11 * 8 : 12 * 8] == instruction(0x85, 0, kfunc)


@pytest.mark.parametrize(
    "line",
    [
        "program of this type cannot use helper bpf_probe_read_kernel#113",
        "cannot use helper bpf_probe_read_kernel#113",
        "unknown func bpf_probe_read_kernel#113",
    ],
)
def test_reads_that_the_kernel_forbids_are_not_permitted(line: str) -> None:
    """As lockdown does: the verifier says EINVAL, as if there were no such helper."""
    log = bytearray(f"0: (85) call bpf_probe_read_kernel#113\n{line}\nprocessed 1 insns\n\0".encode())
    with pytest.raises(NotPermitted), translate_errors("refuses the BPF program f", log):
        raise OSError(errno.EINVAL, "Invalid argument")


RETURN_0 = instruction(0xB7, 0, 0) + instruction(0x95, 0, 0)


@as_root
def test_what_the_kernel_refuses_is_said_and_nothing_stays() -> None:
    def descriptors() -> set[str]:
        return set(os.listdir("/proc/self/fd"))

    before = descriptors()
    good = Program(
        [MapDefinition("m", 2, 4, 8, 1, 0)], {"f": Function(RETURN_0), "g": Function(instruction(0x95, 0, 0))}
    )
    both = {"f": Target("kprobe"), "g": Target("kprobe")}
    with pytest.raises(VariantRejected, match=r"^the kernel refuses the BPF program g: R0 !read_ok$") as failure:
        load(good, Variant("kprobe", {}, both))
    assert "0: (95) exit" in failure.value.output
    with pytest.raises(VariantRejected, match=r"^the kernel makes no BPF map m: Invalid argument$"):
        load(Program([MapDefinition("m", 2, 5, 8, 1, 0)], {}), Variant("kprobe", {}, {}))
    with pytest.raises(VariantRejected, match=r"^the kernel gives no BTF of none: No such file or directory$"):
        load(good, Variant("fentry", {}, {"f": Target("fentry", 1, "none")}))
    assert descriptors() == before
    loaded = load(good, Variant("kprobe", {}, {"f": Target("kprobe")}))
    assert (list(loaded.maps), list(loaded.functions)) == (["m"], ["f"])
    loaded.close()
    assert descriptors() == before
