# SPDX-License-Identifier: GPL-2.0-or-later
"""Other modules, above all livepatches, that have copies of or replace the functions that msrtrace probes."""

from __future__ import annotations

from dataclasses import dataclass

from tracer.kernel.symbols import Symbols


@dataclass(frozen=True)
class Holder:
    """A module that has copies of the functions `copied`, or replaces the functions `replaced` if it is enabled."""

    module: str
    is_livepatch: bool
    enabled: bool
    copied: tuple[str, ...]
    replaced: tuple[str, ...]
    #: Functions of KVM in the module that may call its own copies of counted functions; and those copies.
    callers: tuple[str, ...]
    uncounted: tuple[str, ...]

    def __str__(self) -> str:
        kind = "livepatch" if self.is_livepatch else "module"
        state = "" if self.enabled else " (not enabled)"
        replaced, copied = ", ".join(self.replaced), ", ".join(self.copied)
        if replaced == copied:
            what = f"replaces, and has a copy of, {copied}"
        elif replaced and copied:
            what = f"replaces {replaced} and has a copy of {copied}"
        else:
            what = f"replaces {replaced}" if replaced else f"has a copy of {copied}"
        return f"the {kind} {self.module}{state} {what}"

    @property
    def loss(self) -> str:
        """What is not counted because of the module, or ""."""
        if not self.uncounted:
            return ""
        copies, callers = ", ".join(self.uncounted), ", ".join(self.callers)
        return f"calls that {self.module} may make to its own {copies} are not counted (it has {callers}, too)"


def holders(symbols: Symbols) -> list[Holder]:
    """Every other module that has copies of or replaces functions that msrtrace may probe, by name.

    A livepatch redirects a function at its entry, by ftrace; probes at the entry run nevertheless
    (klp_ftrace_handler(), kernel/livepatch/patch.c; kprobe_ftrace_handler(), arch/x86/kernel/kprobes/ftrace.c). So
    calls through the original are counted; calls that a livepatch makes to a copy in its own module are not.
    """
    patches = {patch.module: patch for patch in symbols.livepatches}
    known = [function for function in symbols.vendor.probed if symbols.find(function)]
    calls = {function for layout in symbols.vendor.layouts for function in layout.calls}
    found = []
    for module in sorted({str(s.module) for s in symbols.others if s.module} | patches.keys()):
        patch = patches.get(module)
        copied = tuple(f for f in known if any(s.module == module for s in symbols.copies(f)))
        replaced = tuple(f for f in known if patch in symbols.replacing(f)) if patch else ()
        if not copied and not replaced:
            continue
        enabled = not patch or patch.enabled
        counted = tuple(f for f in copied if f in calls and enabled)
        callers = tuple(sorted(symbols.held_by(module) - calls)) if counted else ()
        uncounted = counted if callers else ()
        found.append(Holder(module, patch is not None, enabled, copied, replaced, callers, uncounted))
    return found


def describe(symbols: Symbols) -> tuple[str, str | None]:
    """A line for users on those modules, and what to do (or None) if calls are not counted because of them."""
    found = holders(symbols)
    if not found:
        return "no livepatch or other module has a function that msrtrace probes", None
    functions = dict.fromkeys(function for holder in found for function in (*holder.replaced, *holder.copied))
    probed = ", ".join(symbols.find(function)[0].full_name for function in functions)
    detail = f"{'; '.join(map(str, found))}; msrtrace probes {probed}, at whose entry a livepatch takes over"
    losses = [holder for holder in found if holder.loss]
    if not losses:
        return f"{detail}, so every call is counted", None
    fix = f"to count these too, trace a host without {' and '.join(holder.module for holder in losses)}"
    return f"{detail}; {'; '.join(holder.loss for holder in losses)}", fix
