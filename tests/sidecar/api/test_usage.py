"""The usage report of a key: over HTTP, on the command line, and its clients."""

import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keylatch.asgi import APIKeyMiddleware as ASGIMiddleware
from keylatch.management.keyring import Created
from keylatch.usage.client_info import family_of, network_of
from keylatch.wsgi import APIKeyMiddleware as WSGIMiddleware
from tests.project.test_docs import README
from tests.support.clock import Clock
from tests.support.command_line import Operator
from tests.support.engines import MakeEngine
from tests.support.raw_http import asgi_request
from tests.support.servers import eventually
from tests.support.sidecars import Sidecar, sidecar_on
from tests.test_wsgi import bearer, call, echo

KEYS = "/v1/api-keys"


@pytest.mark.long
def test_uses_are_reported_by_day(sidecar: Sidecar, client: httpx.Client) -> None:
    """The calls with a key, with some seconds' delay; another key's are its own."""
    organization = client.get(KEYS).json()[0]["organizationId"]
    key = sidecar.create(organization, "ci", permission="SENDING")
    path = f"{KEYS}/{key.record.id}/usage"
    assert client.get(path).json() == {
        "id": key.record.id,
        "lastUsed": None,
        "total": {"allowed": 0, "refused": {}},
        "days": [],
        "client": None,
    }
    with sidecar.client(key) as sending:
        for _ in range(3):
            assert sending.get("/verify").status_code == 200
            assert sending.get("/verify?permission=READING").status_code == 403
        assert client.delete(f"{KEYS}/{key.record.id}").status_code == 200
        assert sending.get("/verify").status_code == 401
    total = {"allowed": 3, "refused": {"INSUFFICIENT_SCOPE": 3, "REVOKED": 1}}
    eventually(lambda: client.get(path).json()["total"] == total)
    answer = client.get(path)
    report = answer.json()
    assert answer.headers["cache-control"] == "no-store"
    assert report["days"] == [{"day": "2027-01-15", **total}]
    assert report["lastUsed"] == "2027-01-15T08:00:00.000Z"


@pytest.mark.parametrize("days", ["", "0", "-1", "401", "1e1", "ten", " 1", "١", "1&days=2"])
def test_days_that_are_none(client: httpx.Client, admin_key: Created, days: str) -> None:
    """400, and the parameter is named."""
    answer = client.get(f"{KEYS}/{admin_key.record.id}/usage?days={days}")
    assert answer.status_code == 400
    assert answer.json()["message"] == "days: must be a number of days from 1 to 400"


def test_foreign_unknown_and_malformed_ids_look_the_same(
    sidecar: Sidecar, client: httpx.Client
) -> None:
    """404, byte for byte as for the key itself; and the caller needs FULL."""
    other_key = sidecar.create()
    ids = [other_key.record.id, "key_unknown", "", "%00", "a/b", "..%2F..", "usage"]
    answers = [client.get(f"{KEYS}/{each}/usage") for each in ids]
    answers.append(client.get(f"{KEYS}/key_unknown"))
    assert {(answer.status_code, answer.content) for answer in answers} == {
        (404, answers[0].content)
    }
    organization = client.get(KEYS).json()[0]["organizationId"]
    with sidecar.client(sidecar.create(organization, permission="SENDING")) as sending:
        assert sending.get(f"{KEYS}/{other_key.record.id}/usage").status_code == 403


@pytest.mark.long
def test_idle_keys_are_a_list_like_any_other(clock: Clock, store_url: str) -> None:
    """A bare array, in pages with `limit`, and the link keeps the query."""
    with sidecar_on(store_url, clock) as sidecar:
        admin_key = sidecar.create("acme", "admin_key")
        idle = [sidecar.create("acme", f"idle {n}").record.name for n in range(3)]
        clock.tick(31 * 86_400)
        new = sidecar.create("acme", "new")
        with sidecar.client(admin_key) as client:
            # The admin key's own calls are uses; the store knows of them within a second.
            eventually(
                lambda: [k["name"] for k in client.get(f"{KEYS}?idle=30").json()] == idle[::-1]
            )
            assert client.get(f"{KEYS}?idle=32").json() == []
            page = client.get(f"{KEYS}?idle=030&limit=2")
            assert [key["name"] for key in page.json()] == idle[:0:-1]
            assert re.fullmatch(
                r'<\?limit=2&cursor=[\w-]{12}&idle=30>; rel="next"', page.headers["link"]
            )
            rest = client.get(str(page.url.join(page.links["next"]["url"])))
            assert [key["name"] for key in rest.json()] == idle[:1]
            for days in ("", "0", "10000", "x", "1&idle=2"):
                answer = client.get(f"{KEYS}?idle={days}")
                assert answer.status_code == 400
                assert answer.json()["message"] == "idle: must be a number of days from 1 to 9999"
        assert new.record.name not in idle


def section() -> str:
    return README.partition("## Who uses a key")[2].partition("\n## ")[0]


def test_the_example_in_the_readme(operator: Operator) -> None:
    """The commands that it names, and the answer that it shows, but for ids and times."""
    key = operator.create()
    operator.run("verify", stdin=key["token"])
    operator.run("verify", stdin=key["token"])
    operator.run("keys", "revoke", key["id"])
    operator.run("verify", stdin=key["token"])
    [shown] = re.findall(r"```json\n(.*?)```", section(), re.DOTALL)
    report = json.loads(operator.run("keys", "usage", key["id"], "--json").stdout)
    assert without_times(report) == without_times(json.loads(shown))
    table = operator.run("keys", "usage", key["id"]).stdout
    assert re.search(r"\d{4}-\d\d-\d\d +2 +REVOKED 1", table)
    assert "keylatch keys usage" in section()
    assert "keylatch keys list --idle 90" in section()
    assert operator.run("keys", "list", "--idle", "90", "--json").stdout == "[]\n"


def without_times(content: Any) -> Any:
    text = re.sub(r"\d{4}-\d\d-\d\d(T[\d:.]*Z)?", "then", json.dumps(content, sort_keys=True))
    return re.sub(r"key_\w{12}", "key_1", text)


def test_the_command_says_what_is_wrong(operator: Operator) -> None:
    """An unknown key is 1, a number of days that is none 2."""
    key = operator.create()
    assert operator.run("keys", "usage", "key_unknown").exit_code == 1
    assert operator.run("keys", "usage", key["id"], "--organization", "rival").exit_code == 1
    assert operator.run("keys", "usage", key["id"], "--days", "401").exit_code == 2
    assert operator.run("keys", "list", "--idle", "0").exit_code == 2
    assert "last used: never" in operator.run("keys", "usage", key["id"]).stdout


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("203.0.113.77", "203.0.113.0/24"),
        ("2001:db8:7:8::9", "2001:db8:7::/48"),
        ("::ffff:203.0.113.77", "203.0.113.0/24"),
        ("fe80::1%eth0", "fe80::/48"),
        ("127.0.0.1", "127.0.0.0/24"),
        *((no, None) for no in (None, "", "testclient", "1.2.3", "203.0.113.77:80", "9" * 500)),
    ],
)
def test_of_an_address_its_network_is_kept(host: str | None, network: str | None) -> None:
    """256 neighbours, or an IPv6 site; what is no address is nothing."""
    assert network_of(host) == network


@pytest.mark.parametrize(
    ("agent", "family"),
    [
        ("curl/8.5.0", "curl"),
        ("python-httpx/0.28.1", "python-httpx"),
        ("Mozilla/5.0 (X11; jane@example.test) Gecko/20100101", "Mozilla"),
        ("Go-http-client/1.1", "Go-http-client"),
        ("bot", "bot"),
        *((no, None) for no in (None, "", " ", "(jane)", "7", "a" * 33 + "/1", "käse/1", "a@b/1")),
        ("kl_live_secret_secret_secret_secret_secret_x/1", None),
    ],
)
def test_of_a_user_agent_the_first_products_name_is_kept(
    agent: str | None, family: str | None
) -> None:
    """Never free text: what does not look like a name is nothing."""
    assert family_of(agent) == family


@given(st.text(), st.text())
def test_nothing_else_comes_through(host: str, agent: str) -> None:
    """Whatever servers and clients say."""
    family = family_of(agent)
    assert family is None or re.fullmatch(r"[A-Za-z][A-Za-z0-9._+-]{0,31}", family)
    network = network_of(host)
    assert network is None or network.endswith(("/24", "/48"))


def clients_in(store_url: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(store_url.removeprefix("sqlite:///"))) as connection:
        rows: list[tuple[Any, ...]] = connection.execute(
            "SELECT network, product FROM keylatch_clients"
        ).fetchall()
    return rows


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.anyio
@pytest.mark.parametrize("clients", [True, False])
async def test_clients_are_kept_only_if_one_says_so(
    make_engine: MakeEngine, store_url: str, clients: bool
) -> None:
    """Over ASGI: the first of many between two flushes, in one row; by default nothing at all."""
    engine = make_engine(clients=clients)
    key = await (await engine.keyring()).create("acme", "ci")
    protected = ASGIMiddleware(app, engine=engine)
    sent = [
        (b"authorization", f"Bearer {key.token.reveal()}".encode()),
        (b"user-agent", b"curl/8.5.0 (jane)"),
    ]
    for _ in range(5):
        assert (await asgi_request(protected, "/", sent)).status == 200
    await engine.stop()
    kept = clients_in(store_url)
    assert kept == ([("127.0.0.0/24", "curl")] if clients else [])


@pytest.mark.parametrize("clients", [True, False])
def test_clients_over_wsgi(make_engine: MakeEngine, store_url: str, clients: bool) -> None:
    """The same words, and only of accepted requests."""
    engine = make_engine(clients=clients)
    protected = WSGIMiddleware(echo, engine=engine)
    keyring = protected._portal.run(engine.keyring())
    key = protected._portal.run(keyring.create("acme", "ci"))
    whence = {"REMOTE_ADDR": "2001:db8:7:8::9", "HTTP_USER_AGENT": "Mozilla/5.0 (jane)"}
    assert call(protected, HTTP_AUTHORIZATION=bearer(key), **whence)[0] == 200
    assert call(protected, HTTP_AUTHORIZATION="Bearer x", **whence)[0] == 401
    protected.close()
    kept = clients_in(store_url)
    assert kept == ([("2001:db8:7::/48", "Mozilla")] if clients else [])


@pytest.mark.long
def test_the_clients_of_a_key_are_reported(clock: Clock, store_url: str) -> None:
    """Of the sidecar's own clients; a request of a proxy does not name the proxy's client."""
    with sidecar_on(store_url, clock, clients=True) as sidecar:
        admin_key, used = sidecar.create("acme", "admin_key"), sidecar.create("acme", "used")
        with sidecar.client(admin_key) as client, sidecar.client(used) as proxy:
            assert proxy.get("/verify").status_code == 200
            path = f"{KEYS}/{admin_key.record.id}/usage"
            client.get(path, headers={"User-Agent": "python-httpx/0.28.1"})
            eventually(lambda: client.get(path).json()["client"] is not None)
            assert client.get(path).json()["client"] == {
                "address": "127.0.0.0/24",
                "agent": "python-httpx",
                "seenAt": "2027-01-15T08:00:00.000Z",
            }
            report = client.get(f"{KEYS}/{used.record.id}/usage").json()
            assert (report["client"], report["total"]["allowed"]) == (None, 1)


def test_the_word_on_privacy_is_in_the_documents() -> None:
    """The description says what is stored, and for how long."""
    security = (Path(__file__).parents[3] / "SECURITY.md").read_text()
    for word in ("/24", "/48", "90 days", "KEYLATCH_CLIENTS"):
        assert word in security
        assert word in section()
