"""Hashes: self-describing, upgraded when they should be, bounded, and off the event loop."""

import asyncio
import base64
import hashlib
import threading

import argon2
import pytest
from argon2.exceptions import VerifyMismatchError

from keylatch.authentication.hashing import CHEAPEST, OWASP_MINIMUM, Cost, Hasher
from keylatch.core import argon2id
from keylatch.core.tokens import MacKeys, Token
from keylatch.errors import HashingBusy, HashingFailed

pytestmark = pytest.mark.anyio
TOKEN = MacKeys([b"k" * 32]).mint("kl", "live")
OTHER = MacKeys([b"k" * 32]).mint("kl", "live")


@pytest.mark.parametrize("hasher", [Hasher("argon2id", CHEAPEST), Hasher("sha256")])
async def test_a_hash_fits_its_token_and_no_other(hasher: Hasher) -> None:
    """Whatever the scheme: verify says yes to the one token and no to all others."""
    stored = await hasher.hash(TOKEN)
    assert await hasher.verify(stored, TOKEN)
    assert not await hasher.verify(stored, OTHER)
    assert TOKEN.reveal() not in stored
    hasher.close()


async def test_every_hasher_verifies_every_scheme() -> None:
    """A change of settings never locks out the keys that were made before it."""
    argon, sha = Hasher("argon2id", CHEAPEST), Hasher("sha256")
    assert await sha.verify(await argon.hash(TOKEN), TOKEN)
    assert await argon.verify(await sha.hash(TOKEN), TOKEN)
    argon.close()
    sha.close()


async def test_the_production_cost_is_the_owasp_minimum() -> None:
    """argon2id with 19 MiB, two passes, one lane, said by the hash itself."""
    hasher = Hasher()
    stored = await hasher.hash(TOKEN)
    assert stored.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert await hasher.verify(stored, TOKEN)
    hasher.close()


async def test_hashes_are_upgraded_and_never_weakened() -> None:
    """Another cost or a weaker scheme is outdated; an argon2id hash never becomes a sha256."""
    cheap, dear, sha = (
        Hasher("argon2id", CHEAPEST),
        Hasher("argon2id", Cost(16, 2)),
        Hasher("sha256"),
    )
    argon_hash, sha_hash = await cheap.hash(TOKEN), await sha.hash(TOKEN)
    assert dear.needs_rehash(argon_hash)
    assert dear.needs_rehash(sha_hash)
    assert not cheap.needs_rehash(argon_hash)
    assert not sha.needs_rehash(argon_hash)
    assert not sha.needs_rehash(sha_hash)
    for hasher in (cheap, dear, sha):
        hasher.close()


async def test_what_is_stored_is_the_digest_of_what_proves_it() -> None:
    """argon2id's output is not in the hash, is what verify answers with, and fits no other hash,
    also not one of the same token with another salt."""
    hasher = Hasher("argon2id", CHEAPEST)
    stored, again, other = [await hasher.hash(token) for token in (TOKEN, TOKEN, OTHER)]
    fit = await hasher.verify(stored, TOKEN)
    assert isinstance(fit, bytes)
    assert [argon2id.verify_preimage(each, fit) for each in (stored, again, other)] == [
        True,
        False,
        False,
    ]
    assert argon2id._base64(fit) not in stored
    assert argon2id.compute_preimage(stored, OTHER.reveal()) != fit
    for wrong in (b"", fit[:-1], fit + b"x", bytes(32), hashlib.sha256(fit).digest()):
        assert not argon2id.verify_preimage(stored, wrong)
    hasher.close()


async def test_argon2_itself_says_the_same() -> None:
    """The stored digest is that of what the reference implementation makes of the same salt."""
    stored = argon2id.hash_secret(TOKEN.reveal(), CHEAPEST)
    head, digest, kind = stored.rsplit("$", 2)
    raw = argon2id._base64(argon2id.compute_preimage(stored, TOKEN.reveal()))
    assert kind == "sha256"
    assert argon2.PasswordHasher().verify(f"{head}${raw}", TOKEN.reveal())
    with pytest.raises(VerifyMismatchError):
        argon2.PasswordHasher().verify(f"{head}${digest}", TOKEN.reveal())


async def test_argon2s_own_output_is_verified_and_made_anew() -> None:
    """Older and imported hashes: they prove nothing to other processes, because an attacker who
    has read the store knows them."""
    hasher = Hasher("argon2id", CHEAPEST)
    before = argon2.PasswordHasher(1, 8, 1).hash(TOKEN.reveal())
    assert await hasher.verify(before, TOKEN) is True
    assert await hasher.verify(before, OTHER) is False
    assert hasher.needs_rehash(before)
    assert not argon2id.verify_preimage(before, base64.b64decode(before.rpartition("$")[2] + "="))
    hasher.close()


class Gated(Token):
    """A token that blocks its hashing, and records on which thread it was read."""

    __slots__ = ("gate", "readers")

    def __init__(self) -> None:
        super().__init__(TOKEN.reveal())
        self.gate = threading.Event()
        self.readers: list[str] = []

    def reveal(self) -> str:
        self.readers.append(threading.current_thread().name)
        self.gate.wait(20)
        return super().reveal()


async def test_a_full_queue_says_so_at_once_and_recovers() -> None:
    """Beyond workers plus queue the answer is HashingBusy; when one is done there is room."""
    hasher = Hasher("argon2id", CHEAPEST, workers=1, queue=2)
    token = Gated()
    waiting = [asyncio.create_task(hasher.hash(token)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(HashingBusy):
        await hasher.hash(token)
    token.gate.set()
    await asyncio.gather(*waiting)
    assert await hasher.hash(token)
    hasher.close()


async def test_a_cancelled_request_keeps_its_place_until_its_hash_is_done() -> None:
    """Clients that disconnect cannot stack more work on the pool than it may hold."""
    hasher = Hasher("argon2id", CHEAPEST, workers=1, queue=0)
    token = Gated()
    hung_up = asyncio.create_task(hasher.hash(token))
    await asyncio.sleep(0)
    hung_up.cancel()
    await asyncio.wait([hung_up])
    with pytest.raises(HashingBusy):
        await hasher.hash(token)
    token.gate.set()
    hasher.close()


async def test_argon2_runs_on_its_own_threads() -> None:
    """The event loop's thread never reads a token to hash it."""
    hasher = Hasher("argon2id", CHEAPEST)
    token = Gated()
    token.gate.set()
    await hasher.verify(await hasher.hash(token), token)
    assert len(token.readers) == 2
    assert all(name.startswith("keylatch-hash") for name in token.readers)
    hasher.close()


class OneHashPool(Hasher):
    """A broken twin: new tokens are hashed by the threads of checks, and wait in their queue."""

    async def hash(self, token: Token) -> str:
        return await self._hash(token, self._check_pool)


@pytest.mark.parametrize("kind", [Hasher, OneHashPool])
async def test_new_tokens_take_no_place_from_checks(kind: type[Hasher]) -> None:
    """80 new tokens and as many better hashes fill their own queues: 40 checks find their places.
    The twin refuses checks."""
    hasher = kind("argon2id", CHEAPEST, workers=2)
    stored, token = await hasher.hash(TOKEN), Gated()
    held = [asyncio.create_task(hasher.hash(token)) for _ in range(80)]
    held += [asyncio.create_task(hasher.rehash(token)) for _ in range(80)]
    await asyncio.sleep(0)
    checks = [asyncio.create_task(hasher.verify(stored, TOKEN)) for _ in range(40)]
    await asyncio.sleep(0)
    busy = sum(check.done() and isinstance(check.exception(), HashingBusy) for check in checks)
    token.gate.set()
    answers = await asyncio.gather(*checks, return_exceptions=True)
    fits = sum(isinstance(answer, bytes) for answer in answers)
    assert (busy, fits) == ((40, 0) if kind is OneHashPool else (0, 40))
    await asyncio.gather(*held, return_exceptions=True)
    hasher.close()


async def test_the_queue_of_new_tokens_is_bounded_and_checks_stay_well() -> None:
    """Beyond threads and queue it is HashingBusy; the health of checks does not change."""
    hasher = Hasher("argon2id", CHEAPEST, workers=4, queue=3)
    token = Gated()
    held = [asyncio.create_task(hasher.hash(token)) for _ in range(9)]
    await asyncio.sleep(0)
    refused = [each for each in held if each.done()]
    assert (len(refused), hasher.in_progress()["management"]) == (4, 5)
    assert {type(each.exception()) for each in refused} == {HashingBusy}
    assert hasher.health.failures.value == 0
    token.gate.set()
    await asyncio.wait(held)
    hasher.close()


async def test_management_has_fewer_threads_than_checks() -> None:
    """So that checks have most of the processors; a command, which checks nothing, has all."""
    one, four = Hasher(workers=1), Hasher(workers=4)
    command = Hasher(workers=4, management_workers=4)
    found = [[pool.workers for pool in hasher._pools] for hasher in (one, four, command)]
    assert found == [[1, 1, 1, 1], [4, 2, 2, 1], [4, 2, 4, 1]]


async def test_many_new_tokens_leave_places_for_a_single_one() -> None:
    """A bulk of them hashes as many at a time as there are threads."""
    hasher = Hasher("argon2id", CHEAPEST, workers=2, queue=1)
    token = Gated()
    bulk = asyncio.create_task(hasher.hash_all([token] * 10))
    await asyncio.sleep(0)
    one = asyncio.create_task(hasher.hash(TOKEN))
    await asyncio.sleep(0)
    token.gate.set()
    assert await hasher.verify(await one, TOKEN)
    assert len(await bulk) == 10
    hasher.close()


@pytest.mark.parametrize(
    "stored",
    [
        "",
        "rubbish",
        "$argon2id$v=19$m=8,t=1,p=1$short",
        "$argon2id$v=19$m=8,t=1,p=1$" + "A" * 22 + "$" + "A" * 42 + "$sha256",
    ],
)
async def test_an_unreadable_hash_is_a_failure_and_no_refusal(stored: str) -> None:
    """A damaged row says nothing about the key: that must not become a 401."""
    hasher = Hasher("argon2id", CHEAPEST)
    with pytest.raises(HashingFailed) as caught:
        await hasher.verify(stored, TOKEN)
    assert TOKEN.reveal() not in str(caught.value)
    assert not hasher.needs_rehash(stored)
    hasher.close()


@pytest.mark.parametrize("price", ["m=0,t=0,p=0", "m=8,t=0,p=1", "m=8,t=1,p=999"])
async def test_a_price_that_cannot_be_paid_is_a_failure_and_no_refusal(price: str) -> None:
    """As other damage is."""
    hasher = Hasher("argon2id", CHEAPEST)
    with pytest.raises(HashingFailed):
        await hasher.verify(f"$argon2id$v=19${price}${'A' * 22}${'A' * 43}$sha256", TOKEN)
    hasher.close()


def test_the_cheapest_cost_is_not_the_default() -> None:
    """Tests are cheap because they ask for it."""
    assert Cost() == OWASP_MINIMUM != CHEAPEST
