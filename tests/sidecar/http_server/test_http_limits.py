"""The limits of an organisation over real sockets: what is refused, how that is said in both
dialects, and what never is."""

import asyncio
import concurrent.futures
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from keylatch.authentication.hashing import CHEAPEST, Hasher
from keylatch.core.tokens import Token
from keylatch.engine import Engine
from keylatch.management.keyring import Created
from keylatch.settings import Settings
from keylatch_sidecar.app import create_app
from tests.sidecar.api.test_unsent import KEYS, created, error
from tests.support.clock import Clock
from tests.support.servers import serving
from tests.support.sidecars import Sidecar, sidecar_on

THEIRS = "/v1/api_keys"  # Sendook's
HOURLY = 6
LIVE = 4


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    """A sidecar with narrow limits."""
    store_url = f"sqlite:///{tmp_path_factory.mktemp('limits')}/keys.db"
    with sidecar_on(store_url, Clock(), max_keys=LIVE, max_changes=HOURLY) as sidecar:
        yield sidecar


@pytest.fixture
def admin_key(limited: Sidecar) -> Created:
    return limited.create()


@pytest.fixture
def client(limited: Sidecar, admin_key: Created) -> Iterator[httpx.Client]:
    with limited.client(admin_key) as client:
        yield client


def renamed(client: httpx.Client, key_id: str, name: str) -> httpx.Response:
    return client.patch(f"{KEYS}/{key_id}", json={"name": name})


def exhaust(client: httpx.Client, key_id: str) -> None:
    """Make changes until no more are allowed."""
    for number in range(HOURLY + 1):
        answer = renamed(client, key_id, f"name {number}")
        if answer.status_code == 429:
            return
        assert answer.status_code == 200
    raise AssertionError("no limit was reached")


def log_of(client: httpx.Client) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = client.get("/v1/audit").json()
    return lines


def test_too_many_changes_are_429_with_a_retry_after_that_is_true(
    client: httpx.Client, limited: Sidecar
) -> None:
    """In unsent's shape, with nothing written; after so many seconds the call is answered."""
    key = created(client)
    limited.clock.tick(10)
    exhaust(client, key["id"])
    before = log_of(client)
    answer = client.post(KEYS, json={"name": "more"})
    message = f"The organisation's API keys may make {HOURLY} changes an hour"
    assert (answer.status_code, answer.json()) == (429, error("RATE_LIMITED", message))
    assert answer.headers["retry-after"] == "3590"
    assert log_of(client) == before
    limited.clock.tick(3_589)
    assert client.post(KEYS, json={"name": "more"}).status_code == 429
    limited.clock.tick(1)
    assert client.post(KEYS, json={"name": "more"}).status_code == 200


def test_sendooks_dialect_says_it_in_its_shape(client: httpx.Client) -> None:
    """The same limit, the same header."""
    key = created(client)
    exhaust(client, key["id"])
    answer = client.post(THEIRS, json={"name": "more"})
    assert (answer.status_code, answer.json()["code"]) == (429, "RATE_LIMITED")
    assert answer.headers["retry-after"] == "3600"


def test_too_many_keys_are_429_without_a_time(client: httpx.Client) -> None:
    """Waiting does not help; deleting one does."""
    made = [created(client) for _ in range(LIVE - 1)]  # and the admin key
    for path in (KEYS, THEIRS):
        answer = client.post(path, json={"name": "more"})
        assert (answer.status_code, answer.json()["code"]) == (429, "RATE_LIMITED")
        assert "delete" in answer.json()["message"]
        assert "retry-after" not in answer.headers
    assert client.delete(f"{KEYS}/{made[0]['id']}").status_code == 200
    assert client.post(KEYS, json={"name": "more"}).status_code == 200


ENDINGS: dict[str, Callable[[httpx.Client, str], httpx.Response]] = {
    "delete": lambda client, key: client.delete(f"{KEYS}/{key}", params={"reason": "leaked"}),
    "delete, as Sendook": lambda client, key: client.delete(f"{THEIRS}/{key}"),
    "disable": lambda client, key: client.patch(f"{KEYS}/{key}", json={"active": False}),
    "finish": lambda client, key: client.post(f"{KEYS}/{key}/rotate/finish"),
    "cancel": lambda client, key: client.post(f"{KEYS}/{key}/rotate/cancel"),
    "self": lambda client, key: client.delete(f"{KEYS}/self"),
    "revoke all": lambda client, key: client.post(f"{KEYS}/revoke-all"),
}


@pytest.mark.parametrize("ending", list(ENDINGS))
def test_what_ends_access_is_never_refused(client: httpx.Client, ending: str) -> None:
    """The holder of a leaked key can exhaust the limits, which does not prevent its revocation."""
    key = created(client)
    assert client.post(f"{KEYS}/{key['id']}/rotate", json={}).status_code == 200
    exhaust(client, key["id"])
    assert ENDINGS[ending](client, key["id"]).status_code == 200


CHANGES: dict[str, Callable[[httpx.Client, str], httpx.Response]] = {
    "create": lambda client, key: client.post(KEYS, json={"name": "more"}),
    "create, as Sendook": lambda client, key: client.post(THEIRS, json={"name": "more"}),
    "rename": lambda client, key: renamed(client, key, "another"),
    "enable": lambda client, key: client.patch(f"{KEYS}/{key}", json={"active": True}),
    "disable and rename": lambda client, key: client.patch(
        f"{KEYS}/{key}", json={"active": False, "name": "another"}
    ),
    "rotate": lambda client, key: client.post(f"{KEYS}/{key}/rotate", json={"graceSeconds": 9}),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_every_other_change_has_the_limit(client: httpx.Client, change: str) -> None:
    """And is refused without a trace."""
    key = created(client)
    exhaust(client, key["id"])
    client.patch(f"{KEYS}/{key['id']}", json={"active": False})
    before = log_of(client)
    assert CHANGES[change](client, key["id"]).status_code == 429
    assert log_of(client) == before


def test_disabling_again_and_again_leaves_one_line(client: httpx.Client) -> None:
    """What is never refused must be bounded by something else: the second one changes nothing."""
    key = created(client)
    exhaust(client, key["id"])
    before = len(log_of(client))
    answers = [ENDINGS["disable"](client, key["id"]) for _ in range(20)]
    assert len({answer.text for answer in answers}) == 1
    assert len(log_of(client)) == before + 1


def test_others_and_operators_are_not_concerned(client: httpx.Client, limited: Sidecar) -> None:
    """Another organisation has limits of its own, and the command line has none."""
    admin_key = limited.create()
    with limited.client(admin_key) as other:
        exhaust(client, created(client)["id"])
        assert other.post(KEYS, json={"name": "new"}).status_code == 200
    for _ in range(LIVE + HOURLY):
        limited.create(admin_key.record.organization_id)


def test_refusals_are_counted_by_their_limit(client: httpx.Client, limited: Sidecar) -> None:
    """With no organisation and no key in the labels."""

    def counts() -> dict[str, float]:
        page = client.get("/metrics").text
        lines = [line for line in page.splitlines() if "changes_limited_total{" in line]
        return {line.split('"')[1]: float(line.split()[-1]) for line in lines}

    before = counts()
    exhaust(client, created(client)["id"])
    with limited.client(limited.create()) as other:
        for _ in range(LIVE):
            other.post(KEYS, json={"name": "new"})
    after = counts()
    gained = {name: after[name] - before[name] for name in after}
    assert gained == {"hashes": 0, "changes": 1, "keys": 1}


def test_a_line_of_the_log_is_short_whatever_a_call_holds(client: httpx.Client) -> None:
    """The longest name, reason and metadata that are accepted: at most 6 KB."""
    key = created(client, name="\U0001f511" * 100, metadata={"m": "y" * 4_080})
    body = {"name": "\U0001f5dd" * 100, "metadata": {"m": "z" * 4_080}, "expiresIn": "90d"}
    assert client.patch(f"{KEYS}/{key['id']}", json=body).status_code == 200
    reason = {"reason": "\U0001f5d1" * 200}
    assert client.delete(f"{KEYS}/{key['id']}", params=reason).status_code == 200
    lines = log_of(client)[:3]
    assert [line["action"] for line in lines] == ["key.delete", "key.change", "key.create"]
    assert all(len(json.dumps(line)) < 6_000 for line in lines)
    assert not any("zzzz" in json.dumps(line) for line in lines)


class GatedHasher(Hasher):
    """Hashes new tokens once the test lets it."""

    def __init__(self) -> None:
        super().__init__("argon2id", CHEAPEST, workers=2)
        self.gate = threading.Event()

    def _hash_sync(self, token: Token) -> str:
        self.gate.wait(60)
        return super()._hash_sync(token)


@pytest.mark.long
def test_creates_at_the_same_time_have_a_limit_and_stop_no_check(store_url: str) -> None:
    """80 creates by a key over HTTP while none is hashed: 20 wait, 60 get 429 with Retry-After: 1,
    and 40 uncached keys of another organisation are all accepted meanwhile."""
    hasher = GatedHasher()
    engine = Engine(Settings.load(store=store_url, redis=""), hasher=hasher)

    async def filled() -> tuple[str, list[str]]:
        cheap = Hasher("argon2id", CHEAPEST)
        operator = Engine(Settings.load(store=store_url, redis=""), hasher=cheap)
        keyring = await operator.keyring()
        admin = await keyring.create("acme", "admin")
        others = [await keyring.create("rival", f"key {n}") for n in range(40)]
        await operator.stop()
        return admin.token.reveal(), [each.token.reveal() for each in others]

    admin, cold = asyncio.run(filled())
    with (
        serving(create_app(engine)) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
        concurrent.futures.ThreadPoolExecutor(80) as threads,
    ):
        headers = {"Authorization": f"Bearer {admin}"}
        assert client.get("/verify", headers=headers).status_code == 200

        def create(_: int) -> httpx.Response:
            with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
                return client.post(KEYS, json={"name": "new"}, headers=headers)

        creating = [threads.submit(create, number) for number in range(80)]
        answered = concurrent.futures.as_completed(creating, timeout=60)
        refused = [next(answered).result() for _ in range(60)]
        assert {answer.status_code for answer in refused} == {429}
        assert {answer.headers["retry-after"] for answer in refused} == {"1"}
        checked = [
            client.get("/verify", headers={"Authorization": f"Bearer {token}"}).status_code
            for token in cold
        ]
        assert checked == [200] * 40
        hasher.gate.set()
        assert [each.result().status_code for each in answered] == [200] * 20
