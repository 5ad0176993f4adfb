# SPDX-License-Identifier: GPL-2.0-or-later
"""What bpf(2) is given: members of union bpf_attr, and a struct that it fills, by include/uapi/linux/bpf.h.

Members that msrtrace leaves at 0 are there as far as others come behind them.
"""

from __future__ import annotations

import ctypes

_U32, _U64 = ctypes.c_uint32, ctypes.c_uint64
_NAME = ctypes.c_char * 16  # BPF_OBJ_NAME_LEN


class MapCreate(ctypes.Structure):
    """BPF_MAP_CREATE."""

    _fields_ = [
        ("map_type", _U32),
        ("key_size", _U32),
        ("value_size", _U32),
        ("max_entries", _U32),
        ("map_flags", _U32),
        ("inner_map_fd", _U32),
        ("numa_node", _U32),
        ("map_name", _NAME),
    ]


class Element(ctypes.Structure):
    """BPF_MAP_*_ELEM and BPF_MAP_GET_NEXT_KEY, whose `next_key` is `value`."""

    _fields_ = [("map_fd", _U32), ("key", _U64), ("value", _U64), ("flags", _U64)]


class ProgLoad(ctypes.Structure):
    """BPF_PROG_LOAD."""

    _fields_ = [
        ("prog_type", _U32),
        ("insn_cnt", _U32),
        ("insns", _U64),
        ("license", _U64),
        ("log_level", _U32),
        ("log_size", _U32),
        ("log_buf", _U64),
        ("kern_version", _U32),
        ("prog_flags", _U32),
        ("prog_name", _NAME),
        ("prog_ifindex", _U32),
        ("expected_attach_type", _U32),
        ("prog_btf_fd", _U32),
        ("func_info_rec_size", _U32),
        ("func_info", _U64),
        ("func_info_cnt", _U32),
        ("line_info_rec_size", _U32),
        ("line_info", _U64),
        ("line_info_cnt", _U32),
        ("attach_btf_id", _U32),
        ("attach_btf_obj_fd", _U32),
    ]


class LinkCreate(ctypes.Structure):
    """BPF_LINK_CREATE."""

    _fields_ = [("prog_fd", _U32), ("target_fd", _U32), ("attach_type", _U32), ("flags", _U32)]


class IterCreate(ctypes.Structure):
    """BPF_ITER_CREATE."""

    _fields_ = [("link_fd", _U32), ("flags", _U32)]


class TestRun(ctypes.Structure):
    """BPF_PROG_TEST_RUN."""

    _fields_ = [
        ("prog_fd", _U32),
        ("retval", _U32),
        ("data_size_in", _U32),
        ("data_size_out", _U32),
        ("data_in", _U64),
        ("data_out", _U64),
        ("repeat", _U32),
        ("duration", _U32),
        ("ctx_size_in", _U32),
        ("ctx_size_out", _U32),
        ("ctx_in", _U64),
        ("ctx_out", _U64),
        ("flags", _U32),
        ("cpu", _U32),
    ]


class Id(ctypes.Structure):
    """BPF_*_GET_NEXT_ID and BPF_*_GET_FD_BY_ID: the kernel's number of an object."""

    _fields_ = [("id", _U32), ("next_id", _U32)]


class Info(ctypes.Structure):
    """BPF_OBJ_GET_INFO_BY_FD."""

    _fields_ = [("bpf_fd", _U32), ("info_len", _U32), ("info", _U64)]


class BtfInfo(ctypes.Structure):
    """struct bpf_btf_info."""

    _fields_ = [
        ("btf", _U64),
        ("btf_size", _U32),
        ("id", _U32),
        ("name", _U64),
        ("name_len", _U32),
        ("kernel_btf", _U32),
    ]
