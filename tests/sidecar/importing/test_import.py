"""Many keys at once: what a batch promises, what a file may say, and what the import prints."""

import asyncio
import json
import sqlite3
import subprocess
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from keylatch.authentication.hashing import CHEAPEST, Hasher
from keylatch.core.decisions import Allow, Deny, Reason, principal_of
from keylatch.core.tokens import MacKeys, Token, has_valid_checksum
from keylatch.engine import Engine
from keylatch.errors import InvalidValue, StoreUnavailable
from keylatch.management.keyring import Keyring, NewKey
from keylatch.storage.store import Found, Store
from keylatch_sidecar.cli.key_import import warn_of_hashing_cost
from keylatch_sidecar.importing.batches import BatchFailed, import_batches
from keylatch_sidecar.importing.file import NumberedKey
from tests.storage.test_store import NOW, record
from tests.support.clock import Clock
from tests.support.command_line import SCRIPT, Operator, Result
from tests.support.engines import MakeEngine
from tests.support.servers import PostgresServer
from tests.support.stores import StoreTests

pytestmark = pytest.mark.anyio


class Foreseen(MacKeys):
    """Mints a token that was already presented."""

    def __init__(self, token: Token) -> None:
        super().__init__([b"k" * 32])
        self.token = token

    def mint(self, prefix: str, environment: str, key_id: str | None = None) -> Token:
        return self.token


def forbidden_store(engine: Engine) -> None:
    """From here on a look-up in the store fails the test."""

    async def find(key_id: str, anchor: int = 0) -> Found:
        raise AssertionError("the store was asked")

    engine.store.keys.find = find  # type: ignore[method-assign]


class ImportContract(StoreTests):
    """What both databases promise of a batch."""

    @pytest.fixture
    async def engines(self, url: str, make_engine: MakeEngine) -> AsyncIterator[list[Engine]]:
        engines = [make_engine(store=Store(url)) for _ in range(2)]
        for engine in engines:
            await engine.start()
        yield engines
        for engine in engines:
            await engine.stop()

    async def test_each_key_of_a_batch_is_found_whole_and_listed_in_order(
        self, store: Store
    ) -> None:
        """As if they had been made one after the other, new organisations on the way."""
        made = [(record(f"key_{n}", f"org{n % 3}"), f"hash {n}") for n in (5, 3, 8, 1, 6)]
        _, seq = await store.keys.add_many(made)
        for each, hashed in made:
            assert await store.keys.find(each.id) == Found(each, hashed, seq)
        listed = await store.keys.list("org2", newest_first=False)
        assert [each.id for each in listed] == ["key_5", "key_8"]

    async def test_a_batch_is_one_line_of_the_log(self, store: Store) -> None:
        """A million keys leave no million tombstones, and every key has a number of its own."""
        before = (await store.invalidations.since(0)).seq
        _, seq = await store.keys.add_many([(record(f"key_{n}"), "hashed") for n in range(2_500)])
        assert seq == before + 2_500
        changes = await store.invalidations.since(before)
        assert changes.is_complete
        assert [row[:3] for row in changes.invalidations] == [(seq, None, "")]
        _, later = await store.keys.add(record("key_later"), "hashed")
        [row] = (await store.invalidations.since(seq)).invalidations
        assert row[:3] == (later, "key_later", None)

    async def test_a_batch_may_be_repeated(self, store: Store) -> None:
        """A client that lost the answer of the commit retries, and makes no second change."""
        made = [(record(f"key_{n}"), f"hash {n}") for n in range(3)]
        _, seq = await store.keys.add_many(made)
        assert (await store.keys.add_many(made))[1] == seq
        assert (await store.invalidations.since(0)).seq == seq

    async def test_all_or_none(self, store: Store) -> None:
        """One key that cannot be created fails its batch, and no invalidation is written."""
        await store.keys.add(record("key_taken"), "hashed")
        before = await store.invalidations.since(0)
        made = [(record("key_1", "new"), "hashed"), (record("key_taken"), "other")]
        with pytest.raises(StoreUnavailable):
            await store.keys.add_many([*made, (record("key_2"), "hashed")])
        assert await store.invalidations.since(0) == before
        assert await store.keys.list("new") == []

    async def test_an_import_replaces_cached_negative_entries(
        self, engines: list[Engine], clock: Clock
    ) -> None:
        """A process that has just refused the token as unknown accepts it after the import, and
        what it knows of keys that exist is as good as before: no look-up, no argon2."""
        assert await self._cached(engines, clock) == (True, True)

    async def test_a_batch_without_an_invalidation_would_be_refused(
        self, engines: list[Engine], clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The broken twin: it advances the sequence number; its row names another key."""
        monkeypatch.setattr("keylatch.storage.keys.NO_ID", "another-key")
        assert await self._cached(engines, clock) == (False, True)

    async def test_a_batch_that_invalidated_every_key_would_empty_the_caches(
        self, engines: list[Engine], clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The other twin: every process would ask the store, and argon2, for every key anew."""
        monkeypatch.setattr("keylatch.storage.keys.NO_ID", None)
        assert await self._cached(engines, clock) == (True, False)

    async def _cached(self, engines: list[Engine], clock: Clock) -> tuple[bool, bool]:
        """Whether a process with a negative entry accepts the imported key, and whether its
        cached entry of another key is still used."""
        importer, process = engines
        keyring = await importer.keyring()
        known = (await keyring.create("acme", "known")).token
        await process._freshness.poll()  # else the look-up is older than the row of its creation
        assert isinstance(await process.authenticator.check_token(known), Allow)
        token = keyring._mac_keys.mint("kl", "live")
        assert await process.authenticator.check_token(token) == Deny(Reason.UNKNOWN)
        settings = importer.settings
        assert importer._opened is not None
        foreseeing = Keyring(
            *(importer.store, importer.hasher, Foreseen(token), settings),
            *(importer.now_ms, importer._opened.propagation),
        )
        await foreseeing.create_many([NewKey("acme", "foreseen")])
        clock.tick(2)  # on PostgreSQL: no lease is older than the import
        believed = isinstance(await process.authenticator.check_token(token), Allow)
        forbidden_store(process)
        return believed, isinstance(process.authenticator.check_token_cached(known), Allow)

    async def test_the_command_imports_into_this_store(self, url: str, operator: Operator) -> None:
        """Its tokens, and no others, open what its lines say; each batch is printed."""
        operator.set(STORE=url)
        lines = [
            {"name": f"customer {n}", "organization": f"org{n % 2}", "permission": "SENDING"}
            for n in range(25)
        ]
        text = "\n".join(json.dumps(line) for line in lines)
        # In threads: the command has an event loop of its own.
        outcome = await _in_thread(operator, "keys", "import", "-", "--batch", "10", stdin=text)
        assert (outcome.exit_code, outcome.stderr) == (
            0,
            "Created 25 keys. The tokens are not shown again.\n",
        )
        made = [json.loads(line) for line in outcome.stdout.splitlines()]
        assert [each["line"] for each in made] == list(range(1, 26))
        assert [each["name"] for each in made] == [line["name"] for line in lines]
        verified = await _in_thread(
            operator, "verify", "--permission", "SENDING", stdin=made[17]["token"]
        )
        assert (verified.exit_code, verified.stderr) == (
            0,
            f"Allowed: {made[17]['id']} (SENDING)\n",
        )
        store = Store(url)
        await store.open(NOW)
        listed = await store.keys.list("org1", newest_first=False)
        assert [each.id for each in listed] == [each["id"] for each in made[1::2]]
        await store.close()


class TestSQLite(ImportContract):
    """On a file."""

    @pytest.fixture
    def url(self, store_url: str) -> str:
        return store_url


class TestPostgreSQL(ImportContract):
    """On a real PostgreSQL."""

    @pytest.fixture
    def url(self, postgres: PostgresServer) -> str:
        return postgres.new_database()


async def _in_thread(operator: Operator, *words: str, stdin: str) -> Result:
    return await asyncio.to_thread(operator.run, *words, stdin=stdin)


# What a file may say

JSON_LINES = """\
{"name": "ci, main", "organization": "acme", "permission": "SENDING", "environment": "test"}

{"name": " Schlüssel ", "expiresAt": "2100-01-01T00:00:00+01:00"}
{"name": "laptop", "organizationId": "acme", "expires": null}
"""
CSV = """\
\ufeffname,organization,permission,environment,expires\r
"ci, main",acme,SENDING,test,\r
\r
" Schlüssel ",,,,2100-01-01T00:00:00+01:00\r
laptop,acme,,,\r
"""


@pytest.mark.parametrize(
    ("name", "text", "first"), [("keys.jsonl", JSON_LINES, 1), ("keys.CSV", CSV, 2)]
)
def test_a_file_says_what_keys_to_make(
    operator: Operator, name: str, text: str, first: int
) -> None:
    """JSON lines or CSV by the file's name; options count for what a line leaves out."""
    file = operator.folder / name
    file.write_text(text, newline="")
    made = operator.run("keys", "import", str(file), "--organization", "rest")
    assert made.exit_code == 0
    assert made.stdout.isascii()
    lines = [json.loads(line) for line in made.stdout.splitlines()]
    assert all(has_valid_checksum(line.pop("token")) for line in lines)
    assert all(line.pop("id") in made.stdout for line in lines)
    plain = {"permission": "FULL", "environment": "live", "expiresAt": None}
    expected = [
        {"name": "ci, main", "organizationId": "acme", "permission": "SENDING"}
        | {"environment": "test", "expiresAt": None},
        plain
        | {"name": "Schlüssel", "organizationId": "rest", "expiresAt": "2099-12-31T23:00:00.000Z"},
        plain | {"name": "laptop", "organizationId": "acme"},
    ]
    assert lines == [
        {"line": line} | fields
        for line, fields in zip((first, first + 2, first + 3), expected, strict=True)
    ]


WRONG = {
    '{"name": ""}': "name: must not be empty or blank",
    '{"name": 1}': "name: Input should be a valid string",
    '{"nme": "x", "name": "x"}': "nme: is no field of this body",
    "{}": "name: Field required",
    "[]": "is not a JSON object",
    "name": "is not JSON",
    "[" * 3_000: "is not JSON",
    '{"name": "' + "x" * 20_000 + '"}': "has more than 16384 characters",
    '{"name": "x", "name": "y"}': "name: is there twice",
    '{"name": "x", "expires": null, "expiresAt": null}': "expiresAt: is there twice, as expires",
    '{"name": "x", "organization": "a b"}': "organization: must match",
    '{"name": "x", "organization": ""}': "organization: must match",
    '{"name": "x", "permission": "ROOT"}': "permission: must be one of FULL, SENDING",
    '{"name": "x", "environment": "LIVE"}': "environment: must match",
    '{"name": "x", "expiresAt": "2001-01-01T00:00:00Z"}': "expiresAt: must lie in the future",
    '{"name": "x", "expiresAt": "tomorrow"}': "expiresAt: must be an ISO 8601 time",
    '{"name": "x", "expiresAt": 4102444800}': "expiresAt: must be an ISO 8601 time",
    '{"name": "x", "token": "us_0123456789_0"}': "token: an imported key needs a",
    '{"name": "x", "hash": "$argon2id$v=19$"}': "hash: an imported key needs a",
}


def test_all_mistakes_are_reported_at_once_and_nothing_is_made(operator: Operator) -> None:
    """Each with its line; good lines among them are not made either, and no value is repeated."""
    text = "\n".join(['{"name": "good"}', *WRONG, '{"name": "good"}'])
    outcome = operator.run("keys", "import", "-", stdin=text)
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    *mistakes, nothing, hint = outcome.stderr.splitlines()
    assert nothing == "error: nothing was created"
    assert hint.startswith("hint: ")
    for line, (mistake, message) in enumerate(zip(mistakes, WRONG.values(), strict=True), start=2):
        assert mistake.startswith(f"error: line {line}: {message}")
    assert "us_0123456789" not in outcome.stderr
    assert json.loads(operator.run("keys", "list", "--json").stdout) == []


def test_a_line_may_have_several_mistakes(operator: Operator) -> None:
    """One run reports all of them."""
    text = '{"name": " ", "permission": "ROOT", "environment": "L", "organization": "/"}'
    outcome = operator.run("keys", "import", "-", stdin=text)
    kinds = [line.split(": ")[2] for line in outcome.stderr.splitlines()[:-2]]
    assert sorted(kinds) == ["environment", "name", "organization", "permission"]


def test_a_screenful_of_mistakes_is_enough(operator: Operator) -> None:
    """With a wrong file, not each of its million lines is reported."""
    outcome = operator.run("keys", "import", "-", stdin="x\n" * 1_234)
    assert len(outcome.stderr.splitlines()) == 53
    assert "error: and 1,184 more mistakes\n" in outcome.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acme,ci\nacme,laptop\n", "line 1: is not a header"),
        ("", "line 1: is not a header"),
        ("name,organization\nci\n", "line 2: has 1 cells for 2 columns"),
        ("name,hash\nci,x\n", "line 2: hash: an imported key needs"),
        ("name,name\nci,ci\n", "line 2: name: is there twice"),
        ("name,colour\nci,red\n", "line 2: colour: is no field"),
        ('name\n"ci\nlaptop\n', "is not CSV"),
    ],
)
def test_csv_that_is_none(operator: Operator, text: str, message: str) -> None:
    """The line is named here too."""
    outcome = operator.run("keys", "import", "-", "--format", "csv", stdin=text)
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith("error: ")
    assert message in outcome.stderr


def test_a_token_in_a_file_gets_nowhere(operator: Operator) -> None:
    """Not as a name, not as a field, and into no message."""
    token = operator.create()["token"]
    for line in ({"name": token}, {"name": "x", token: 1}, {"name": "x", "organization": token}):
        outcome = operator.run("keys", "import", "-", stdin=json.dumps(line))
        assert (outcome.exit_code, outcome.stdout) == (2, "")
        assert token not in outcome.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.jsonl"], "the file cannot be read: No such file"),
        (["."], "the file cannot be read: Is a directory"),
        (["-", "--format", "xml"], "there is no such format"),
    ],
)
def test_no_such_file(operator: Operator, words: list[str], message: str) -> None:
    """With a hint."""
    outcome = operator.run("keys", "import", *words)
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert message in outcome.stderr
    assert "hint: " in outcome.stderr


def test_bytes_that_are_no_text_are_no_name(operator: Operator) -> None:
    """A file in another encoding is refused, instead of making keys with broken names."""
    file = operator.folder / "latin.csv"
    file.write_bytes(b"name\nSchl\xfcssel\n")
    outcome = operator.run("keys", "import", str(file))
    assert outcome.stderr.startswith("error: line 2: name: must not hold control characters\n")


def test_a_dry_run_makes_nothing(operator: Operator) -> None:
    """It checks the file, and says how many keys it has."""
    outcome = operator.run("keys", "import", "-", "--dry-run", stdin='{"name": "x"}\n' * 3)
    assert outcome == Result(0, "", "The file has 3 keys; nothing was created.\n")
    assert json.loads(operator.run("keys", "list", "--json").stdout) == []


def test_an_import_goes_on_from_a_line(operator: Operator) -> None:
    """Whatever ended the last one."""
    text = "".join(f'{{"name": "key {n}"}}\n' for n in range(1, 8))
    outcome = operator.run("keys", "import", "-", "--from-line", "6", stdin=text)
    names = [json.loads(line)["name"] for line in outcome.stdout.splitlines()]
    assert names == ["key 6", "key 7"]


@pytest.mark.long
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_tokens_that_cannot_be_written_are_reported(operator: Operator) -> None:
    """The import stops after that batch, and names the lines whose tokens were not delivered."""
    file = operator.folder / "keys.jsonl"
    file.write_text('{"name": "x"}\n' * 30)
    with Path("/dev/full").open("w") as full:
        command = [str(SCRIPT), "keys", "import", str(file), "--batch", "10"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "error: the tokens of lines 1 to 10 could not be written: No space left" in done.stderr
    assert "--from-line 1\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(json.loads(operator.run("keys", "list", "--json").stdout)) == 10


def test_a_store_that_fails_halfway_is_reported_with_the_line_to_go_on_from(
    operator: Operator,
) -> None:
    """What was printed is there; the rest is not."""
    operator.create()
    with closing(sqlite3.connect(operator.database, isolation_level=None)) as raw:
        raw.execute(
            "CREATE TRIGGER no_more BEFORE INSERT ON keylatch_keys WHEN new.name = 'key 6'"
            " BEGIN SELECT raise(ABORT, 'no more'); END"
        )
    text = "".join(f'{{"name": "key {n}"}}\n' for n in range(1, 8))
    outcome = operator.run("keys", "import", "-", "--batch", "2", stdin=text)
    assert outcome.exit_code == 2
    assert len(outcome.stdout.splitlines()) == 4
    assert "error: lines 5 to 6 were not created: the store failed: no more\n" in outcome.stderr
    assert "continue with --from-line 5\n" in outcome.stderr
    assert len(json.loads(operator.run("keys", "list", "--json").stdout)) == 5


async def test_a_batch_with_an_invalid_value_names_it(engine: Engine) -> None:
    """A row that became invalid after the file was read, such as by its expiry: the import says
    which field, and to correct the file."""
    rows = [NumberedKey(4, NewKey("acme", "ok")), NumberedKey(5, NewKey("acme", " "))]
    with pytest.raises(BatchFailed, match=r"^name: must not be empty") as failed:
        async for _ in import_batches(await engine.keyring(), rows, 10):
            pass
    assert (failed.value.first_line, failed.value.last_line) == (4, 5)
    assert (failed.value.message, failed.value.hint) == (str(failed.value), "correct the file")


def test_the_cost_of_argon2id_is_reported_before_the_import(
    operator: Operator, capsys: pytest.CaptureFixture[str]
) -> None:
    """A million keys take seven hours; a few are not worth a word."""
    warn_of_hashing_cost(1_000_000, "argon2id")
    assert "417 processor minutes" in capsys.readouterr().err
    warn_of_hashing_cost(100, "argon2id")
    warn_of_hashing_cost(1_000_000, "sha256")
    assert capsys.readouterr().err == ""


async def test_keys_share_the_words_that_they_have_in_common(engine: Engine) -> None:
    """A cache of many keys holds each organisation, permission and environment once."""
    await (await engine.keyring()).create_many([NewKey("acme", f"key {n}") for n in range(3)])
    principals = [principal_of(record) for record in await engine.store.keys.list("acme")]
    for field in ("organization_id", "permission", "environment"):
        assert len({id(getattr(principal, field)) for principal in principals}) == 1


async def test_argon2id_hashes_a_batch_without_filling_the_queue(
    make_engine: MakeEngine,
) -> None:
    """More keys than the queue has places; a check in the meantime finds one."""
    engine = make_engine(hasher=Hasher("argon2id", CHEAPEST, workers=2, queue=1))
    keyring = await engine.keyring()
    made = await keyring.create_many([NewKey("acme", f"key {n}") for n in range(12)])
    for each in made:
        assert isinstance(await engine.authenticator.check_token(each.token), Allow)
    assert await keyring.create_many([]) == []
    with pytest.raises(InvalidValue, match="permission"):
        await keyring.create_many([NewKey("acme", "good"), NewKey("acme", "bad", "ROOT")])
    assert len(await keyring.list("acme")) == 12
    await engine.stop()
