# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels that need no unpacking: emulated, the decompressor of an xz-packed one takes half of the boot."""

from __future__ import annotations

import lzma
import struct
import subprocess
import tempfile
from pathlib import Path

from cache import RigError, sh

STUB = Path(__file__).resolve().parent / "enter.S"
#: Where a boot loader puts what follows the setup code of a kernel that cannot be relocated.
LOADED_AT = 0x100000
PAGE = 4096
# Offsets in the setup header: Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".
SETUP_SECTORS, SYSSIZE, MAGIC, RELOCATABLE, PAYLOAD = 0x1F1, 0x1F4, 0x202, 0x234, 0x248


def prepare(vmlinuz: Path, medium: Path) -> None:
    """Write MEDIUM/vmlinuz: the kernel VMLINUZ with its decompressor replaced by enter.S, its payload by plain pages.

    The setup code is kept and what it finds in memory is the kernel as Debian built it, so boot loader, command line,
    initrd and memory map are those of VMLINUZ. Only KASLR is gone: the decompressor did that.
    """
    bzimage = vmlinuz.read_bytes()
    if bzimage[MAGIC : MAGIC + 4] != b"HdrS":
        raise RigError(f"{vmlinuz} is no bzImage")
    setup = bytearray(bzimage[: ((bzimage[SETUP_SECTORS] or 4) + 1) * 512])
    offset, length = struct.unpack_from("<II", bzimage, PAYLOAD)
    entry, base, memory = loaded(unpacked(bzimage[len(setup) + offset :][:length]))
    code = stub(entry)
    code += moves(base, memory, LOADED_AT + len(code))
    struct.pack_into("<I", setup, SYSSIZE, -(-len(code) // 16))
    struct.pack_into("<II", setup, PAYLOAD, 0, 0)
    setup[RELOCATABLE] = 0
    (medium / "vmlinuz").write_bytes(setup + code)


def unpacked(payload: bytes) -> bytes:
    """The vmlinux in PAYLOAD; its last four bytes, the size, are for the decompressor alone."""
    if payload.startswith(b"\xfd7zXZ"):
        return lzma.decompress(payload[:-4])
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        return subprocess.run(["zstd", "-dc"], input=payload[:-4], stdout=subprocess.PIPE, check=True).stdout
    raise RigError(f"unknown compression of the kernel: it begins with {payload[:8].hex()}")


def loaded(elf: bytes) -> tuple[int, int, bytes]:
    """The physical entry point of the vmlinux ELF, and its segments: their lowest physical address and the memory."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise RigError("the kernel's payload is no 64-bit ELF file")
    entry, headers = struct.unpack_from("<QQ", elf, 24)
    size, count = struct.unpack_from("<HH", elf, 54)
    found = [struct.unpack_from("<II6Q", elf, headers + size * index) for index in range(count)]
    segments = [header[2:7] for header in found if header[0] == 1]  # PT_LOAD: offset, vaddr, paddr, filesz, memsz
    base = min(paddr for _, _, paddr, _, _ in segments)
    end = max(paddr + memsz for _, _, paddr, _, memsz in segments)
    if base % PAGE:
        raise RigError(f"the kernel wants to be at {base:#x}")
    memory = bytearray(-(-(end - base) // PAGE) * PAGE)
    for at, _, paddr, filesz, _ in segments:
        memory[paddr - base : paddr - base + filesz] = elf[at : at + filesz]
    return entry, base, bytes(memory)


def stub(entry: int) -> bytes:
    """The code of enter.S, linked for where it is loaded; it goes on to ENTRY."""
    with tempfile.TemporaryDirectory() as work:
        built, linked = Path(work, "enter.o"), Path(work, "enter")
        sh(["as", "--64", "--defsym", f"ENTRY={entry:#x}", "-o", built, STUB])
        sh(["ld", "-m", "elf_x86_64", "--oformat=binary", f"-Ttext={LOADED_AT:#x}", "-o", linked, built])
        return linked.read_bytes()


def moves(base: int, memory: bytes, address: int) -> bytes:
    """The list that enter.S works through to fill MEMORY at BASE, then the pages that it moves. The list is at ADDRESS.

    Pages of zeros, up to half of the whole, are not stored.
    """
    blank = bytes(PAGE)
    runs: list[tuple[bool, int, int]] = []  # whether zeros, first byte, end
    for at in range(0, len(memory), PAGE):
        zeros = memory[at : at + PAGE] == blank
        if runs and runs[-1][0] == zeros:
            runs[-1] = (zeros, runs[-1][1], at + PAGE)
        else:
            runs.append((zeros, at, at + PAGE))
    stored = b"".join(memory[start:end] for zeros, start, end in runs if not zeros)
    source = address + 12 * (len(runs) + 1)
    if source > base:
        raise RigError(f"the kernel wants to be at {base:#x}, where the code is that puts it there")
    source += len(stored)
    entries = []
    for zeros, start, end in reversed(runs):
        entries.append(struct.pack("<III", base + end - 4, 0 if zeros else source - 4, (end - start) // 4))
        if not zeros:
            source -= end - start
    return b"".join([*entries, bytes(12), stored])
