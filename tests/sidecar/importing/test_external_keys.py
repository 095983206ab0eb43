"""Lines of external keys: what they may contain, what is refused, and what is reported."""

import csv
import io
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from keylatch.core.tokens import MacKeys
from keylatch_sidecar.api.errors import Problem
from keylatch_sidecar.importing import external_keys
from tests.support import other_systems
from tests.support.command_line import SCRIPT, Operator
from tests.support.other_systems import MAKERS, ExternalKey
from tests.test_canaries import every_log_line

NATIVE = MacKeys([b"k" * 32]).mint("kl", "live").reveal()
HEX64, HEX128 = "0a" * 32, "0a" * 64
PHC = "$argon2id$v=19$m={m},t={t},p={p}$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc"
PBKDF2 = "pbkdf2_sha256${}$seasalt$oBSd886ysm3AqYun62DOdin8YcfbU1z9cksZSuLP9r0="
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

SECTION = (
    (Path(__file__).parents[3] / "README.md")
    .read_text()
    .partition("## Bring your keys")[2]
    .partition("\n## ")[0]
)

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"scheme": "md5", "hash": "x"}, "scheme: must be one of usesend, sha256, sha512, sanctum,"),
    ({"scheme": "bcrypt", "hash": "$2b$12$"}, "scheme: must be one of"),
    ({"scheme": 1, "hash": "x"}, "scheme: must be one of"),
    ({"scheme": "sha256"}, "hash: must be given, as text"),
    ({"scheme": "sha256", "hash": None}, "hash: must be given, as text"),
    ({"scheme": "sha256", "hash": True}, "hash: must be given, as text"),
    ({"scheme": "sha256", "hash": [HEX64]}, "hash: must be given, as text"),
    ({"scheme": "sha256", "hash": ""}, "hash: must be 32 bytes, as hexadecimal digits or base64"),
    ({"scheme": "sha256", "hash": HEX64[:-2]}, "hash: must be 32 bytes"),
    ({"scheme": "sha256", "hash": HEX128}, "hash: must be 32 bytes"),
    ({"scheme": "sha256", "hash": HEX64[:-1] + "g"}, "hash: must be 32 bytes"),
    ({"scheme": "sha256", "hash": "A" * 42 + "B"}, "hash: must be 32 bytes"),  # two spellings
    ({"scheme": "sha256", "hash": "\x80"}, "hash: must be 32 bytes"),
    ({"scheme": "sha256", "hash": "\ud800" * 43}, "hash: must be 32 bytes"),
    ({"scheme": "sha256", "hash": EMPTY}, "hash: is the hash of an empty token"),
    ({"scheme": "sha512", "hash": HEX64}, "hash: must be 64 bytes"),
    (
        {"scheme": "sha256", "hash": HEX64, "salt": "x"},
        "scheme: must come with hash, and with no other",
    ),
    (
        {"scheme": "sha256", "hash": HEX64, "key": "x"},
        "scheme: must come with hash, and with no other",
    ),
    ({"scheme": "usesend", "clientId": "K3J9X0A1B2", "hash": "x"}, "clientId: must match"),
    ({"scheme": "usesend", "clientId": "k3j9x0a1b2", "hash": HEX128}, "hash: must match"),
    ({"scheme": "sanctum", "tokenId": 0, "hash": HEX64}, "tokenId: must match"),
    ({"scheme": "sanctum", "tokenId": "1|x", "hash": HEX64}, "tokenId: must match"),
    ({"scheme": "knox", "tokenKey": "x" * 26, "hash": HEX128}, "tokenKey: must match"),
    ({"scheme": "django", "prefix": "a.b", "hash": PBKDF2.format(1000)}, "prefix: must match"),
    ({"scheme": "django", "prefix": "ab", "hash": "md5$x$y"}, "hash: must be one of Django's"),
    ({"scheme": "django", "prefix": "ab", "hash": "sha512$$" + HEX64}, "hash: must be 64 bytes"),
    ({"scheme": "django", "prefix": "ab", "hash": PBKDF2.format(999)}, "hash: must have 1,000 to"),
    ({"scheme": "django", "prefix": "ab", "hash": PBKDF2.format(10**8)}, "hash: must have 1,000"),
    ({"scheme": "django", "prefix": "ab", "hash": PBKDF2.format("١٠٠٠")}, "hash: must be one of"),
    ({"scheme": "argon2", "prefix": "a b", "hash": PHC.format(m=64, t=1, p=1)}, "prefix: must"),
    (
        {"scheme": "argon2", "prefix": "ab", "hash": "$argon2id$v=19$m=64"},
        "hash: must be $argon2id$v",
    ),
    ({"scheme": "argon2", "prefix": "ab", "hash": PHC.format(m=64, t=1, p=1) + "x" * 99}, "hash: "),
    (
        {"scheme": "argon2", "prefix": "ab", "hash": PHC.format(m=4 * 2**20, t=1, p=1)},
        "hash: must take 8p to 262144 KiB and 1 to 16 lanes",
    ),
    (
        {"scheme": "argon2", "prefix": "ab", "hash": PHC.format(m=2**18, t=5, p=1)},
        "hash: must take 1 pass or more, and m * t at most 1048576",
    ),
    ({"scheme": "argon2", "prefix": "ab", "hash": PHC.format(m=64, t=99_999, p=1)}, "hash: must"),
    ({"scheme": "argon2", "prefix": "ab", "hash": PHC.format(m=64, t=0, p=1)}, "hash: must take 1"),
    (
        {"scheme": "argon2", "prefix": "ab", "hash": PHC.format(m=64, t=1, p=9)},
        "hash: must take 8p",
    ),
    (
        {"scheme": "argon2", "prefix": "ab", "hash": PHC.format(m=64, t=1, p=0)},
        "hash: must take 8p",
    ),
    (
        {
            "scheme": "argon2",
            "prefix": NATIVE.rpartition("_")[0],
            "hash": PHC.format(m=64, t=1, p=1),
        },
        "prefix: is that of a token that keylatch itself mints",
    ),
    ({"scheme": "seam", "prefix": "a_b", "shortToken": "x", "hash": HEX64}, "prefix: must match"),
    ({"scheme": "seam", "prefix": "ab", "shortToken": "x_y", "hash": HEX64}, "shortToken: must"),
    ({"scheme": "raw", "key": "too-short"}, "key: must match"),
    ({"scheme": "raw", "key": "with blanks in it, and long"}, "key: must match"),
    ({"scheme": "raw", "key": "x" * 600}, "key: must match"),
    ({"scheme": "raw", "key": "abababababababababababab"}, "key: is too weak"),
    ({"scheme": "raw", "key": NATIVE}, "key: has the form of a token that keylatch itself mints"),
    (
        {"scheme": "raw", "key": "3f" * 9 + "c0ffee57a1", "hash": HEX64},
        "scheme: must come with key",
    ),
    (
        {"scheme": "raw", "key": "0123456789abcdef0123", "name": "is 0123456789abcdef0123"},
        "name: must not contain the key",
    ),
    ({"scheme": "sha256", "hash": HEX64, "name": " "}, "name: must not be empty"),
    ({"scheme": "sha256", "hash": "0b" * 32, "permission": "ROOT"}, "permission: must be one of"),
]


def test_all_mistakes_are_reported_at_once_and_no_value_is_repeated(operator: Operator) -> None:
    """Each with its line; nothing of the good line among them is taken in."""
    lines = [json.dumps({"name": "x"} | line) for line, _ in WRONG]
    good = json.dumps({"name": "good"} | other_systems.usesend().import_fields)
    outcome = operator.run("keys", "import", "-", stdin="\n".join([*lines, good]))
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    *mistakes, nothing, _ = outcome.stderr.splitlines()
    assert nothing == "error: nothing was created"
    for number, (mistake, (_, message)) in enumerate(zip(mistakes, WRONG, strict=True), start=1):
        assert mistake.startswith(f"error: line {number}: {message}")
    values = {
        str(line[name])
        for line, _ in WRONG
        for name in line
        if name not in ("scheme", "name", "permission") and len(str(line[name])) > 4
    }
    assert not [value for value in values if value in outcome.stderr]
    assert json.loads(operator.run("keys", "list", "--json").stdout) == []


def test_a_key_that_was_taken_for_a_field_is_not_repeated(operator: Operator) -> None:
    """Nor is a field of another scheme named."""
    key = other_systems.sha256()
    line = {"name": "x", key.token: "x"} | key.import_fields
    outcome = operator.run("keys", "import", "-", stdin=json.dumps(line))
    assert outcome.exit_code == 2
    assert key.token not in outcome.stderr


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=3,
)


@example("unkey", {"hash": "\x80"})
@given(
    st.sampled_from([*MAKERS, "none"]),
    st.dictionaries(
        st.sampled_from([*sorted(external_keys.FIELDS), "name", "x"]), JSON, max_size=3
    ),
)
def test_whatever_a_line_says_is_taken_or_refused(name: str, fields: dict[str, Any]) -> None:
    """With bounds that the store's columns have, and a locator that its token could have."""
    line = (
        {"scheme": name, **fields} if name == "none" else {**SAMPLES[name].import_fields, **fields}
    )
    try:
        _, origin = external_keys.parse(line, frozenset(("name",)))
    except Problem:
        return
    lengths = len(origin.hash), len(origin.locator), len(origin.partial)
    assert all(length <= most for length, most in zip(lengths, (255, 160, 32), strict=True))
    assert bool(origin.hash) != bool(origin.token)


SAMPLES = {name: maker() for name, maker in MAKERS.items()}


def lines_of(*keys: ExternalKey) -> str:
    return "".join(
        json.dumps({"name": f"old {n}"} | key.import_fields) + "\n" for n, key in enumerate(keys)
    )


def test_a_file_may_import_keys_and_request_new_ones(operator: Operator) -> None:
    """In its order: tokens for the new ones, and for the others the results of them."""
    keys = [maker() for maker in MAKERS.values()]
    typed = lines_of(*keys[:7]) + '{"name": "new"}\n' + lines_of(*keys[7:])
    outcome = operator.run("keys", "import", "-", "--batch", "3", stdin=typed)
    assert (outcome.exit_code, outcome.stderr) == (
        0,
        "Created 1 keys. The tokens are not shown again. Imported 15 keys.\n",
    )
    results = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert [each["line"] for each in results] == list(range(1, 17))
    assert [each["line"] for each in results if "token" in each] == [8]
    assert results[0] == {
        "line": 1,
        "id": results[0]["id"],
        "name": "old 0",
        "organizationId": "default",
        "permission": "FULL",
        "environment": "live",
        "expiresAt": None,
        "scheme": "usesend",
        "partialToken": keys[0].token[:13] + "...",
        "outcome": "imported",
    }
    partials = {each["id"]: each.get("partialToken") for each in results if "scheme" in each}
    listed = json.loads(operator.run("keys", "list", "--json").stdout)
    assert {
        each["id"]: each["partialToken"] for each in listed if each["id"] in partials
    } == partials
    verified = operator.run("verify", stdin=keys[5].token)
    assert verified.stderr == f"Allowed: {results[5]['id']} (FULL)\n"


def test_csv_imports_keys_too(operator: Operator) -> None:
    """With a column for each field; empty cells say nothing."""
    keys = [other_systems.usesend(), other_systems.sanctum(), other_systems.raw()]
    columns = ["name", "scheme", "clientId", "tokenId", "hash", "key"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows({"name": "old"} | key.import_fields for key in keys)
    outcome = operator.run("keys", "import", "-", "--format", "csv", stdin=text.getvalue())
    assert outcome.exit_code == 0
    assert [json.loads(line)["line"] for line in outcome.stdout.splitlines()] == [2, 3, 4]
    for key in keys:
        assert operator.run("verify", stdin=key.token).exit_code == 0


def test_an_import_may_be_repeated(operator: Operator) -> None:
    """What is here already is said to be, and the rest of the file is taken in."""
    first, second, third = other_systems.usesend(), other_systems.raw(), other_systems.knox()
    once = operator.run("keys", "import", "-", stdin=lines_of(first, second))
    ids = [json.loads(line)["id"] for line in once.stdout.splitlines()]
    operator.run("keys", "revoke", ids[1])
    again = operator.run("keys", "import", "-", stdin=lines_of(first, second, third))
    assert (again.exit_code, again.stderr) == (
        0,
        "Imported 1 keys. 2 existed already and are unchanged.\n",
    )
    results = [json.loads(line) for line in again.stdout.splitlines()]
    assert [each["id"] for each in results[:2]] == ids
    outcomes = [each["outcome"] for each in results]
    assert outcomes == ["exists", "exists, revoked", "imported"]
    assert operator.run("verify", stdin=second.token).exit_code == 1


def test_a_dry_run_says_what_would_become_of_each_line(operator: Operator) -> None:
    """And takes nothing in."""
    known, new = other_systems.usesend(), other_systems.seam()
    operator.run("keys", "import", "-", stdin=lines_of(known))
    typed = lines_of(known) + '{"name": "new"}\n' + lines_of(new)
    outcome = operator.run("keys", "import", "-", "--dry-run", stdin=typed)
    assert (outcome.exit_code, outcome.stderr) == (
        0,
        "The file has 3 keys; nothing was created.\n",
    )
    results = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert [(each["line"], each["outcome"]) for each in results] == [(1, "exists"), (3, "new")]
    assert len(json.loads(operator.run("keys", "list", "--json").stdout)) == 1


def test_a_key_that_is_in_the_file_twice_is_a_mistake(operator: Operator) -> None:
    """In two spellings too: a raw key and its own SHA-256."""
    key, other = other_systems.raw(), other_systems.usesend()
    digest = external_keys.parse(key.import_fields, frozenset())[1].locator.removeprefix("sha256:")
    twin = ExternalKey(key.token, {"scheme": "sha256", "hash": digest}, key.secret)
    outcome = operator.run("keys", "import", "-", stdin=lines_of(key, other, twin, other))
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith(
        "error: line 3: is the same key as line 1\nerror: line 4: is the same key as line 2\n"
    )


def test_the_lines_in_the_readme_import_their_keys(operator: Operator) -> None:
    """As they stand there; and each opens with the token that its system gave out."""
    lines, commands = re.findall(r"```\n(.*?)```", SECTION, re.DOTALL)
    (operator.folder / "old.jsonl").write_text(lines)
    outcome = operator.run("keys", "import", str(operator.folder / "old.jsonl"))
    assert outcome.exit_code == 0
    assert outcome.stderr in commands
    typed = re.search(r"echo (\S+) \| keylatch verify", commands)
    assert typed
    for token in (
        "us_k3j9x0a1b2_5f0c9d41a7e84b02b6c1d3f29e7a8054",
        "3ZV8fZrWZkQxjJ5yBqN2TmEd",
        "5d41402abc4b2a76b9719d911017c592a1b2c3d4",
        typed[1],
    ):
        assert operator.run("verify", stdin=token).exit_code == 0


def test_the_schemes_in_the_readme_are_the_schemes() -> None:
    """With their fields, and no others."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", SECTION, re.MULTILINE)
    documented = {scheme: tuple(re.findall(r'"(\w+)"', fields)) for scheme, fields in rows}
    assert documented == {scheme: fields for scheme, (fields, _) in external_keys._SCHEMES.items()}


@pytest.mark.long
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_report_that_cannot_be_written_is_an_error(operator: Operator) -> None:
    """The keys of that batch are in, and the import says where to go on."""
    file = operator.folder / "keys.jsonl"
    file.write_text(lines_of(*(other_systems.sha256() for _ in range(6))))
    with Path("/dev/full").open("w") as full:
        command = [str(SCRIPT), "keys", "import", str(file), "--batch", "4"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "error: the results of lines 1 to 4 could not be written: No space left" in done.stderr
    assert "they are imported; continue with --from-line 5\n" in done.stderr
    assert len(json.loads(operator.run("keys", "list", "--json").stdout)) == 4


@pytest.mark.long
@pytest.mark.parametrize("hasher", ["sha256", "argon2id"])
def test_raw_keys_leave_no_trace(operator: Operator, hasher: str) -> None:
    """Imported, used, refused and reported as mistakes: in no log, no output and no file."""
    operator.set(HASHER=hasher)
    keys = [other_systems.raw() for _ in range(5)]
    outputs = []
    with every_log_line() as log:
        for typed in (
            lines_of(*keys),
            lines_of(*keys),
            lines_of(keys[0], keys[0]),
            json.dumps({"name": keys[0].token} | keys[0].import_fields),
            json.dumps({"name": "x", "permission": "ROOT"} | keys[1].import_fields),
            json.dumps({"name": "x", "scheme": "sha256", "hash": keys[2].token[1:]}),
            json.dumps({"name": "x", "key": keys[3].token}),
        ):
            outcome = operator.run("keys", "import", "-", stdin=typed)
            outputs += [outcome.stdout, outcome.stderr]
        for key in keys:
            outcome = operator.run("verify", stdin=key.token)
            assert outcome.exit_code == 0
            outputs += [outcome.stdout, outcome.stderr]
        outputs.append(operator.run("keys", "list", "--json").stdout)
    outputs.append(log.getvalue())
    files = [path.read_bytes() for path in operator.folder.rglob("*") if path.is_file()]
    assert any(b"keylatch_keys" in content for content in files)
    everything = "\n".join(outputs).encode() + b"\n".join(files)
    for key in keys:
        for at in range(len(key.secret) - 15):
            assert key.secret[at : at + 16].encode() not in everything
