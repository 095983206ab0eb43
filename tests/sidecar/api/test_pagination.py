"""Lists of keys, whole and in pages, as long as they may be, whatever happens meanwhile."""

import asyncio
import json
import re
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openapi_schema_validator import OAS31Validator

from keylatch.engine import Engine
from keylatch.errors import StoreUnavailable
from keylatch.management.keyring import Created, NewKey
from keylatch.revocation.invalidations import MAX_SEQ
from keylatch.storage.keys import Page
from keylatch.storage.store import Store
from keylatch_sidecar.api import pagination
from keylatch_sidecar.api.pagination import CURSORS, encode_cursor
from keylatch_sidecar.app import create_app
from tests.storage.test_store import NOW, record
from tests.support.command_line import Operator
from tests.support.servers import PostgresServer
from tests.support.sidecars import Sidecar
from tests.support.stores import StoreTests

pytestmark = pytest.mark.anyio
UNSENT, SENDOOK = "/v1/api-keys", "/v1/api_keys"


def pages_of(client: httpx.Client, url: str) -> list[list[dict[str, Any]]]:
    """The pages of a list, by their links."""
    pages = []
    while url:
        answer = client.get(url)
        assert answer.status_code == 200
        pages.append(answer.json())
        link = answer.links.get("next")
        url = str(answer.url.join(link["url"])) if link else ""
    return pages


def names(keys: list[dict[str, Any]]) -> list[str]:
    return [key["name"] for key in keys]


def created(client: httpx.Client, count: int, path: str = UNSENT) -> list[str]:
    """The names of new keys, in the order of their creation."""
    made = [client.post(path, json={"name": f"Key {n}"}).json() for n in range(count)]
    return names(made)


@pytest.mark.parametrize("path", [UNSENT, SENDOOK])
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 9, 1000])
def test_the_pages_are_the_list(client: httpx.Client, path: str, limit: int) -> None:
    """Cut where the limit says, in the dialect's own order, and each a bare array."""
    created(client, 7)
    whole = names(client.get(path).json())
    pages = pages_of(client, f"{path}?limit={limit}")
    assert [name for page in pages for name in names(page)] == whole
    assert {len(page) for page in pages[:-1]} <= {limit}
    assert 0 < len(pages[-1]) <= limit


@pytest.mark.parametrize("path", [UNSENT, SENDOOK])
def test_a_list_without_a_limit_is_as_it_was(
    client: httpx.Client, sidecar: Sidecar, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No link, no header more; and one that is read in many pieces has the same bytes."""
    created(client, 9)
    short = client.get(path)
    assert "link" not in short.headers
    assert short.headers["content-length"] == str(len(short.content))
    monkeypatch.setattr(pagination, "PAGE_SIZE", 4)
    monkeypatch.setattr(pagination, "_SLICE", 3)
    long = client.get(path)
    assert "link" not in long.headers
    assert without_uses(long) == without_uses(short)
    assert long.headers["content-type"] == short.headers["content-type"]
    assert long.headers["cache-control"] == "no-store"


def without_uses(answer: httpx.Response) -> str:
    """Its text but for `lastUsed`, which the request itself changes soon."""
    return re.sub('"lastUsed":("[^"]*"|null)', "", answer.text)


def test_a_link_keeps_the_query(client: httpx.Client) -> None:
    """Deleted keys stay included on the next page; nothing that is not ours is repeated."""
    created(client, 3)
    for key in client.get(UNSENT).json()[:2]:
        client.delete(f"{UNSENT}/{key['id']}")
    answer = client.get(f"{UNSENT}?x=%0d%0aX&include=deleted&limit=2")
    assert re.fullmatch(
        r'<\?limit=2&cursor=[\w-]{12}&include=deleted>; rel="next"', answer.headers["link"]
    )
    assert len([key for page in pages_of(client, str(answer.url)) for key in page]) == 4


def test_a_cursor_alone_is_the_rest_of_the_list(client: httpx.Client) -> None:
    """Without a limit there are no pages."""
    created(client, 5)
    whole = names(client.get(UNSENT).json())
    cursor = client.get(f"{UNSENT}?limit=2").headers["link"].partition("cursor=")[2][:12]
    answer = client.get(UNSENT, params={"cursor": cursor})
    assert names(answer.json()) == whole[2:]
    assert "link" not in answer.headers


NO_LIMITS = [
    "",
    "0",
    "-1",
    "1.5",
    "1e2",
    " 1",
    "1001",
    "99999999999999999999",
    "ten",
    "١",
    "1&limit=2",
]
NO_CURSORS = ["", "x", "A" * 11, "A" * 13, "A" * 12, "=" * 12, "%00" * 12, encode_cursor(7, False)]
NO_CURSORS += [encode_cursor(0, True), encode_cursor(2**63, True), "bzzzzzzzzzzz", "n%0AAAAAAAAAAA"]


@pytest.mark.parametrize("query", [f"limit={no}" for no in NO_LIMITS])
def test_a_limit_that_is_none(client: httpx.Client, query: str) -> None:
    """400 as each dialect says it, and the parameter is named."""
    answers = [client.get(f"{path}?{query}") for path in (UNSENT, SENDOOK)]
    assert [answer.status_code for answer in answers] == [400, 400]
    error = answers[0].json()
    assert error["code"] == error["error"]["code"] == "BAD_REQUEST"
    assert error["message"] == "limit: must be a number from 1 to 1000"
    [fault] = answers[1].json()["errors"]
    assert (fault["path"], fault["location"], fault["msg"]) == ("limit", "query", "Invalid value")


@pytest.mark.parametrize("cursor", NO_CURSORS)
def test_a_cursor_that_is_none(client: httpx.Client, cursor: str) -> None:
    """What no link has ever held is refused, and so is the cursor of the other order."""
    answer = client.get(f"{UNSENT}?limit=1&cursor={cursor}")
    assert answer.status_code == 400
    assert answer.json()["message"] == "cursor: must come from a link to a next page"


def test_both_mistakes_are_reported_at_once(client: httpx.Client) -> None:
    """In one response, which redacts a token that was sent by mistake."""
    token = client.headers["authorization"].removeprefix("Bearer ")
    answer = client.get(f"{SENDOOK}?limit=x&cursor={token}")
    assert [fault["path"] for fault in answer.json()["errors"]] == ["limit", "cursor"]
    assert token not in answer.text


def test_a_cursor_of_another_organisation_shows_nothing(
    client: httpx.Client, sidecar: Sidecar
) -> None:
    """It is a position and no permission: the keys shown are those of the caller's organisation."""
    created(client, 3)
    other_key = sidecar.create()
    with sidecar.client(other_key) as other:
        created(other, 3)
        theirs = other.get(f"{UNSENT}?limit=1").links["next"]["url"]
    ours = client.get(f"{UNSENT}{theirs}").json()
    assert {key["organizationId"] for key in ours} <= {
        client.get(UNSENT).json()[0]["organizationId"]
    }


class ListingContract(StoreTests):
    """What both databases promise of pages."""

    @pytest.mark.parametrize("newest_first", [True, False])
    async def test_what_is_there_all_the_time_is_listed_once_and_in_order(
        self, store: Store, newest_first: bool
    ) -> None:
        """Keys are created and deleted between any two pages; no other key moves."""
        await store.keys.add_many([(record(f"key_{n:02}"), "hashed") for n in range(40)])
        seen: list[str] = []
        after, turn = None, 0
        while True:
            page = await store.keys.page("acme", 4, newest_first=newest_first, after=after)
            seen += [found.id for found in page.records]
            after = page.next_cursor
            if after is None:
                break
            await store.keys.add(record(f"key_new_{turn}"), "hashed")
            gone = {"deleted_at": NOW, "active": False}
            await store.keys.change("acme", f"key_{turn * 3:02}", NOW, gone)
            turn += 1
        assert len(set(seen)) == len(seen)
        stayed = {f"key_{n:02}" for n in range(40)} - {f"key_{n * 3:02}" for n in range(turn)}
        expected = sorted(stayed, reverse=newest_first)
        assert [name for name in seen if name in stayed] == expected

    async def test_a_list_of_several_pages_is_read_whole(self, store: Store) -> None:
        """A client that requests all keys gets all of them, in as many reads as needed."""
        await store.keys.add_many([(record(f"key_{n}"), "hashed") for n in range(1_201)])
        found = [each.id for each in await store.keys.list("acme", newest_first=False)]
        assert found == [f"key_{n}" for n in range(1_201)]
        assert [len(page.records) async for page in store.keys.pages("acme")] == [500, 500, 201]
        assert await store.keys.page("unknown") == Page([], None)

    async def test_a_page_ends_exactly_where_the_list_does(self, store: Store) -> None:
        """No link to an empty page."""
        await store.keys.add_many([(record(f"key_{n}"), "hashed") for n in range(4)])
        assert (await store.keys.page("acme", 4)).next_cursor is None
        assert (await store.keys.page("acme", 3)).next_cursor is not None


class TestMemory(ListingContract):
    @pytest.fixture
    def url(self) -> str:
        return "sqlite://"


class TestSQLite(ListingContract):
    @pytest.fixture
    def url(self, store_url: str) -> str:
        return store_url


class TestPostgreSQL(ListingContract):
    @pytest.fixture
    def url(self, postgres: PostgresServer) -> str:
        return postgres.new_database()


@pytest.mark.long
@settings(max_examples=40, deadline=None)
@given(
    limit=st.integers(1, 6),
    newest_first=st.booleans(),
    deleted=st.booleans(),
    meanwhile=st.lists(st.lists(st.sampled_from(["make", "delete"]), max_size=3), max_size=12),
    choice=st.randoms(use_true_random=False),
)
async def test_pages_hold_whatever_happens_meanwhile(
    limit: int, newest_first: bool, deleted: bool, meanwhile: list[list[str]], choice: Any
) -> None:
    """Any history between the pages: a key that exists throughout is listed once, in order; no key
    is listed twice; with `deleted`, deleted keys count as existing."""
    store = Store("sqlite://")
    await store.open(NOW)
    made = [f"key_{n:03}" for n in range(12)]
    await store.keys.add_many([(record(name), "hashed") for name in made])
    at_first, gone, seen = list(made), set[str](), list[str]()
    after, turns = None, iter(meanwhile)
    while True:
        page = await store.keys.page(
            "acme", limit, newest_first=newest_first, deleted=deleted, after=after
        )
        seen += [found.id for found in page.records]
        after = page.next_cursor
        if after is None:
            break
        for event in next(turns, []):
            if event == "make":
                made.append(f"key_{len(made):03}")
                await store.keys.add(record(made[-1]), "hashed")
            else:
                name = choice.choice(made)
                gone.add(name)
                await store.keys.change("acme", name, NOW, {"deleted_at": NOW, "active": False})
    stayed = at_first if deleted else [name for name in at_first if name not in gone]
    if newest_first:
        stayed = stayed[::-1]
    assert [name for name in seen if name in set(stayed)] == stayed
    assert len(set(seen)) == len(seen)
    assert seen == sorted(seen, reverse=newest_first)
    await store.close()


@pytest.mark.long
async def test_others_are_served_while_a_long_list_is_answered(engine: Engine) -> None:
    """Between any two parts of it other tasks run: no part has more than a
    hundred keys, and the whole list is never in memory."""
    keyring = await engine.keyring()
    admin_key = await keyring.create("acme", "admin_key")
    await keyring.create_many([NewKey("acme", f"key {n}") for n in range(1_300)])
    turns: list[int] = []
    parts: list[bytes] = []
    counter = 0

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            turns.append(counter)
            parts.append(message["body"])

    async def tick() -> None:
        nonlocal counter
        while True:
            counter += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    await create_app(engine)(list_scope(admin_key), _nothing_more, send)  # type: ignore[arg-type]
    ticking.cancel()
    assert len(json.loads(b"".join(parts))) == 1_301
    keys = [part.count(b'"id"') for part in parts]
    assert max(keys) == 100
    busy = [turn for turn, count in zip(turns, keys, strict=True) if count]
    assert len(set(busy)) == len(busy)


async def test_a_list_ends_when_its_client_disconnects(engine: Engine) -> None:
    """The rest of a long list is not read from the store."""
    keyring = await engine.keyring()
    admin_key = await keyring.create("acme", "admin_key")
    await keyring.create_many([NewKey("acme", f"key {n}") for n in range(1_300)])
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def disconnect() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    await create_app(engine)(list_scope(admin_key), disconnect, send)  # type: ignore[arg-type]
    assert sum(message.get("body", b"").count(b'"id"') for message in sent) <= 100


async def test_a_list_that_breaks_off_is_no_list(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store fails in the middle: the answer has no end that a client could take for one. At
    the very beginning it is a plain 503."""
    keyring = await engine.keyring()
    admin_key = await keyring.create("acme", "admin_key")
    await keyring.create_many([NewKey("acme", f"key {n}") for n in range(600)])
    page, sent = engine.store.keys.page, list[dict[str, Any]]()

    async def failing(*args: Any, after: int | None = None, **options: Any) -> Page:
        if after is None and not is_down:
            return await page(*args, after=after, **options)
        raise StoreUnavailable("the store went away")

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    monkeypatch.setattr(engine.store.keys, "page", failing)
    is_down = False
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - a server cuts the connection
        await create_app(engine)(list_scope(admin_key), _nothing_more, send)  # type: ignore[arg-type]
    assert isinstance(_first_of(caught.value), StoreUnavailable)
    assert sent[0]["status"] == 200
    assert all(message.get("more_body", True) for message in sent)
    is_down = True
    sent.clear()
    await create_app(engine)(list_scope(admin_key), _nothing_more, send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 503


def _first_of(error: BaseException) -> BaseException:
    return _first_of(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def list_scope(key: Created) -> dict[str, Any]:
    """A request for the list."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "method": "GET",
        "path": UNSENT,
        "root_path": "",
        "query_string": b"",
        "headers": [(b"authorization", f"Bearer {key.token.reveal()}".encode())],
    }


async def _nothing_more() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


@pytest.mark.long
def test_the_command_lists_as_many_as_there_are(operator: Operator) -> None:
    """Page by page, and still one JSON array or one table."""
    lines = "".join(f'{{"name": "key {n}"}}\n' for n in range(1_100))
    made = operator.run("keys", "import", "-", stdin=lines)
    ids = [json.loads(line)["id"] for line in made.stdout.splitlines()][::-1]
    listed = operator.run("keys", "list", "--json")
    assert [key["id"] for key in json.loads(listed.stdout)] == ids
    assert listed.stdout == json.dumps(json.loads(listed.stdout), indent=2) + "\n"
    some = json.loads(operator.run("keys", "list", "--json", "--limit", "600").stdout)
    assert [key["id"] for key in some] == ids[:600]
    heading, *rows = operator.run("keys", "list").stdout.splitlines()
    assert [row.split()[0] for row in rows] == ids
    assert {row.index("kl_...") for row in rows} == {heading.index("token")}


@given(st.booleans(), st.integers(1, MAX_SEQ - 1))
def test_cursors_are_as_they_are_described(newest_first: bool, place: int) -> None:
    """A client that checks what it sends by the document may send any cursor that it got."""
    for order, cursor in CURSORS.items():
        is_one = OAS31Validator(cursor.schema).is_valid(encode_cursor(place, newest_first))
        assert is_one == (order == newest_first)
