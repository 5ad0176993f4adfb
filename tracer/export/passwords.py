# SPDX-License-Identifier: GPL-2.0-or-later
"""Basic authentication with bcrypt hashes, RFC 7617. A hash takes long, on purpose: results are cached."""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping

_HASH = re.compile(r"\$2[aby]\$(0[4-9]|[12][0-9]|3[01])\$[./0-9A-Za-z]{53}")
_LONGEST = 72  # bytes of a password that bcrypt reads; its newest Python package refuses more
_CACHED = 100  # results of each kind
_AT_ONCE = 2  # comparisons, so that one who guesses does not take all CPUs


def is_hash(text: str) -> bool:
    """Whether bcrypt can compare a password with this."""
    return bool(_HASH.fullmatch(text))


class Passwords:
    """Compares passwords. Safe to use from several threads, none of which waits for another's comparison."""

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._comparing = threading.Semaphore(_AT_ONCE)
        # Two, so that guesses do not displace those who know the password
        self._cache: dict[bool, OrderedDict[bytes, None]] = {True: OrderedDict(), False: OrderedDict()}

    def checker(self, users: Mapping[str, str]) -> Callable[[str | None], bool]:
        """Checks an Authorization header against the hashes of at least one user.

        An unknown user takes as long as a known one.
        """
        somebody = next(iter(users.values()))

        def admits(header: str | None) -> bool:
            credentials = _credentials(header)
            if credentials is None:
                return False
            user, password = credentials
            found = users.get(user.decode("utf-8", "replace"))
            same = self._same(user, password, found or somebody)
            return same and found is not None

        return admits

    def _same(self, user: bytes, password: bytes, hashed: str) -> bool:
        # Only a digest of the password is kept, which takes as long to find whatever the password is.
        digest = hashlib.blake2b(key=self._salt)
        for part in (user, hashed.encode(), password):
            digest.update(len(part).to_bytes(8, "big") + part)
        key = digest.digest()
        known = self._cached(key)
        if known is not None:
            return known
        with self._comparing:
            known = self._cached(key)  # by another connection of the same client
            if known is None:
                known = _compare(password, hashed)
                with self._lock:
                    cache = self._cache[known]
                    cache[key] = None
                    if len(cache) > _CACHED:
                        cache.popitem(last=False)
            return known

    def _cached(self, key: bytes) -> bool | None:
        with self._lock:
            for result, cache in self._cache.items():
                if key in cache:
                    cache.move_to_end(key)
                    return result
        return None


def _compare(password: bytes, hashed: str) -> bool:
    import bcrypt

    try:
        return bcrypt.checkpw(password[:_LONGEST], hashed.encode())
    except ValueError:  # a password with a NUL byte, in older versions
        return False


def _credentials(header: str | None) -> tuple[bytes, bytes] | None:
    """The user and the password in an Authorization header; None if it has none."""
    scheme, _, text = (header or "").strip().partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = base64.b64decode(text.strip(), validate=True).partition(b":")
    except ValueError:
        return None
    return (user, password) if colon else None
