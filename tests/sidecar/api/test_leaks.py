"""Reports of leaked tokens: existing keys are revoked; the response does not tell which exist."""

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keylatch.authentication.authenticator import Authenticator
from keylatch.authentication.hashing import CHEAPEST, Hasher
from keylatch.authentication.lookup import Owner
from keylatch.core import tokens
from keylatch.core.imported_tokens import ImportedToken
from keylatch.core.timestamps import datetime_of
from keylatch.core.tokens import MacKeys, Token, has_valid_checksum
from keylatch.core.validation import NewKey
from keylatch.engine import Engine
from keylatch.errors import HashingFailed, InvalidKeyState, InvalidValue, StoreUnavailable
from keylatch.management.keyring import Created
from keylatch.settings import Settings
from keylatch.storage.store import Found
from keylatch_sidecar.api.leaks import ReportQueue
from keylatch_sidecar.app import create_app
from tests.support.clock import Clock
from tests.support.engines import MakeEngine
from tests.support.raw_http import RawResponse, exchange, http_scope, parse_response
from tests.support.servers import eventually
from tests.support.sidecars import Sidecar, sidecar_on

PATH = "/leaked"
UNKNOWN_TOKENS = MacKeys([b"s" * 32])
ACCEPTED = b'{"status":"accepted"}'


def report(sidecar: Sidecar, content: Any) -> RawResponse:
    """The answer to a report, byte by byte."""
    body = json.dumps(content).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return parse_response(exchange(sidecar.url, head.encode() + body))


def shown(sidecar: Sidecar, admin_key: Created, key: Created) -> dict[str, Any]:
    """A key, as its organisation's admin key sees it."""
    with sidecar.client(admin_key) as client:
        answer = client.get(f"/v1/api-keys/{key.record.id}")
        assert answer.status_code == 200
        content: dict[str, Any] = answer.json()
        return content


def works(sidecar: Sidecar, key: Created) -> bool:
    with sidecar.client(key) as client:
        status = client.get("/verify").status_code
    assert status in (200, 401)
    return status == 200


def a_key_of(sidecar: Sidecar, admin_key: Created, **fields: Any) -> Created:
    return sidecar.create(admin_key.record.organization_id, "Leaky", **fields)


# Over a real socket


def test_a_leaked_key_is_revoked(sidecar: Sidecar, admin_key: Created) -> None:
    """The holder of the token revokes it, without another key; no other key changes."""
    leaky, other = a_key_of(sidecar, admin_key), a_key_of(sidecar, admin_key)
    assert report(sidecar, {"token": leaky.token.reveal()}).body == ACCEPTED
    eventually(lambda: not works(sidecar, leaky))
    assert works(sidecar, other)
    key = shown(sidecar, admin_key, leaky)
    assert (key["active"], key["revokedReason"]) == (False, "leaked")
    with sidecar.client(admin_key) as client:
        lines = client.get("/v1/audit", params={"key": leaky.record.id, "limit": 1}).json()
    assert lines[0]["actor"] == "leak report"


def test_githubs_alerts_are_understood(sidecar: Sidecar, admin_key: Created) -> None:
    """A bare list, as its partner programme sends it, with whatever else it may say one day."""
    leaky = [a_key_of(sidecar, admin_key) for _ in range(3)]
    alerts = [
        {
            "token": key.token.reveal(),
            "type": "keylatch_api_key",
            "url": "https://github.com/octocat/hello/blob/main/.env",
            "source": "content",
            "severity": {"in": 2031},
        }
        for key in leaky
    ]
    assert report(sidecar, [*alerts, {"token": "nonsense"}]).body == ACCEPTED
    eventually(lambda: not any(works(sidecar, key) for key in leaky))


def test_the_answer_does_not_depend_on_the_token(sidecar: Sidecar, clock: Clock) -> None:
    """Status, headers and body are the same bytes, whatever is reported, alone or with others."""
    admin_key = sidecar.create()
    key = a_key_of(sidecar, admin_key)
    text = key.token.reveal()
    revoked, disabled = a_key_of(sidecar, admin_key), a_key_of(sidecar, admin_key)
    soon = int(sidecar.clock.seconds * 1000) + 1_000
    expired = a_key_of(sidecar, admin_key, expires_at=datetime_of(soon))
    with sidecar.client(admin_key) as client:
        assert client.delete(f"/v1/api-keys/{revoked.record.id}").status_code == 200
        change = {"active": False}
        path = f"/v1/api-keys/{disabled.record.id}"
        assert client.patch(path, json=change).status_code == 200
    sidecar.clock.tick(2)
    reported = [
        *(revoked.token.reveal(), disabled.token.reveal(), expired.token.reveal()),
        *("", " ", "nonsense", "\0", "\ud800", "x" * 10_000, f"Bearer {text}"),
        *(UNKNOWN_TOKENS.mint("kl", "live").reveal(), text[:-1], text + "0", text.swapcase()),
        text,  # the last one: now it is revoked
        text,
    ]
    answers = [report(sidecar, {"token": token}) for token in reported]
    answers += [report(sidecar, [{"token": token} for token in reported]), report(sidecar, [])]
    assert answers == [answers[0]] * len(answers)
    fields = dict(answers[0].headers)
    assert answers[0].status == 202
    assert fields[b"cache-control"] == b"no-store"
    assert b"www-authenticate" not in fields


def test_a_disabled_and_an_expired_key_are_revoked_as_well(sidecar: Sidecar) -> None:
    """Both could be undone by an operator who does not know that the token leaked."""
    admin_key = sidecar.create()
    soon = int(sidecar.clock.seconds * 1000) + 1_000
    disabled, expired = (
        a_key_of(sidecar, admin_key),
        a_key_of(sidecar, admin_key, expires_at=datetime_of(soon)),
    )
    with sidecar.client(admin_key) as client:
        client.patch(f"/v1/api-keys/{disabled.record.id}", json={"active": False})
        sidecar.clock.tick(2)
        report(sidecar, [{"token": key.token.reveal()} for key in (disabled, expired)])
        for key in (disabled, expired):
            path = f"/v1/api-keys/{key.record.id}"
            again = {"active": True, "expiresAt": None}
            eventually(lambda p=path, a=again: client.patch(p, json=a).status_code == 400)  # type: ignore[misc]


def test_a_report_is_no_use_of_the_key(sidecar: Sidecar, admin_key: Created) -> None:
    """`lastUsed` stays, so that the time of a theft can be compared with the time of the report."""
    leaky = a_key_of(sidecar, admin_key)
    report(sidecar, {"token": leaky.token.reveal()})
    eventually(lambda: shown(sidecar, admin_key, leaky)["active"] is False)
    assert shown(sidecar, admin_key, leaky)["lastUsed"] is None


def test_a_key_of_another_environment_is_revoked_as_well(tmp_path: Path, clock: Clock) -> None:
    """A sidecar that accepts keys for live only takes reports of keys for test all the same."""
    url = f"sqlite:///{tmp_path}/keys.db"
    with sidecar_on(url, clock, environment="live") as sidecar:
        admin_key = sidecar.create()
        leaky = a_key_of(sidecar, admin_key, environment="test")
        report(sidecar, {"token": leaky.token.reveal()})
        eventually(lambda: shown(sidecar, admin_key, leaky)["active"] is False)


def test_a_store_that_is_down_is_answered_with_503(
    sidecar: Sidecar, admin_key: Created, tmp_path: Path, clock: Clock
) -> None:
    """503, before the token is examined: a report that was not accepted is not confirmed."""
    with sidecar_on(f"sqlite:///{tmp_path}/missing/keys.db", clock) as down:
        reported = [
            admin_key.token.reveal(),
            "nonsense",
            UNKNOWN_TOKENS.mint("kl", "live").reveal(),
        ]
        answers = [report(down, {"token": token}) for token in reported]
    assert answers == [answers[0]] * len(answers)
    assert (answers[0].status, dict(answers[0].headers)[b"retry-after"]) == (503, b"1")


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ({}, "token: Field required"),
        ({"token": 1}, "token: Input should be a valid string"),
        ({"token": None}, "token: Input should be a valid string"),
        ({"token": "x", "url": "y"}, "url: is no field of this body"),
        ("kl_live_x", 'The body must be {"token": "…"}, or a list of such objects'),
        (["kl_live_x"], 'The body must be {"token": "…"}, or a list of such objects'),
        ([{"type": "x"}], 'The body must be {"token": "…"}, or a list of such objects'),
        ([{"token": 1}], 'The body must be {"token": "…"}, or a list of such objects'),
        (None, 'The body must be {"token": "…"}, or a list of such objects'),
    ],
)
def test_a_body_of_another_shape_is_refused(sidecar: Sidecar, content: Any, wrong: str) -> None:
    """400 with the field at fault, as everywhere: that depends on no token."""
    answer = report(sidecar, content)
    assert answer.status == 400
    assert json.loads(answer.body)["message"] == wrong


def rotated(
    sidecar: Sidecar, admin_key: Created, key: Created, grace_seconds: int
) -> dict[str, str]:
    """The header that sends the key's new secret."""
    with sidecar.client(admin_key) as client:
        path = f"/v1/api-keys/{key.record.id}/rotate"
        answer = client.post(path, json={"graceSeconds": grace_seconds})
    return {"Authorization": f"Bearer {answer.json()['token']}"}


def test_a_secret_that_was_rotated_away_ends_alone(sidecar: Sidecar, admin_key: Created) -> None:
    """After a rotation because of a leak, the report of the old secret keeps the new one."""
    leaky = a_key_of(sidecar, admin_key)
    new = rotated(sidecar, admin_key, leaky, 3_600)
    assert works(sidecar, leaky)
    report(sidecar, {"token": leaky.token.reveal()})
    eventually(lambda: not works(sidecar, leaky))
    report(sidecar, {"token": leaky.token.reveal()})
    with sidecar.client() as client:
        assert client.get("/verify", headers=new).status_code == 200
    assert shown(sidecar, admin_key, leaky)["active"] is True


def test_the_new_secret_ends_the_key(sidecar: Sidecar, admin_key: Created) -> None:
    """And with it the old one, whatever is left of its grace."""
    leaky = a_key_of(sidecar, admin_key)
    new = rotated(sidecar, admin_key, leaky, 3_600)
    report(sidecar, {"token": new["Authorization"].removeprefix("Bearer ")})
    eventually(lambda: not works(sidecar, leaky))
    assert shown(sidecar, admin_key, leaky)["active"] is False


# What is done about it, in this process


class CountingAuthenticator(Authenticator):
    """Counts what a report costs, and has the store fail on demand."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.looked_up: list[str] = []
        self.vouched = 0
        self.troubles: list[Exception] = []

    def may_exist(self, token: Token) -> bool:
        self.vouched += 1
        return super().may_exist(token)

    async def identify(self, token: Token) -> Owner | None:
        self.looked_up.append(token.key_id)
        if self.troubles:
            raise self.troubles.pop(0)
        return await super().identify(token)


class Counting(Engine):
    """An engine with it."""

    authenticator_class = CountingAuthenticator
    authenticator: CountingAuthenticator


@pytest.fixture
async def counting(store_url: str, clock: Clock) -> AsyncIterator[Counting]:
    hasher = Hasher("argon2id", CHEAPEST)
    settings = Settings.load(store=store_url, redis="")
    engine = Counting(settings, clock=clock, timer=clock, hasher=hasher)
    await engine.start()
    yield engine
    await engine.stop()


async def created(engine: Engine) -> Created:
    return await (await engine.keyring()).create("acme", "Leaky")


async def is_revoked(engine: Engine, key: Created) -> bool:
    record = await (await engine.keyring()).get("acme", key.record.id)
    assert record is not None
    return record.deleted_at is not None


async def done(reports: ReportQueue) -> None:
    """All that was taken is looked into."""
    if reports._worker is not None:
        await asyncio.wait_for(reports._worker, 20)


async def with_another_secret(engine: Engine, key: Created) -> Token:
    """A token made with the store's MAC key and the key id, but without the secret."""
    mac_keys = (await engine.store.open(0)).mac_keys
    forger = MacKeys(mac_keys)
    text = key.token.reveal()
    body = text[:-41] + forger.mint("kl", "live").reveal()[-41:-14]
    body += tokens._mac(mac_keys[0], body)
    forged = Token(body + tokens._crc(body))
    assert engine.authenticator.may_exist(forged)
    assert forged.key_id == key.record.id
    return forged


@pytest.mark.anyio
async def test_an_id_is_not_enough(counting: Counting) -> None:
    """Ids are in lists, logs and headers: a token with the right id and another secret does
    nothing, even one with a valid MAC."""
    key, reports = await created(counting), ReportQueue(counting)
    await reports.enqueue([await with_another_secret(counting, key)])
    await done(reports)
    assert counting.authenticator.looked_up == [key.record.id]
    assert not await is_revoked(counting, key)


class AcceptsAnyScheme(Counting):
    """The broken twin: it accepts the MAC as a proof."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.authenticator.identify = self.identify  # type: ignore[method-assign]

    async def identify(self, token: Token) -> Owner | None:
        found = await self.store.keys.find(token.key_id)
        return Owner(found.record, is_usable=True) if isinstance(found, Found) else None


@pytest.mark.anyio
async def test_a_twin_that_trusts_the_mac_alone_kills_keys(store_url: str, clock: Clock) -> None:
    """So the test above holds something."""
    engine = AcceptsAnyScheme(Settings.load(store=store_url, redis=""), clock=clock, timer=clock)
    await engine.start()
    key, reports = await created(engine), ReportQueue(engine)
    await reports.enqueue([await with_another_secret(engine, key)])
    await done(reports)
    assert await is_revoked(engine, key)
    await engine.stop()


@pytest.mark.anyio
async def test_a_flood_of_unknown_tokens_costs_no_store_and_no_hash(counting: Counting) -> None:
    """Forged tokens are refused by their MAC; a real one is looked up once."""
    key, reports = await created(counting), ReportQueue(counting)
    flood = [UNKNOWN_TOKENS.mint("kl", "live") for _ in range(1_000)]
    await reports.enqueue(flood + [key.token] * 1_000)
    await done(reports)
    assert counting.authenticator.looked_up == [key.record.id]
    assert await is_revoked(counting, key)


@pytest.mark.anyio
async def test_a_report_outlasts_an_outage(
    counting: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again until the store has answered."""
    key, reports = await created(counting), ReportQueue(counting, retry_seconds=0)
    counting.authenticator.troubles = [StoreUnavailable("the store is away")] * 3
    await reports.enqueue([key.token])
    await done(reports)
    assert await is_revoked(counting, key)
    assert caplog.messages == [
        *["leak reports wait for the store or the hasher: the store is away"] * 3,
        f"revoked {key.record.id}, which was reported as leaked",
    ]


@pytest.mark.anyio
async def test_a_rotation_that_is_taken_back_in_between_saves_nothing(counting: Counting) -> None:
    """The secret is the key's again, so the key ends."""
    key, reports = await created(counting), ReportQueue(counting)
    counting.authenticator.troubles = [InvalidKeyState("No rotation of the API key is under way")]
    await reports.enqueue([key.token])
    await done(reports)
    assert await is_revoked(counting, key)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "trouble",
    [
        HashingFailed("the row is damaged"),
        InvalidValue("reason", "must not be blank"),
        RuntimeError("a bug"),
    ],
)
async def test_a_report_that_cannot_be_looked_into_is_named(
    counting: Counting, trouble: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """It holds up no other, and an operator finds the id and what to do."""
    first, second, reports = await created(counting), await created(counting), ReportQueue(counting)
    counting.authenticator.troubles = [trouble]
    await reports.enqueue([first.token, second.token])
    await done(reports)
    assert await is_revoked(counting, second)
    wrong = f"{first.record.id} was reported as leaked and may still be active"
    assert any(message.startswith(wrong) for message in caplog.messages)
    assert f"hint: keylatch keys revoke {first.record.id}" in caplog.messages


@pytest.mark.long
@pytest.mark.anyio
async def test_a_report_that_is_left_at_the_end_is_named(
    counting: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that stops during an outage logs which keys an operator has to revoke."""
    key, reports = await created(counting), ReportQueue(counting, retry_seconds=60)
    counting.authenticator.troubles = [StoreUnavailable("the store is away")]
    await reports.enqueue([key.token])
    await reports.close()
    wrong = "was reported as leaked and may still be active: this process is stopping"
    assert f"{key.record.id} {wrong}" in caplog.messages
    assert key.token.reveal() not in caplog.text


@pytest.mark.long
@pytest.mark.anyio
async def test_more_reports_than_there_is_room_for_are_refused(counting: Counting) -> None:
    """503 to every client: a report that is accepted has a place in the queue."""
    key, reports = await created(counting), ReportQueue(counting, retry_seconds=60, max_pending=1)
    counting.authenticator.troubles = [StoreUnavailable("the store is away")]
    await reports.check_capacity()
    await reports.enqueue([key.token])
    with pytest.raises(StoreUnavailable):
        await reports.check_capacity()
    await reports.close()


# Imported keys


def external_token(number: int) -> Token:
    return Token(f"imported-{number:041}")


async def import_token(engine: Engine, token: Token) -> str:
    """The id of an imported key, which is found by its token's digest."""
    sha256 = hashlib.sha256(token.reveal().encode()).hexdigest()
    made = ImportedToken(f"sha256:{sha256}", "...", f"$sha256${sha256}")
    [imported] = await (await engine.keyring()).import_many([(NewKey("acme", "old"), made)])
    return imported.key_id


@pytest.mark.anyio
async def test_imported_keys_are_revoked_as_well(counting: Counting) -> None:
    """They have no MAC, so the store looks them up."""
    key_id, reports = await import_token(counting, external_token(1)), ReportQueue(counting)
    await reports.enqueue([external_token(1), external_token(2), Token("\ud800"), Token("a b")])
    await done(reports)
    record = await (await counting.keyring()).get("acme", key_id)
    assert record is not None
    assert (record.revoked_reason, record.deleted_at is None) == ("leaked", False)
    assert len(counting.authenticator.looked_up) == 2, "what no header can hold is no token"


@pytest.mark.long
@pytest.mark.anyio
async def test_a_flood_of_possibly_imported_tokens_delays_no_other(
    counting: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    """It has a line of its own, which has an end; and no name, which could be half a secret."""
    await import_token(counting, external_token(1))
    key, reports = await created(counting), ReportQueue(counting, retry_seconds=60)
    counting.authenticator.troubles = [StoreUnavailable("the store is away")] * 2
    await reports.enqueue([external_token(number) for number in range(2_000)])
    await reports.enqueue([key.token])
    await reports.check_capacity()
    await asyncio.sleep(0)
    await reports.close()
    assert "dropped a leak report: the queue for tokens of imported keys is full" in caplog.messages
    assert f"{key.record.id} was reported" in caplog.text
    assert "imported-" not in caplog.text
    assert "key_0" not in caplog.text.replace(key.record.id, "")


@pytest.mark.anyio
async def test_a_flood_of_reports_fills_no_log(
    counting: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    """9,000 reports that find no place, and 1,000 that are left when the process ends: 1, 2, 4, …
    lines, with the count."""
    await import_token(counting, external_token(1))
    reports = ReportQueue(counting, retry_seconds=60)
    counting.authenticator.troubles = [StoreUnavailable("the store is away")]
    await reports.enqueue([external_token(number) for number in range(10_000)])
    await asyncio.sleep(0)
    await reports.close()
    left_out = "dropped a leak report: the queue for tokens of imported keys is full"
    not_revoked = "reported as leaked and may still be active: this process is stopping"
    assert len([each for each in caplog.messages if each.startswith(left_out)]) == 14
    assert f"{left_out}; 8192 times so far" in caplog.messages
    assert len([each for each in caplog.messages if not_revoked in each]) == 10


@pytest.mark.anyio
async def test_a_key_that_is_reported_many_times_is_named_once(
    counting: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    """Many tokens that look like one key, at the end of a process, are one line."""
    key = await created(counting)
    reports = ReportQueue(counting, retry_seconds=60)
    counting.authenticator.troubles = [StoreUnavailable("the store is away")]
    tokens = [await with_another_secret(counting, key) for _ in range(50)]
    await reports.enqueue([key.token, *tokens])
    await reports.close()
    named = [each for each in caplog.messages if each.startswith(f"{key.record.id} was reported")]
    assert len(named) == 1


# The answer is sent before the token is looked at: that, and not a clock, is what is tested


async def looks_before_the_answer(app: ASGIApp, engine: Counting, token: Token) -> int:
    """How often the engine had looked the token up when the response's last byte was sent."""
    body = json.dumps({"token": token.reveal()}).encode()
    looks = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            looks.append(engine.authenticator.vouched + len(engine.authenticator.looked_up))
        await asyncio.sleep(0)  # waiting tasks get the loop

    scope = http_scope(PATH, [(b"content-type", b"application/json")], method="POST")
    await app(scope, receive, send)
    [at_the_answer] = looks
    assert engine.authenticator.vouched > 0, "and then it is looked at"
    return at_the_answer


class Eager:
    """The broken twin: it looks at the token, and then answers."""

    def __init__(self, engine: Engine, token: Token) -> None:
        self._engine = engine
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await ReportQueue(self._engine).enqueue([self._token])
        await send({"type": "http.response.start", "status": 202, "headers": []})
        await send({"type": "http.response.body", "body": ACCEPTED})


@pytest.mark.anyio
@pytest.mark.parametrize("real", [True, False])
async def test_the_token_is_looked_at_when_the_answer_is_sent(
    counting: Counting, real: bool
) -> None:
    """So the time of an answer cannot tell what the token is worth."""
    key = await created(counting)
    token = key.token if real else UNKNOWN_TOKENS.mint("kl", "live")
    make: list[Callable[[], ASGIApp]] = [
        lambda: create_app(counting),
        lambda: Eager(counting, token),
    ]
    looks = [await looks_before_the_answer(app(), counting, token) for app in make]
    assert looks[0] == 0
    assert looks[1] > 0


@pytest.mark.anyio
async def test_no_log_line_and_no_repr_holds_the_token(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """At DEBUG, over the whole life of a report."""
    caplog.set_level(logging.DEBUG)
    engine = make_engine()
    await engine.start()
    key, reports = await created(engine), ReportQueue(engine)
    await reports.enqueue([key.token])
    assert key.token.reveal() not in repr(vars(reports))
    await done(reports)
    await engine.stop()
    assert has_valid_checksum(key.token.reveal())
    assert key.token.reveal()[-41:] not in caplog.text
