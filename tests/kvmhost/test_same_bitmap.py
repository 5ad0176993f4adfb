# SPDX-License-Identifier: GPL-2.0-or-later
"""The patch for SVM (skip-svm.diff) leaves each vCPU the MSR bitmap that it has without it, whatever the filter.

scenarios/bitmaps.py takes the same steps on both variants of kvm_amd and reads the bitmaps from the kernel's memory.
Beside the other variant they are held against what the filter says here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bitmaps import BASES, BITMAP_BYTES, DEBUGCTL, PRED_CMD, SPEC_CTRL
from hosts import HOSTS
from vmm import READ, WRITE

HERE = Path(__file__).parent
#: With features that KVM passes MSRs through for. QEMU has none of them: forced, they are named and do nothing.
CPU = "qemu64,+svm,+npt,x-force-features=on,+ibpb,+ibrs,+lbrv,+flush-l1d"
STEPS_AT_LEAST = 500
FLUSH_CMD, LBR = 0x10B, 0x1DB
SYSENTER_EIP = 0x175
FS_BASE = 0xC0000100
X2APIC = range(0x800, 0x900)  # KVM filters none of them


@dataclass(frozen=True)
class Recorded:
    """What a boot left: the steps of each variant, and the bitmaps of each vCPU after each step."""

    steps: dict[str, list[dict[str, Any]]]
    bitmaps: dict[str, list[list[bytes]]]
    msrs: list[int]  # that KVM may pass through

    @classmethod
    def of(cls, folder: Path) -> Recorded:
        found = json.loads((folder / "bitmaps.json").read_text())
        bitmaps = {}
        for variant, its in found.items():
            raw = (folder / f"{variant}.raw").read_bytes()
            each = [raw[at : at + BITMAP_BYTES] for at in range(0, len(raw), BITMAP_BYTES)]
            bitmaps[variant] = [each[at : at + its["vcpus"]] for at in range(0, len(each), its["vcpus"])]
        [msrs] = {tuple(its["msrs"]) for its in found.values()}
        return cls({variant: its["steps"] for variant, its in found.items()}, bitmaps, list(msrs))

    def updates(self, variant: str) -> Iterator[tuple[dict[str, Any], list[bytes], list[bytes]]]:
        """Each filter update, the bitmaps after it, and those under a filter that allows all.

        The latter say what KVM itself wants. What changes that is a step without an update, and the next `start` has
        the new ones; updates between are left out.
        """
        wanted: list[bytes] | None = None
        for step, bitmaps in zip(self.steps[variant], self.bitmaps[variant], strict=True):
            if not step["filter"]:
                wanted = None
            elif step["name"] == "start":
                wanted = bitmaps
            if wanted:
                yield step, bitmaps, wanted


def _recorded(host: str, folder: Path) -> Recorded:
    command = [sys.executable, str(HERE / "run"), "--host", host, "--cpu-model", CPU]
    options = ["--in", str(HERE / "scenarios"), "--out", str(folder), "--", "python3", "/in/bitmaps.py"]
    subprocess.run([*command, *options, "unpatched", "patched"], check=True)
    return Recorded.of(folder)


def bookworm_amd(folder: Path) -> Recorded:
    return _recorded("bookworm-amd", folder)


def trixie_amd(folder: Path) -> Recorded:
    return _recorded("trixie-amd", folder)


BOOTS = {"bookworm-amd": bookworm_amd, "trixie-amd": trixie_amd}
pytestmark = pytest.mark.parametrize(
    "host", [pytest.param(name, marks=pytest.mark.beside(boot=boot, host=name)) for name, boot in BOOTS.items()]
)


def place(msr: int, access: int) -> tuple[int, int]:
    """The byte of the bitmap, and the bit in it, that intercept an access. See AMD's manual, volume 2, 15.11."""
    [(index, base)] = [(index, base) for index, base in enumerate(BASES) if 0 <= msr - base < 0x2000]
    bit = 2 * (msr - base) + (access == WRITE)
    return index * 0x800 + bit // 8, 1 << bit % 8


def intercepted(bitmap: bytes, msr: int, access: int) -> bool:
    byte, bit = place(msr, access)
    return bool(bitmap[byte] & bit)


def allowed(wanted: dict[str, Any], msr: int, access: int) -> bool:
    """Whether a filter allows an access, as Documentation/virt/kvm/api.rst has it."""
    for one in wanted["ranges"]:
        nth = msr - one["base"]
        if 0 <= nth < one["nmsrs"] and one["flags"] & access:
            return bool(bytes.fromhex(one["bitmap"][2 * (nth // 8) :][:2])[0] >> nth % 8 & 1)
    return bool(wanted["default_allow"])


def test_both_variants_leave_the_same_bitmaps(host: str, beside: Recorded) -> None:
    assert HOSTS[host].variants[:2] == ["unpatched", "patched"]
    stock, patched = (beside.steps[variant] for variant in ("unpatched", "patched"))
    assert len(stock) > STEPS_AT_LEAST
    assert [(step["name"], step["filter"]) for step in stock] == [(step["name"], step["filter"]) for step in patched]
    both = zip(stock, beside.bitmaps["unpatched"], beside.bitmaps["patched"], strict=True)
    assert [step["name"] for step, one, other in both if one != other] == []


@pytest.mark.parametrize("variant", ["unpatched", "patched"])
def test_a_bitmap_has_what_kvm_intercepts_and_what_the_filter_denies(host: str, beside: Recorded, variant: str) -> None:
    wrong = []
    for step, bitmaps, wanted in beside.updates(variant):
        denied = [
            place(msr, access)
            for msr in beside.msrs
            for access in (READ, WRITE)
            if msr not in X2APIC and not allowed(step["filter"], msr, access)
        ]
        for bitmap, kvm in zip(bitmaps, wanted, strict=True):
            expected = bytearray(kvm)
            for byte, bit in denied:
                expected[byte] |= bit
            if bitmap != expected:
                wrong.append(step["name"])
    assert wrong == []


def test_filters_change_the_bits_of_all_that_kvm_passes_through(host: str, beside: Recorded) -> None:
    passed, seen = set(), set()
    for step, bitmaps, wanted in beside.updates("patched"):
        for bitmap, kvm in zip(bitmaps, wanted, strict=True):
            for msr in beside.msrs:
                for access in (READ, WRITE):
                    if not intercepted(kvm, msr, access):
                        passed.add((msr, access))
                        if intercepted(bitmap, msr, access) and len(step["filter"]["ranges"]) == 1:
                            seen.add((msr, access))
    assert passed == seen
    both_ways = {msr for msr, access in passed if (msr, READ) in passed and (msr, WRITE) in passed}
    assert both_ways >= {SPEC_CTRL, LBR, SYSENTER_EIP, FS_BASE}
    # Where KVM intercepts reads and passes writes through.
    mixed = {msr for msr, _ in passed} - both_ways
    assert mixed == {PRED_CMD, FLUSH_CMD} & set(beside.msrs)
    assert DEBUGCTL not in {msr for msr, _ in passed}  # but under SEV-ES


def test_the_patch_leaves_the_calls_for_what_kvm_passes_through(host: str, beside: Recorded) -> None:
    for step, bitmaps, _ in beside.updates("unpatched"):
        assert (step["update"], step["call"]) == (len(bitmaps), len(bitmaps) * len(beside.msrs)), step["name"]
    for step, bitmaps, wanted in beside.updates("patched"):
        calls = [
            msr
            for kvm in wanted
            for msr in beside.msrs
            if not (intercepted(kvm, msr, READ) and intercepted(kvm, msr, WRITE))
        ]
        assert (step["update"], step["call"]) == (len(bitmaps), len(calls)), step["name"]
