# SPDX-License-Identifier: GPL-2.0-or-later
"""Exits joined with what vCPUs intercept: who wants the accesses that exited intercepted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tracer.model import msr
from tracer.model.exits import FAST, FILTERED, L2, REFLECTED, Exit
from tracer.model.msr_filter import READ, WRITE
from tracer.model.nested import NESTED_SAID, UNUSED
from tracer.model.quantity import share
from tracer.model.state import BOTH, FILTER, PASSED, SAID, UNKNOWN, WORDS, State, Vcpu, Verdict, does_exit
from tracer.model.vmm_id import pid_of

NESTED, GONE = "nested", "gone"
#: What is said of exits where that is not the same as of accesses (SAID), and what it means.
SAID_OF_EXITS = {
    PASSED: "passed through by now; it exited before that",
    NESTED: "of a guest's own guest (L2); what is intercepted of L2 is not known",
    GONE: "no vCPU that was read makes such exits: its VM ended before that, or its filter was replaced",
}
_WORDS = WORDS | {NESTED: "nested", GONE: "gone"}
#: What rows may be broken down by, besides MSR, access and guest.
PARTS = ("pid", "path", "result")


@dataclass(frozen=True)
class Blame:
    """How many exits a filter alone causes: `sure` of them, and `perhaps` so many more, of which that is unknown."""

    sure: int = 0
    perhaps: int = 0

    def share(self, total: int) -> str:
        """The share of all exits: as a percentage, or the least and the most that it can be."""
        low, high = share(self.sure, total), share(self.sure + self.perhaps, total)
        return f"{low} to {high}" if self.perhaps else low


NO_BLAME = Blame()


@dataclass(frozen=True)
class JoinedExits:
    """Exits on an access to an MSR, of kinds that are the same in all parts that are not None.

    `by`: what is said now of the access (of SAID or NESTED_SAID), and of how many of the vCPUs that can have made such
    exits; None where that is unknown. `blame`: how many of the exits the VM's filter alone causes.
    """

    msr: int
    access: str
    guest: str
    exits: int
    by: Mapping[str, int] | None = None
    blame: Blame = NO_BLAME
    pid: int | None = None
    path: str | None = None
    result: str | None = None

    @property
    def interceptors(self) -> tuple[str, ...]:
        """See the function of that name."""
        return interceptors(self.guest, self.by)

    @property
    def filter_alone(self) -> bool:
        """Whether the VM's filter alone causes all of these exits."""
        return 0 < self.exits == self.blame.sure


@dataclass(frozen=True)
class OfVm:
    """The exits of a VMM's pid, and how many of them filters alone cause."""

    pid: int
    exits: int
    blame: Blame


def interceptors(guest: str, by: Mapping[str, int] | None) -> tuple[str, ...]:
    """Who wants the accesses intercepted that exited: of SAID, NESTED_SAID and SAID_OF_EXITS; more where vCPUs differ.

    vCPUs that let the access pass now are left out, unless all do: such exits were made before that.
    """
    if guest == L2 and not by:
        return (NESTED,)
    if by is None:
        return (UNKNOWN,)
    found = tuple(said for said in (*SAID, *NESTED_SAID) if by.get(said))
    return tuple(said for said in found if does_exit(said) is not False) or found or (GONE,)


def interceptors_text(guest: str, by: Mapping[str, int] | None) -> str:
    """The same as a word; where vCPUs differ, with how many there are of each: `filter 2, kvm 4`."""
    found = interceptors(guest, by)
    if by is None or len(found) == 1:
        return ", ".join(_WORDS[said] for said in found)
    return ", ".join(f"{_WORDS[said]} {by[said]:,}" for said in found)


def may_have_made(kind: Exit, allowed: bool | None) -> bool:
    """Whether a vCPU whose filter allows or denies the access can have made such exits, unless the filter has changed.

    KVM asks the filter before anything else (kvm_get_msr_with_filter(), kvm_set_msr_with_filter(); 7.2:
    kvm_emulate_msr_read(), kvm_emulate_msr_write()), but not on the fast path (handle_fastpath_wrmsr()):
    arch/x86/kvm/x86.c, 7.3: msrs.c.

    :param allowed: None: unknown
    """
    if kind.result == REFLECTED:  # KVM asks nobody
        return True
    return allowed is None or kind.path == FAST or allowed != (kind.result == FILTERED)


@dataclass(frozen=True)
class ExitTable:
    """Exits that were counted, and the state afterwards (None: unknown). `by_vm`: kinds have the pids of their VMMs."""

    counts: Mapping[Exit, int]
    state: State | None = None
    by_vm: bool = False

    @property
    def total(self) -> int:
        """All exits."""
        return sum(self.counts.values())

    @cached_property
    def blame(self) -> Blame:
        """How many of them filters alone cause."""
        return self._blame(self.counts)

    def rows(self, parts: Collection[str] = PARTS) -> list[JoinedExits]:
        """The exits summed over all of PARTS but the given ones: those that filters alone cause first, then by number.

        L2's exits have rows of their own.
        """
        groups: dict[tuple[object, ...], list[Exit]] = {}
        for kind in self.counts:
            of = (getattr(kind, part) if part in parts else None for part in PARTS)
            groups.setdefault((kind.msr, kind.access, kind.guest, *of), []).append(kind)
        rows = [self._row(kinds, dict(zip(PARTS, key[3:], strict=True))) for key, kinds in groups.items()]
        return sorted(rows, key=lambda row: (not row.filter_alone, *most_first(row)))

    def of_vms(self) -> dict[int, OfVm]:
        """The exits of each VM, by the pids of VMMs; 0 for VMs that are gone, or where there are no pids."""
        found: dict[int, list[Exit]] = {}
        for kind in self.counts:
            found.setdefault(kind.pid, []).append(kind)
        return {
            pid: OfVm(pid, sum(self.counts[kind] for kind in kinds), self._blame(kinds)) for pid, kinds in found.items()
        }

    def _blame(self, kinds: Iterable[Exit]) -> Blame:
        """How many exits of these kinds filters alone cause."""
        sure = perhaps = 0
        for kind in kinds:
            if kind.result == FILTERED and kind.guest != L2:
                found = interceptors(kind.guest, self._by([kind]))
                sure += self.counts[kind] if found == (FILTER,) else 0
                perhaps += self.counts[kind] if found not in ((FILTER,), (BOTH,)) else 0
        return Blame(sure, perhaps)

    def _row(self, kinds: list[Exit], parts: Mapping[str, object]) -> JoinedExits:
        known = self._by(kinds)
        return JoinedExits(
            kinds[0].msr,
            kinds[0].access,
            kinds[0].guest,
            sum(self.counts[kind] for kind in kinds),
            None if kinds[0].guest == L2 and not known else known,
            self._blame(kinds),
            **parts,  # type: ignore[arg-type]
        )

    def _by(self, kinds: Sequence[Exit]) -> Counter[str] | None:
        """What is said of the access of all of these kinds, of how many of the vCPUs that can have made such exits.

        None where nothing is known.
        """
        if self.state is None or kinds[0].msr == msr.OTHER:
            return None
        by_pid: dict[int, list[Exit]] = {}
        for kind in kinds:
            by_pid.setdefault(kind.pid if self.by_vm else 0, []).append(kind)
        found: Counter[str] = Counter()
        for pid, of_pid in by_pid.items():
            index, direction = of_pid[0].msr, READ if of_pid[0].access == "read" else WRITE
            for vcpu, number in self._vcpus.get(pid_of(pid), {}).items():
                allowed = vcpu.filter.allows(index, direction) if vcpu.filter else None
                said = self._word_of(vcpu, index, direction, of_pid[0].guest)
                if said and any(may_have_made(kind, allowed) for kind in of_pid):
                    found[said] += number
        return found

    def _word_of(self, vcpu: Vcpu, msr: int, direction: int, guest: str) -> str | None:
        """What is said of an access by a guest of a vCPU; None for L2 where there is none, as far as is known."""
        if guest != L2:
            return self._verdict(vcpu, msr).of(direction)
        if vcpu.nested is None or vcpu.nested.use == UNUSED:
            return None
        nested = self._verdict(vcpu, msr).nested
        return nested.of(direction) if nested else UNKNOWN

    def _verdict(self, vcpu: Vcpu, msr: int) -> Verdict:
        """What is said of an MSR, found once for all vCPUs that are alike: `_vcpus` has one of them for each."""
        key = id(vcpu), msr
        if key not in self._verdicts:
            assert self.state  # there are no vCPUs without it
            self._verdicts[key] = self.state.verdict(vcpu, msr)
        return self._verdicts[key]

    @cached_property
    def _verdicts(self) -> dict[tuple[int, int], Verdict]:
        return {}

    @cached_property
    def _vcpus(self) -> dict[int, Counter[Vcpu]]:
        """The vCPUs that can have exited, and how many are alike; by the pid of their VMM, or all under 0.

        Others never ran, or KVM does not let them run (KVM_RUN: EIO where the process did not make the VM).
        """
        found: dict[int, Counter[Vcpu]] = {}
        one_of: dict[Vcpu, Vcpu] = {}
        for vm in self.state.vms if self.state else ():
            for vcpu in vm.vcpus if vm.owned else ():
                if vcpu.ran is not False:
                    alike = vcpu.any_id
                    found.setdefault(vm.pid if self.by_vm else 0, Counter())[one_of.setdefault(alike, alike)] += 1
        return found


def most_first(row: JoinedExits) -> tuple[object, ...]:
    """A key that sorts rows: the most exits first, and equal ones by MSR and all parts."""
    return (-row.exits, row.msr, row.access, row.guest, row.pid or 0, row.path or "", row.result or "")
