"""`keylatch scan`: every token in a file is found, whatever stands around it, and none is shown."""

import itertools
import json
import os
import re
import shutil
import sqlite3
import string
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keylatch.core.tokens import SCAN_PATTERN, MacKeys, Token
from keylatch.management.keyring import Created
from keylatch_sidecar.operations.scanner import MAX_BYTES, Scanner, _tokens_in_chunks, tokens_in
from tests.support.command_line import SCRIPT, Operator, Result
from tests.support.servers import eventually, require_program
from tests.support.sidecars import Sidecar

ROOT = Path(__file__).parents[3]
KEYS = MacKeys([b"n" * 32])
minted = st.builds(
    KEYS.mint,
    st.from_regex(r"[a-z][a-z0-9]{1,15}", fullmatch=True),
    st.from_regex(r"[a-z][a-z0-9]{0,15}", fullmatch=True),
)
surroundings = st.binary(max_size=40) | st.text(
    string.ascii_lowercase + string.digits + "_\\n%", max_size=40
).map(str.encode)


def texts_in(data: bytes) -> list[str]:
    return [token.reveal() for _, _, token in tokens_in(data)]


# In bytes


@given(surroundings, minted, surroundings)
def test_a_token_is_found_whatever_stands_around_it(
    before: bytes, token: Token, behind: bytes
) -> None:
    """Once, and at its place."""
    text = token.reveal().encode()
    found = list(tokens_in(before + text + behind))
    assert [(start, end) for start, end, _ in found] == [(len(before), len(before + text))]
    assert found[0][2].reveal() == token.reveal()


@pytest.mark.parametrize(
    "around", ["KEY_{}", "%20{}", r'{{"env": "KEY:\n{}"}}', "0{}", "{}_old", "{}0", "aa{}{}zz"]
)
def test_leaks_do_not_keep_to_word_boundaries(around: str) -> None:
    """What the published expression has to miss is found by the CRC-32."""
    token = KEYS.mint("kl", "live").reveal()
    text = around.format(token, token)
    assert set(texts_in(text.encode())) == {token}
    assert re.findall(SCAN_PATTERN, text) != [token]


@pytest.mark.long
@given(minted, st.data())
def test_noise_is_not_a_token(token: Token, data: st.DataObject) -> None:
    """One character replaced, and the CRC-32 does not fit; nor is anything else found there."""
    text = token.reveal()
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from(string.ascii_letters + string.digits + "_-"))
    changed = text[:at] + other + text[at + 1 :]
    assert texts_in(changed.encode()) == ([text] if changed == text else [])


@pytest.mark.long
@given(st.lists(minted, max_size=4), st.lists(st.integers(0, 600), max_size=6), st.integers(0, 3))
def test_where_a_file_is_cut_does_not_matter(
    tokens: list[Token], cuts: list[int], lines: int
) -> None:
    """A token that lies across two chunks, or three, is found once, on its line."""
    data = b"".join(b"\n" * lines + b"x=" + token.reveal().encode() for token in tokens)
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    chunks = [data[start:end] for start, end in itertools.pairwise(places)]
    found = [(line, token.reveal()) for line, token in _tokens_in_chunks(iter(chunks))]
    expected = [(1 + lines * (at + 1), token.reveal()) for at, token in enumerate(tokens)]
    assert found == expected


def test_a_twin_without_overlap_would_miss_some() -> None:
    """So the test above holds something: chunk by chunk, the token that is cut is lost."""
    text = KEYS.mint("kl", "live").reveal().encode()
    assert [token for chunk in (text[:30], text[30:]) for token in tokens_in(chunk)] == []
    assert len(list(_tokens_in_chunks(iter((text[:30], text[30:]))))) == 1


# In files


def found_in(path: Path, **options: Any) -> Scanner:
    search = Scanner(**options)
    for file in search.files_of(path):
        search.scan_file(file)
    return search


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_encodings_that_shells_write_are_read(tmp_path: Path, encoding: str) -> None:
    """PowerShell's `>` writes UTF-16, which is half NULs."""
    token = KEYS.mint("kl", "live").reveal()
    (tmp_path / "log").write_bytes(f"clé\nKEY={token}\n".encode(encoding))
    [sighting] = found_in(tmp_path).found
    assert (sighting.line, sighting.token.reveal()) == (2, token)


def test_binary_and_huge_files_are_counted_and_read_on_demand(tmp_path: Path) -> None:
    """Skipped files are reported, so that silence is no all-clear."""
    token = KEYS.mint("kl", "live").reveal().encode()
    (tmp_path / "program").write_bytes(b"\x7fELF\0" + token)
    with (tmp_path / "sparse").open("wb") as file:
        file.write(token)
        file.truncate(MAX_BYTES + 1)
    objects = tmp_path / ".git" / "objects"
    objects.mkdir(parents=True)
    (objects / "pack").write_bytes(token)
    (tmp_path / ".git" / "config").write_bytes(token)
    usual, all_of_it = found_in(tmp_path), found_in(tmp_path, include_all=True)
    assert [Path(each.path).name for each in usual.found] == ["config"]
    assert usual.skipped == {"binary": 1, "larger than 50 MB": 1, "git history": 1}
    assert len(all_of_it.found) == 4
    assert not all_of_it.skipped


def test_links_below_a_folder_lead_nowhere(tmp_path: Path) -> None:
    """No loop, no device, no file twice; a link that is named is followed."""
    token = KEYS.mint("kl", "live").reveal()
    (tmp_path / "file").write_text(token)
    (tmp_path / "again").symlink_to("file")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "endless").symlink_to("/dev/zero")
    assert len(found_in(tmp_path).found) == 1
    assert len(found_in(tmp_path / "again").found) == 1


# At the shell


@pytest.fixture
def folder(operator: Operator) -> Path:
    """What is scanned; the store is elsewhere."""
    folder = operator.folder / "scanned"
    folder.mkdir()
    return folder


def test_live_and_dead_keys_are_distinguished(operator: Operator, folder: Path) -> None:
    """File and line, the key's id, what it is good for, and whose it is; never the token."""
    kinds = ("live", "disabled", "expired", "revoked")
    keys = {kind: operator.create() for kind in kinds}
    operator.run("keys", "revoke", keys["revoked"]["id"])
    with closing(sqlite3.connect(operator.database)) as raw, raw:
        for kind, change in (("disabled", "active = 0"), ("expired", "expires_at = 1")):
            raw.execute(f"UPDATE keylatch_keys SET {change} WHERE id = ?", (keys[kind]["id"],))
    other_token = KEYS.mint("acme", "prod").reveal()
    tokens = [keys[kind]["token"] for kind in kinds] + [other_token]
    (folder / "notes.md").write_text("\n".join(f"- `{token}`" for token in tokens))
    found = operator.run("scan", str(folder))
    expected = [
        *(
            f"{folder}/notes.md:{line}: {keys[kind]['id']} kl_...{keys[kind]['token'][-4:]} "
            f"{kind} (a key, of default)"
            for line, kind in enumerate(kinds, start=1)
        ),
        f"{folder}/notes.md:5: {Token(other_token).key_id} acme_...{other_token[-4:]} unknown",
    ]
    assert (found.exit_code, found.stdout.splitlines()) == (1, expected)
    summary = "Scanned 1 files: 1 disabled, 1 expired, 1 live, 1 revoked, 1 unknown.\n"
    assert found.stderr == summary
    assert not any(token in found.stdout + found.stderr for token in tokens)


def test_a_secret_that_was_rotated_away_is_reported(operator: Operator, folder: Path) -> None:
    """Live while the grace runs, and then of no use; it is ended without its key."""
    lapsed, leaked = operator.create(), operator.create()
    new = [
        operator.run("keys", "rotate", key["id"], "--grace", "1h").stdout.strip()
        for key in (lapsed, leaked)
    ]
    with closing(sqlite3.connect(operator.database)) as raw, raw:
        change = "UPDATE keylatch_keys SET previous_expires_at = 1 WHERE id = ?"
        raw.execute(change, (lapsed["id"],))
    (folder / "old").write_text(f"{lapsed['token']}\n{leaked['token']}")
    found = operator.run("scan", str(folder), "--revoke")
    first, second = found.stdout.splitlines()
    assert found.exit_code == 1
    assert " rotated (a key" in first
    assert " live, revoked now (a key" in second
    assert operator.run("scan", str(folder), "--revoke").exit_code == 0
    for token in new:
        assert operator.run("verify", stdin=token).exit_code == 0


def test_scripts_get_json_and_an_exit_code(operator: Operator, folder: Path) -> None:
    """0 for none, 1 for a live one; the same fields for each."""
    assert operator.run("scan", str(folder), "--json").stdout == "[]\n"
    key = operator.create()
    (folder / ".env").write_text(f"A=1\nKEY={key['token']}\n")
    found = operator.run("scan", str(folder), "--json")
    assert found.exit_code == 1
    assert json.loads(found.stdout) == [
        {
            "file": f"{folder}/.env",
            "line": 2,
            "keyId": key["id"],
            "partialToken": key["partialToken"],
            "status": "live",
            "name": "a key",
            "organizationId": "default",
            "revokedNow": False,
        }
    ]
    operator.run("keys", "revoke", key["id"])
    assert operator.run("scan", str(folder)).exit_code == 0


def test_standard_input_is_scanned(operator: Operator) -> None:
    """`git log --all -p | keylatch scan -`: the history that git has compressed."""
    key = operator.create()
    found = operator.run("scan", "-", stdin=f"+KEY\n+{key['token']}\n")
    assert found.exit_code == 1
    assert found.stdout.startswith(f"-:2: {key['id']} ")


def test_what_is_found_can_be_revoked_at_once(operator: Operator, folder: Path) -> None:
    """Once for a key, wherever it stands; the exit code still says that it was live."""
    key = operator.create()
    for name in ("a", "b"):
        (folder / name).write_text(key["token"])
    found = operator.run("scan", str(folder), "--revoke")
    assert found.exit_code == 1
    assert found.stdout.count("live, revoked now") == 2
    assert operator.run("verify", stdin=key["token"]).exit_code == 1
    assert operator.run("scan", str(folder), "--revoke").exit_code == 0


def test_a_scan_is_no_use_of_a_key(operator: Operator, folder: Path) -> None:
    """`lastUsed` remains the time of the last request."""
    key = operator.create()
    (folder / "a").write_text(key["token"])
    operator.run("scan", str(folder))
    shown = json.loads(operator.run("keys", "show", key["id"], "--json").stdout)
    assert shown["lastUsed"] is None


def test_without_a_store_nothing_is_called_dead(operator: Operator, folder: Path) -> None:
    """2 whenever a token could not be checked: the store is down, missing, or not configured;
    a store is not made by looking for one."""
    key = operator.create()
    (folder / "a").write_text(key["token"])
    line = f"{folder}/a:1: {key['id']} {key['partialToken']} undetermined\n"
    summary = "Scanned 1 files: 1 undetermined.\n"
    assert operator.run("scan", str(folder), "--offline") == Result(2, line, summary)
    operator.set(STORE="postgresql://nobody@127.0.0.1:1/none")
    away = operator.run("scan", str(folder))
    assert (away.exit_code, away.stdout) == (2, line)
    assert away.stderr.startswith("error: ")
    operator.set(STORE=f"sqlite:///{operator.folder}/typo.db")
    missing = operator.run("scan", str(folder))
    assert (missing.exit_code, missing.stdout) == (2, line)
    assert "error: there is no such store" in missing.stderr
    assert not (operator.folder / "typo.db").exists()
    assert operator.run("scan", str(folder), "--offline", "--revoke").exit_code == 2


def test_what_cannot_be_read_is_named(operator: Operator, folder: Path) -> None:
    """And the scan goes on; it just cannot say that all is well."""
    (folder / "a").write_text("nothing")
    outcome = operator.run("scan", f"{folder}/missing", str(folder))
    assert outcome.exit_code == 2
    assert f"error: {folder}/missing cannot be read: No such file or directory\n" in outcome.stderr
    assert "Scanned 1 files: no token." in outcome.stderr


def test_a_files_name_cannot_steer_the_terminal_or_be_a_token(
    operator: Operator, folder: Path
) -> None:
    """Escape sequences are escaped, and a token in a name is cut."""
    token = operator.create()["token"]
    (folder / f"\x1b[2J{token}").write_text(token)
    for words in ([], ["--json"]):
        found = operator.run("scan", str(folder), *words)
        assert found.exit_code == 1
        assert "\x1b" not in found.stdout
        assert token not in found.stdout


@pytest.mark.long
def test_the_example_in_the_readme_runs(
    operator: Operator, folder: Path, sidecar: Sidecar, admin_key: Created
) -> None:
    """A live key is found in files and in git's history, and reported; then it is live no more."""
    section = (ROOT / "README.md").read_text().partition("## Leaked keys")[2]
    lines = (
        section.partition("```\n")[2].partition("```")[0].replace("http://127.0.0.1:8700", "$URL")
    )
    scanned, history, report = lines.splitlines()
    key = operator.create()
    leaky = sidecar.create(admin_key.record.organization_id)
    (folder / "settings.py").write_text(f'KEY = "{key["token"]}"\n')
    commit = "git init -q && git add . && git -c user.name=n -c user.email=e commit -qm m"
    environment = os.environ | {
        "PATH": f"{SCRIPT.parent}:{os.environ['PATH']}",
        "TOKEN": leaky.token.reveal(),
        "URL": sidecar.url,
        "no_proxy": "*",
    }

    def run(line: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["sh", "-c", line], cwd=folder, env=environment, capture_output=True, text=True
        )

    require_program(shutil.which("git"), "git")
    require_program(shutil.which("curl"), "curl")
    assert run(scanned).stdout.startswith(f"settings.py:1: {key['id']} ")
    assert run(commit).returncode == 0
    assert run(history).stdout.startswith("-:")
    assert run(history).returncode == 1
    assert run(report).stdout == '{"status":"accepted"}'
    with sidecar.client(leaky) as client:
        eventually(lambda: client.get("/verify").status_code == 401)
    operator.run("keys", "revoke", key["id"])
    assert run(history).returncode == 0
