"""Checks of this host: the pepper file and the cost of hashing."""

import asyncio
import os
import time
from collections.abc import Iterator
from typing import Final

from keylatch.authentication.hashing import OWASP_MINIMUM, Hasher
from keylatch.core.tokens import MacKeys
from keylatch.settings import Settings
from keylatch_sidecar.operations.doctor.finding import Finding, ok, warning

_ROUNDS: Final = 3
_SLOW_SECONDS: Final = 0.1


def check_pepper_file(settings: Settings) -> Iterator[Finding]:
    """Whether signing values in Redis needs a secret that the store does not contain."""
    if settings.warnings:
        message = "every account of this host may read it"
        yield warning("pepper file", message, "chmod o-r, and a new secret in it")
    elif settings.pepper_file:
        yield ok("pepper file", "set: a copy of the store does not suffice to sign for Redis")
    elif settings.redis:
        yield ok("pepper file", "none: an attacker who has read the store can sign for Redis")


async def check_hashing(settings: Settings) -> list[Finding]:
    """The cost of hashing in the check of a key that no cache has."""
    if settings.hasher == "sha256":
        return [ok("hashing", "SHA-256: negligible")]
    hasher = Hasher("argon2id", OWASP_MINIMUM, workers=1)
    token = MacKeys([b"doctor" * 4]).mint("kl", "live")
    durations = []
    for _ in range(_ROUNDS):
        started_at = time.perf_counter()
        await hasher.hash(token)
        durations.append(time.perf_counter() - started_at)
    await asyncio.to_thread(hasher.close)
    processors = os.cpu_count() or 1
    shortest, mebibytes = min(durations), OWASP_MINIMUM.memory_kib // 1024 * processors
    message = (
        f"argon2id takes {shortest * 1000:.0f} ms: {processors / shortest:,.0f} uncached keys per"
        f" second on {processors} processors, with {mebibytes} MiB"
    )
    if shortest > _SLOW_SECONDS:
        hint = "KEYLATCH_HASHER=sha256 is as safe for tokens that keylatch minted"
        return [warning("hashing", message, hint)]
    return [ok("hashing", message)]
