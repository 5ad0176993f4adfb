# SPDX-License-Identifier: GPL-2.0-or-later
"""What the BPF programs may call, as SECURITY.md says: they read the kernel's memory, and write to their maps."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import pytest

from tracer.kernel.headers import header_settings
from tracer.program.compiler import PROGRAMS, compiled
from tracer.program.resources import resource

#: enum bpf_func_id, include/uapi/linux/bpf.h
READING = {
    1: "map_lookup_elem",
    2: "map_update_elem",
    3: "map_delete_elem",
    5: "ktime_get_ns",
    14: "get_current_pid_tgid",
    16: "get_current_comm",
    35: "get_current_task",
    67: "get_stack",
    113: "probe_read_kernel",
    127: "seq_write",
    183: "get_func_arg",
}
CALL, OF_HELPER = 0x85, 0  # the opcode, and the source register of a call of a helper


@pytest.mark.parametrize(("name", "definitions"), PROGRAMS)
def test_programs_change_nothing_but_their_maps(headers: None, name: str, definitions: Mapping[str, int]) -> None:
    """Not probe_write_user(), override_return() or send_signal(); and they read no memory of user space."""
    program = compiled(resource(f"bpf/{name}"), definitions, header_settings)
    called = set()
    for function in program.functions.values():
        # What is put in at loading is bpf_rdonly_cast(), which only tells the verifier a type.
        put_in = {one.at for one in function.relocations if one.what == "kfunc"}
        for index, (opcode, registers, _, number) in enumerate(struct.iter_unpack("<BBhi", function.code)):
            if opcode == CALL and registers >> 4 == OF_HELPER and index * 8 not in put_in:
                called.add(number)
    assert called
    assert called <= READING.keys()
