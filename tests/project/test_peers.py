"""The comparison with keylatch's peers: its parts, and keylatch's own apps, but no peer."""

import asyncio
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from starlette.testclient import TestClient
from werkzeug.test import Client

from catalogue import PEERS, NotMeasured, Peer
from findings import as_tables, finding, read, write
from keylatch import Engine, Settings
from rounds import per_second
from serving import APPS, fetch, serving

pytestmark = pytest.mark.long

README = APPS.parent / "README.md"
BY_NAME = {peer.name: peer for peer in PEERS}
WRK = """Running 1s test @ http://127.0.0.1:8000/open
  1 threads and 16 connections
  28012 requests in 1.00s, 3.21MB read
{}Requests/sec:  28001.52
Transfer/sec:      3.20MB
"""


@pytest.fixture
def header(store_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A key in the store that the apps are configured with."""
    monkeypatch.setenv("KEYLATCH_STORE", store_url)
    monkeypatch.setenv("KEYLATCH_HASHER", "sha256")

    async def created() -> str:
        engine = Engine(Settings.load(store=store_url, redis="", hasher="sha256"))
        key = await (await engine.keyring()).create("default", "me")
        await engine.stop()
        return key.token.reveal()

    return f"Bearer {asyncio.run(created())}"


def loaded(name: str) -> ModuleType:
    """A peer's file, as its server loads it."""
    spec = importlib.util.spec_from_file_location(name, APPS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["keylatch_starlette", "keylatch_fastapi"])
def test_the_asgi_apps_check_keys(name: str, header: str) -> None:
    """`/open` is for all, `/protected` for the key; both say the same."""
    with TestClient(loaded(name).app) as client:
        assert client.get("/protected").status_code == 401
        answers = [client.get("/open"), client.get("/protected", headers={"Authorization": header})]
        assert {(answer.status_code, answer.text.strip('"')) for answer in answers} == {
            (200, "hello")
        }


@pytest.fixture
def flask_app() -> Iterator[ModuleType]:
    module = loaded("keylatch_flask")
    yield module
    module.guarded.close()


def test_the_wsgi_app_checks_keys(header: str, flask_app: ModuleType) -> None:
    """`/open` is for all, `/protected` for the key; both say the same."""
    client = Client(flask_app.app)
    assert client.get("/protected").status_code == 401
    answers = [client.get("/open"), client.get("/protected", headers={"Authorization": header})]
    assert {(answer.status_code, answer.text) for answer in answers} == {(200, "hello")}


def test_a_server_serves_until_it_is_let_go(tmp_path: Path, store_url: str) -> None:
    """A peer is started with a key and looked at; afterwards the port is closed."""
    with serving(BY_NAME["keylatch_drf"], Path(sys.executable), tmp_path, store_url) as server:
        assert fetch(server, "/protected", server.header) == "200 hello"
    with pytest.raises(OSError, match="refused"):
        fetch(server, "/open")


def test_a_peer_that_cannot_be_served_says_why(tmp_path: Path, store_url: str) -> None:
    """The others go on: this is an answer, not the end."""
    peer = Peer("missing", "missing", "Flask", "gunicorn", ("missing==1.0",))
    with (
        pytest.raises(NotMeasured, match=r"makes no key.*missing\.py"),
        serving(peer, Path(sys.executable), tmp_path, store_url),
    ):
        pass


def test_every_peer_is_described() -> None:
    """The table of the README names every file, with the version that is installed at least."""
    rows = {
        row[1]: row[0]
        for row in re.finditer(r"^\| `(\w+)` \|.*$", README.read_text(), re.MULTILINE)
    }
    assert set(rows) == {peer.file for peer in PEERS}
    assert set(rows) | {"django_project"} == {file.stem for file in APPS.glob("*.py")}
    for peer in PEERS:
        cells = [cell.strip() for cell in rows[peer.file].split("|")]
        assert peer.revoked == cells[4]
        assert peer.last_used == cells[5]
        assert cells[6].startswith(peer.scopes)
        for package in peer.packages[:1]:
            assert re.split("[>=]=", package)[1] in cells[3]


def test_only_good_answers_are_counted() -> None:
    """A refusal, an error of the network, or no answer at all is no speed."""
    assert per_second(WRK.format("")) == 28001.52
    for trouble in (
        "  Non-2xx or 3xx responses: 3\n",
        "  Socket errors: connect 0, read 0, write 0, timeout 2\n",
    ):
        with pytest.raises(NotMeasured, match=trouble.strip()):
            per_second(WRK.format(trouble))
    with pytest.raises(NotMeasured, match="no answer"):
        per_second("Requests/sec:      0.00\n")


def test_ratios_are_taken_round_by_round(tmp_path: Path) -> None:
    """Then comes the median; the JSON gives it all back."""
    slow, fast = (
        finding(BY_NAME["drf_knox"], {"Django": "5.2"}, [(100.0, 50.0), (10.0, 9.0), (4.0, 1.0)]),
        finding(BY_NAME["keylatch_drf"], {}, [(100.0, 95.0)]),
    )
    assert (slow.ratio, slow.open, slow.protected) == (0.5, 10.0, 9.0)
    write(tmp_path / "peers.json", [slow, fast], {"missing": "no wheel"}, seconds=1)
    found, failed = read(tmp_path / "peers.json")
    assert [each.name for each in found] == ["keylatch_drf", "drf_knox"]
    assert (found[1].ratios, failed) == (slow.ratios, {"missing": "no wheel"})
    assert len(as_tables(found).renderables) == 2
