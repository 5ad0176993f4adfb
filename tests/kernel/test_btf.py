# SPDX-License-Identifier: GPL-2.0-or-later
"""BTF: synthetic blobs; and this kernel and the kvm_intel of every emulated host, compared with pahole."""

from __future__ import annotations

import lzma
import re
import struct
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from hosts import HOSTS, Host, kernel, vmlinuz
from hypothesis import given
from hypothesis import strategies as st
from needs import tool

from tracer.kernel.btf import Btf, BtfError, kernel_btf_kept
from tracer.model.vendor import Vendor
from tracer.model.vendors import VENDORS
from tracer.model.vmx import VMX

INT, ARRAY, STRUCT, UNION, ENUM, FWD, FUNC, FUNC_PROTO, VAR, DATASEC = 1, 3, 4, 5, 6, 7, 12, 13, 14, 15
DECL_TAG, ENUM64 = 17, 19

# Documentation/bpf/btf.rst: what follows a type with three elements, or is counted otherwise.
AFTER = {INT: 4, ARRAY: 12, STRUCT: 36, UNION: 36, ENUM: 24, FUNC_PROTO: 24, VAR: 4, DATASEC: 36, DECL_TAG: 4}
AFTER |= {ENUM64: 36}


class Blob:
    """Builds BTF; `base` is the BTF that a split one continues."""

    def __init__(self, base: Blob | None = None) -> None:
        self.base, self.types = base, b""
        self.strings = b"" if base else b"\0"

    def string(self, text: str) -> int:
        """The offset of a string: in the base if that has it, as pahole does it."""
        encoded = text.encode() + b"\0"
        start = len(self.base.strings) if self.base else 0
        if self.base and (at := self.base.strings.find(b"\0" + encoded)) >= 0:
            return at + 1
        self.strings += encoded
        return start + len(self.strings) - len(encoded)

    def type(self, name: str, kind: int, after: bytes = b"", elements: int = 0, flag: bool = False) -> Blob:
        self.types += struct.pack("<III", self.string(name), flag << 31 | kind << 24 | elements, 64) + after
        return self

    def struct(self, name: str, *members: tuple[str, int], flag: bool = False, kind: int = STRUCT) -> Blob:
        """Add a structure; each member is a name and the offset word of the format, in bits."""
        rows = b"".join(struct.pack("<III", self.string(member), 0, word) for member, word in members)
        return self.type(name, kind, rows, len(members), flag)

    def __bytes__(self) -> bytes:
        sizes = (0, len(self.types), len(self.types), len(self.strings))
        return struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, *sizes) + self.types + self.strings


def btf(blob: Blob) -> Btf:
    return Btf(bytes(blob), Btf(bytes(blob.base)) if blob.base else None)


def kvm_intel() -> Blob:
    """A module's BTF: its own structures, some of whose names are in the kernel's strings."""
    vmlinux = Blob().struct("kvm_vcpu", ("kvm", 0), ("cpu", 64 * 8)).struct("file", ("vmcs01", 8))
    module = Blob(vmlinux).type("u64", INT, bytes(4))
    module.struct("loaded_vmcs", ("vmcs", 0), ("msr_bitmap", 0x18 * 8))
    return module.struct("vcpu_vmx", ("vcpu", 0), ("vmcs01", 0x1AA0 * 8))


# --- blobs made here ---


def test_offset_is_in_bytes() -> None:
    blob = Blob().struct("file", ("f_mode", 0), ("f_op", 8 * 8)).struct("inode", ("f_op", 40 * 8))
    assert btf(blob).offset("file", "f_mode") == 0
    assert btf(blob).offset("file", "f_op") == 8
    assert btf(blob).offset("inode", "f_op") == 40


def test_types_of_every_kind_are_skipped() -> None:
    blob = Blob()
    for kind in range(1, 20):
        elements = 3 if kind in {STRUCT, UNION, ENUM, FUNC_PROTO, DATASEC, ENUM64} else 0
        blob.type("other", kind, bytes(AFTER.get(kind, 0)), elements)
    assert btf(blob.struct("file", ("f_op", 64))).offset("file", "f_op") == 8


@pytest.mark.parametrize("kind", [0, 20, 31])
def test_an_unknown_kind_is_an_error(kind: int) -> None:
    blob = Blob().type("other", kind).struct("file", ("f_op", 64))
    with pytest.raises(BtfError, match=rf"^unknown kind {kind} in the BTF$"):
        btf(blob).offset("file", "f_op")


def test_what_is_missing_is_named() -> None:
    blob = Blob().struct("file", ("f_op", 64)).struct("xinode", ("xf_op", 0)).struct("msr", ("f_mode", 0), kind=UNION)
    for structure in ("inode", "msr", "ile", "fil", ""):
        with pytest.raises(BtfError, match=rf"^the BTF has no struct {structure}$"):
            btf(blob).offset(structure, "f_op")
    for member in ("op", "f_o", "xf_op", ""):
        with pytest.raises(BtfError, match=rf"^the BTF has no member {member} in struct file$"):
            btf(blob).offset("file", member)


def test_of_two_structures_with_one_name_the_one_with_the_member_counts() -> None:
    blob = Blob().struct("file", ("old", 0)).struct("file", ("f_op", 64)).struct("file", ("f_op", 128))
    assert btf(blob).offset("file", "f_op") == 8


def test_ids_are_counted_from_1_in_the_kernels_own_types() -> None:
    vmlinux = Blob().type("u64", INT, bytes(4)).struct("read", ("x", 0)).type("read", FUNC)
    vmlinux.struct("pair", ("a", 0), ("b", 64)).type("pair", UNION)
    module = Blob(vmlinux).type("read", FUNC).struct("pair", ("c", 0))
    for blob in (vmlinux, module):
        assert btf(blob).kernel_ids("read", "pair") == (3, 4)
        for function, structure, missing in (("pair", "pair", "pair"), ("read", "u64", "u64"), ("no", "pair", "no")):
            with pytest.raises(BtfError, match=rf"^the BTF has no {missing}$"):
                btf(blob).kernel_ids(function, structure)


def test_bit_fields_have_no_offset() -> None:
    # With kind_flag: bits 31-24 are the size of a bit field, 0 for another member; without: an odd number of bits.
    flagged = Blob().struct("file", ("bits", 3 << 24 | 64), ("f_op", 0xFFFFF8), flag=True)
    assert btf(flagged).offset("file", "f_op") == 0x1FFFFF
    with pytest.raises(BtfError, match=r"file.*bits|bits.*file"):
        btf(flagged).offset("file", "bits")
    plain = Blob().struct("file", ("bits", 67), ("f_op", 3 << 24 | 64))
    assert btf(plain).offset("file", "f_op") == (3 << 24 | 64) // 8
    with pytest.raises(BtfError, match=r"^struct file: bits is a bit field$"):
        btf(plain).offset("file", "bits")


def test_a_split_blob_continues_its_base() -> None:
    module = kvm_intel()
    assert b"vmcs01" not in module.strings  # in the base's
    assert btf(module).offset("loaded_vmcs", "msr_bitmap") == 0x18
    assert btf(module).offset("vcpu_vmx", "vmcs01") == 0x1AA0
    assert btf(module).nested_offset(VMX.bitmap) == 0x1AB8


def test_the_first_string_of_a_split_blob() -> None:
    module = Blob(Blob().struct("inode", ("f_op", 128)))
    module.strings = b"file\0"
    assert btf(module.struct("file", ("f_op", 64))).offset("file", "f_op") == 8


def test_a_module_has_the_kernels_structures_too() -> None:
    # struct kvm_vcpu is the kernel's own in Debian's 6.1, 6.12 and 7.2, although KVM is a module there.
    assert btf(kvm_intel()).offset("kvm_vcpu", "cpu") == 64


def test_a_split_blob_without_its_base_is_refused() -> None:
    with pytest.raises(BtfError):
        Btf(bytes(kvm_intel())).nested_offset(VMX.bitmap)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "truncated BTF: "),
        (bytes(Blob())[:23], "truncated BTF: "),
        (b"\xeb\x9f" + bytes(22), "not little-endian BTF"),
        (b"\x7fELF" + bytes(60), "not little-endian BTF"),
    ],
)
def test_anything_but_btf_is_an_error(blob: bytes, message: str) -> None:
    with pytest.raises(BtfError, match=f"^{message}"):
        Btf(blob)
    with pytest.raises(BtfError, match=f"^{message}"):
        Btf(bytes(Blob()), Btf(blob))


def test_truncated_btf_is_an_error() -> None:
    module = kvm_intel()
    assert module.base
    whole, base = bytes(module), bytes(module.base)
    for length in range(len(whole)):
        with pytest.raises(BtfError):
            Btf(whole[:length], Btf(base)).nested_offset(VMX.bitmap)


def attempt(blob: bytes, base: bytes | None) -> None:
    with suppress(BtfError):
        assert Btf(blob, None if base is None else Btf(base)).offset("vcpu_vmx", "vmcs01") >= 0


sizes_of_sections = st.tuples(*[st.integers(0, 99)] * 4)


@given(blob=st.binary(max_size=200), base=st.none() | st.binary(max_size=60), sizes=sizes_of_sections)
def test_garbage_raises_nothing_but_btferror(blob: bytes, base: bytes | None, sizes: tuple[int, ...]) -> None:
    header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, *sizes)
    attempt(blob, base)
    attempt(header + blob, base)
    attempt(header + blob, header + base if base is not None else None)


@given(st.data())
def test_damaged_btf_raises_nothing_but_btferror(data: st.DataObject) -> None:
    module = kvm_intel()
    assert module.base
    damaged = [bytearray(bytes(module)), bytearray(bytes(module.base))]
    for _ in range(data.draw(st.integers(1, 4))):
        blob = data.draw(st.sampled_from(damaged))
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    attempt(bytes(damaged[0]), bytes(damaged[1]))


def test_the_kernel_and_modules_are_read_from_sysfs(tmp_path: Path) -> None:
    module = kvm_intel()
    assert module.base
    with pytest.raises(BtfError, match=f"^{tmp_path}/vmlinux: No such file or directory$"):
        Btf.of_kernel(tmp_path)
    (tmp_path / "vmlinux").write_bytes(bytes(module.base))
    assert Btf.of_kernel(tmp_path).offset("kvm_vcpu", "cpu") == 64
    with pytest.raises(BtfError, match=f"^{tmp_path}/kvm_intel: No such file or directory$"):
        Btf.of_module("kvm_intel", tmp_path)
    (tmp_path / "kvm_intel").write_bytes(bytes(module))
    assert Btf.of_module("kvm_intel", tmp_path).nested_offset(VMX.bitmap) == 0x1AB8


# --- real ones ---

THIS_KERNEL = Path("/sys/kernel/btf/vmlinux")

# `	long unsigned int *        msr_bitmap;           /*    48     8 */`; a bit field has `/*    48: 3  4 */`.
MEMBER = re.compile(r"^\t\S.*?(\w+)(?:\[\d*\])*;\s+/\*\s+(\d+)\s+\d+ \*/$", re.MULTILINE)
BIT_FIELD = re.compile(r"^\t\S.*?(\w+):\d+;\s+/\*\s+\d+: ?\d+\s+\d+ \*/$", re.MULTILINE)


def pahole(structure: str, file: Path, base: Path | None = None) -> str:
    """The structure as pahole prints it, without its complaints about kinds that it does not know."""
    command = [tool("pahole"), "-C", structure, *(["--btf_base", str(base)] if base else []), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    text: str = done.stdout
    assert text.startswith(f"struct {structure} {{\n"), done.stderr[-300:]
    return text


def members(text: str) -> dict[str, int]:
    return {name: int(offset) for name, offset in MEMBER.findall(text)}


@pytest.mark.skipif(not THIS_KERNEL.exists(), reason=f"a kernel with {THIS_KERNEL} (CONFIG_DEBUG_INFO_BTF)")
def test_offsets_in_this_kernel_are_those_of_pahole() -> None:
    text = pahole("task_struct", THIS_KERNEL)
    expected = members(text)
    assert len(expected) > 100
    chosen = [*list(expected)[::40], "pid", "comm"]  # each takes a walk through all types
    kernel = Btf.of_kernel()
    assert {name: kernel.offset("task_struct", name) for name in chosen} == {name: expected[name] for name in chosen}
    with pytest.raises(BtfError, match="task_struct"):
        kernel.offset("task_struct", BIT_FIELD.findall(text)[0])


#: vmcs01.msr_bitmap by kernel release, found on VMX hosts or by hand
KNOWN = {"6.1.0-56-amd64": 0x1AB8, "6.12.117+deb13-amd64": 0x1A70, "7.2.13+deb14-amd64": 0x1BC8}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "host" in metafunc.fixturenames:
        names = [name for name in str(metafunc.config.getoption("--hosts")).split(",") if name in HOSTS]
        metafunc.parametrize("host", [HOSTS[name] for name in names], ids=[f"of-{name}" for name in names])


def vmlinux(image: Path) -> bytes:
    """The ELF file in a compressed kernel: Documentation/arch/x86/boot.rst, setup_sects and payload_offset."""
    content = image.read_bytes()
    offset, length = struct.unpack_from("<II", content, 0x248)
    start = (content[0x1F1] + 1) * 512 + offset
    payload = content[start : start + length - 4]  # the last four bytes are the unpacked size
    if payload.startswith(b"\xfd7zXZ\0"):
        return lzma.decompress(payload)
    return subprocess.run(["zstd", "-dc"], input=payload, stdout=subprocess.PIPE, check=True).stdout


def btf_section(elf: Path, target: Path) -> bool:
    """Extract the .BTF section of an ELF file; False if there is none."""
    headers = subprocess.run(["objdump", "-h", elf], capture_output=True, text=True, check=True).stdout
    if not re.search(r"\s\.BTF\s", headers):
        return False
    subprocess.run(["objcopy", f"--dump-section=.BTF={target}", elf, "/dev/null"], check=True)
    return True


@pytest.mark.timeout(900)  # it may download the kernel
@pytest.mark.parametrize("vendor", VENDORS, ids=lambda vendor: str(vendor.module))
def test_offsets_in_modules_are_those_of_pahole(host: Host, vendor: Vendor, tmp_path: Path) -> None:
    tree = kernel(host)
    [module] = tree.glob(f"usr/lib/modules/*/kernel/arch/x86/kvm/{vendor.module_file}*")
    release = module.parents[4].name
    elf, own, base = tmp_path / vendor.module_file, tmp_path / vendor.module, tmp_path / "vmlinux"
    elf.write_bytes(lzma.decompress(module.read_bytes()) if module.suffix == ".xz" else module.read_bytes())
    if not btf_section(elf, own):
        assert release.startswith("5.10.")  # the only one whose modules have none
        return
    image = tmp_path / "vmlinux.elf"
    image.write_bytes(vmlinux(vmlinuz(tree, release)))
    assert btf_section(image, base)
    image.unlink()
    nested = vendor.nested
    paths = [vendor.bitmap, nested.made, nested.bitmap, nested.changed, nested.in_use, nested.own, nested.inside]
    structures = {structure for path in paths for structure, _ in path}
    expected = {name: members(pahole(name, elf, base)) for name in (*structures, "kvm_vcpu")}
    btf = Btf.of_module(vendor.module, tmp_path)
    for path in paths:
        assert btf.nested_offset(path) == sum(expected[structure][member] for structure, member in path)
    if vendor is VMX:
        assert btf.nested_offset(vendor.bitmap) == KNOWN.get(release, btf.nested_offset(vendor.bitmap))
    assert btf.offset("kvm_vcpu", "kvm") == expected["kvm_vcpu"]["kvm"]


def test_the_kernels_is_read_once_where_it_is_kept(tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(bytes(Blob()))
    with kernel_btf_kept():
        first = Btf.of_kernel(tmp_path)
        assert Btf.of_kernel(tmp_path) is first
    assert Btf.of_kernel(tmp_path) is not first
