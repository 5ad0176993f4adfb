# SPDX-License-Identifier: GPL-2.0-or-later
"""Known answers: what the kernel's source says a filter update and a vCPU's creation do on the emulated CPUs.

Everywhere one MSR, DENIED_IN_TURN, is denied and allowed in turn, as the workload does unless told otherwise.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from metrics_text import Key

DENIED_IN_TURN = 0xC0000100
TSC, SPEC_CTRL, PRED_CMD, FLUSH_CMD, XFD, XFD_ERR = 0x10, 0x48, 0x49, 0x10B, 0x1C4, 0x1C5
RESIDENCIES = [0x660, 0x3FC, 0x3FD, 0x3FE]
SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP = 0x174, 0x175, 0x176
DEBUGCTL, LAST_BRANCHES, PAT, XSS, EFER = 0x1D9, [0x1DB, 0x1DC, 0x1DD, 0x1DE], 0x277, 0xDA0, 0xC0000080
STAR_TO_MASK, BASES, TSC_AUX, GHCB = (
    [*range(0xC0000081, 0xC0000085)],
    [*range(0xC0000100, 0xC0000103)],
    0xC0000103,
    0xC0010130,
)
#: Of the APIC's registers those that direct_access_msrs[] of svm.c names, 6.0 to 6.16.
X2APIC = [0x800 + n for n in (*range(2, 4), *range(8, 0x11), 0x18, 0x20, 0x28, 0x30, 0x31, *range(0x33, 0x3A), 0x3E)]

#: By host, the functions that KVM has (DESIGN.md, "Probe layouts").
LAYOUTS = {
    **dict.fromkeys(("bookworm", "trixie"), "toggle"),
    **dict.fromkeys(("bookworm-amd", "trixie-amd", "filter-only-amd"), "pass"),
    **dict.fromkeys(("backports", "backports-amd"), "set"),
    **dict.fromkeys(("sid", "sid-amd"), "recalc"),
    "filter-only": "filter-only",
}
#: Where the update function also runs for other reasons than a new filter.
RECALCULATING = [host for host, layout in LAYOUTS.items() if layout in ("set", "recalc")]
AMD = [host for host in LAYOUTS if host.endswith("-amd")]
#: Calls of a filter update, and how many change nothing, by host and variant of its module.
PER_UPDATE = {
    "bookworm": {"patched": (13, 11), "unpatched": (30, 28)},
    "trixie": {"patched": (13, 11), "unpatched": (32, 30)},
    "backports": {"patched": (8, 7)},
    "sid": {"patched": (8, 7)},
    "filter-only-amd": {"unpatched": (14, 13)},
    "bookworm-amd": {"unpatched": (44, 43), "patched": (11, 10)},
    "trixie-amd": {"unpatched": (47, 46), "patched": (9, 8)},
    "backports-amd": {"unpatched": (11, 10)},
    "sid-amd": {"unpatched": (11, 10)},
}
#: The same of a vCPU's creation; where that leaves it to the first KVM_RUN (6.18 and newer), of both.
PER_VCPU = {
    **dict.fromkeys(("bookworm", "trixie"), (7, 0)),
    **dict.fromkeys(("backports", "sid"), (8, 1)),
    "filter-only-amd": (8, 0),
    "bookworm-amd": (11, 0),
    "trixie-amd": (11, 2),
    "backports-amd": (22, 14),  # in two recalculations, of which the second changes nothing
    "sid-amd": (11, 3),
}
#: Recalculations of the same.
RECALCULATIONS = {"backports": 1, "sid": 1, "backports-amd": 2, "sid-amd": 1}

#: VMX, 5.13 to 6.16: MSRs that are passed through whole, and those that the emulated CPU's KVM keeps intercepting.
VMX_PASSED = [*BASES, SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP]
VMX_INTERCEPTED = {
    "bookworm": [SPEC_CTRL, PRED_CMD, XFD, XFD_ERR, *RESIDENCIES],
    "trixie": [SPEC_CTRL, PRED_CMD, FLUSH_CMD, XFD, XFD_ERR, *RESIDENCIES],
}


@dataclass(frozen=True)
class Svm:
    """What KVM wants of a vCPU that was given no CPUID: SVM, 5.10 to 6.16.

    :param passed: by the vendor's part of its creation
    :param reset_passed: later in it, when the vCPU is reset
    :param reset_intercepted: then, too, though they are intercepted
    :param intercepted: never asked for
    """

    passed: list[int]
    intercepted: list[int]
    reset_passed: tuple[int, ...] = ()
    reset_intercepted: tuple[int, ...] = ()


SVM_ALWAYS = [SYSENTER_CS, *STAR_TO_MASK, *BASES]
_SVM_6_1 = [SPEC_CTRL, PRED_CMD, *LAST_BRANCHES, EFER, PAT, TSC_AUX, *X2APIC]
_ESP_EIP = (SYSENTER_ESP, SYSENTER_EIP)
SVM = {
    "filter-only-amd": Svm(SVM_ALWAYS, [SPEC_CTRL, PRED_CMD, *LAST_BRANCHES]),
    "bookworm-amd": Svm([*SVM_ALWAYS, GHCB], _SVM_6_1, reset_passed=_ESP_EIP),
    # 6.12 takes a vCPU without a CPUID for one of Intel's.
    "trixie-amd": Svm([*SVM_ALWAYS, GHCB], [*_SVM_6_1, FLUSH_CMD, DEBUGCTL, XSS], reset_intercepted=_ESP_EIP),
}


def _toggles(host: str, variant: str, vcpus: int, applied: int) -> Counter[Key]:
    """Calls of vmx_vcpu_create() and of the filter loop in vmx_msr_filter_changed(), 5.13 to 6.16."""
    calls: Counter[Key] = Counter({(TSC, "read", "disable", "vcpu_create"): vcpus})
    calls[TSC, "read", "disable", "filter_change"] = applied
    for msr in VMX_PASSED:
        calls[msr, "read_write", "disable", "vcpu_create"] = vcpus
        for access in ("read", "write"):
            calls[msr, access, "disable", "filter_change"] = applied
    if variant == "unpatched":
        calls[TSC, "write", "enable", "filter_change"] = applied
        for msr in VMX_INTERCEPTED[host]:
            for access in ("read", "write"):
                calls[msr, access, "enable", "filter_change"] = applied
    return calls


def _passes(host: str, variant: str, vcpus: int, applied: int) -> Counter[Key]:
    """Calls of set_msr_interception_bitmap(), 5.10 to 6.16."""
    svm, calls = SVM[host], Counter[Key]()
    for msr in (*svm.passed, *svm.reset_passed):
        calls[msr, "read_write", "disable", "vcpu_create"] = vcpus
        calls[msr, "read_write", "disable", "filter_change"] = applied
    for msr in svm.reset_intercepted:
        calls[msr, "read_write", "enable", "vcpu_create"] = vcpus
    if variant == "unpatched":
        for msr in (*svm.intercepted, *svm.reset_intercepted):
            calls[msr, "read_write", "enable", "filter_change"] = applied
    return calls


def _sets(host: str, vcpus: int, applied: int) -> Counter[Key]:
    """Calls of vmx_recalc_msr_intercepts() and of its like, 6.17 and newer."""
    calls: Counter[Key] = Counter()
    passed, intercepted = (SVM_ALWAYS, [SPEC_CTRL, *_ESP_EIP]) if host in AMD else (VMX_PASSED, [SPEC_CTRL])
    for cause, times in (("vcpu_create", RECALCULATIONS[host] * vcpus), ("filter_change", applied)):
        if host not in AMD:
            calls[TSC, "read", "disable", cause] = times
        for msr in passed:
            calls[msr, "read_write", "disable", cause] = times
        for msr in intercepted:
            calls[msr, "read_write", "enable", cause] = times
    return calls


def expected(host: str, variant: str, vcpus: int, applied: int) -> tuple[dict[Key, int], dict[Key, int]]:
    """Calls and redundant calls of VCPUS that are created, first run, and then apply so many updates together."""
    layout = LAYOUTS[host]
    if layout == "filter-only":
        return {}, {}
    if layout == "toggle":
        calls = _toggles(host, variant, vcpus, applied)
    elif layout == "pass":
        calls = _passes(host, variant, vcpus, applied)
    else:
        calls = _sets(host, vcpus, applied)
    redundant = {}
    for (msr, access, action, cause), count in calls.items():
        # All bits of a new bitmap are ones. A vCPU's later recalculations before its first update change nothing.
        first = vcpus if cause != "filter_change" and action == "disable" else 0
        if (cause != "filter_change" or msr != DENIED_IN_TURN) and count > first:
            redundant[msr, access, action, cause] = count - first
    return dict(calls), redundant
