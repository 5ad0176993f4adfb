# SPDX-License-Identifier: GPL-2.0-or-later
"""What is intercepted of the guests (L2) of a vCPU's own guest (L1): plain data, and what follows from it.

While L2 runs, the CPU takes a bitmap that KVM merges, when L2 is entered, from the vCPU's own and L1's. A bit that is
set in either is set in it; but KVM merges only some MSRs: accesses to all others exit, whatever L1 wants.
"""

from __future__ import annotations

from dataclasses import dataclass, field

#: Which bitmap the CPU takes while L2 runs, as it was when L2 was last entered.
MERGED, OWN, NONE, UNUSED, UNREADABLE = "merged", "own", "none", "unused", "unreadable"
#: What that means for their accesses.
USES = {
    MERGED: "KVM merges a bitmap for them from the vCPU's own and L1's",
    OWN: "as the guest itself: it intercepts no MSR of theirs",
    NONE: "every access exits: the guest has no MSR bitmap for them",
    UNUSED: "none has run yet",
    UNREADABLE: "what is intercepted of them cannot be read",
}

L1, UNMERGED, L1_OR_UNMERGED, PENDING_KVM = "l1", "unmerged", "l1_or_unmerged", "pending_kvm"
#: What is said of accesses of L2 beside state.SAID, which is the same for L1 and L2, and what that means.
NESTED_SAID = {
    L1: "L2's accesses are intercepted since L1 wants that; KVM would pass them through",
    UNMERGED: "L2's accesses are intercepted since KVM passes the MSR through to L1 alone, whatever L1 wants",
    L1_OR_UNMERGED: "L2's accesses are intercepted: L1 wants that, or KVM passes the MSR to L1 alone, or not to L2 yet",
    PENDING_KVM: "KVM intercepts it, but L2's accesses pass until L2 is next entered",
}
#: The same, as it is in tables.
NESTED_WORDS = {L1: "l1", UNMERGED: "unmerged", L1_OR_UNMERGED: "l1 or unmerged", PENDING_KVM: "pending kvm"}


@dataclass(frozen=True)
class Nested:
    """What a vCPU that may run guests of its guest intercepts of them. `use` is one of USES.

    `bitmap` is that which KVM merges; None unless it is in use. `settled`: it does not change, and is what KVM merges
    from the vCPU's own as that is now. `running`: the vCPU is in L2; None where that is not known.
    """

    use: str
    bitmap: bytes | None = None
    settled: bool = True
    running: bool | None = field(default=None, compare=False)


@dataclass(frozen=True)
class NestedBitmap:
    """Where a vCPU has the bitmap for nested guests, and what says which bitmap they have.

    Each is a path of pairs of structure and member. From the vCPU on: `made`, a pointer that is NULL as long as it has
    none; `bitmap`, its address; `changed`, a bool: the vCPU's own bitmap was changed after it was merged, or L1 has
    turned to another L2. And `in_use`: with `flag`, a u32 in which that bit says that there is a bitmap. Else `in_use`
    and `own` are pointers to what L2 and the vCPU's guest run with, and `inside` is the path from there on to the
    address of its bitmap. `in_use` is 0 until L2 is entered for the first time.
    """

    made: tuple[tuple[str, str], ...]
    bitmap: tuple[tuple[str, str], ...]
    changed: tuple[tuple[str, str], ...]
    in_use: tuple[tuple[str, str], ...]
    flag: int = 0
    own: tuple[tuple[str, str], ...] = ()
    inside: tuple[tuple[str, str], ...] = ()

    def use(self, in_use: int, own: int) -> str:
        """Which bitmap the CPU takes, of USES, by the words that are there."""
        if self.flag:
            in_use &= 0xFFFFFFFF
        if not in_use:
            return UNUSED
        if self.flag:
            return MERGED if in_use & self.flag else NONE
        return OWN if in_use == own else MERGED
