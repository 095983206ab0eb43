"""`KEYLATCH_*` variables: none is passed over in silence, and passwords need not be in any."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from keylatch import _variables
from keylatch._variables import find_unknown
from keylatch.asgi import APIKeyMiddleware
from keylatch.errors import ConfigurationError
from keylatch.settings import Settings, of_one_store
from keylatch_sidecar.settings import BenchSettings, ProxySettings, TestSettings
from tests.sidecar.test_server import answers, served
from tests.support.command_line import Operator, wait_for_exit
from tests.support.raw_http import send
from tests.support.servers import eventually, free_port

PASSWORD = "hunter2secret"
STORE = f"postgresql://keylatch:{PASSWORD}@127.0.0.1:1/keys"
REDIS = f"redis://:{PASSWORD}@127.0.0.1:1/0"


def mistakes(**given: str) -> dict[str, str]:
    """What is wrong with the settings, and each hint."""
    with pytest.raises(ConfigurationError) as caught:
        Settings.load(**given)
    assert PASSWORD not in str(caught.value)
    return dict(caught.value.mistakes)


# Unknown ones


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("KEYLATCH_STOER", "KEYLATCH_STORE"),
        ("KEYLATCH_STORE_URL", "KEYLATCH_STORE"),
        ("KEYLATCH_REDIS_URL", "KEYLATCH_REDIS"),
        ("KEYLATCH_REDDIS_FILE", "KEYLATCH_REDIS_FILE"),
        ("KEYLATCH_LEASES", "KEYLATCH_LEASE"),
        ("KEYLATCH_VERIFY_REQUES", "KEYLATCH_VERIFY_REQUEST"),
        ("KEYLATCH_LOG_FAILURE", "KEYLATCH_LOG_FAILURES"),
        ("KEYLATCH_BENCHKEY", "KEYLATCH_BENCH_KEY"),
        ("keylatch_stoer", "KEYLATCH_STORE"),
        ("Keylatch_Lese", "KEYLATCH_LEASE"),
    ],
)
def test_a_misspelled_variable_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    """With the name that was meant; its value is not repeated."""
    monkeypatch.setenv(name, PASSWORD)
    assert mistakes() == {f"{name}: no such setting": f"is {meant} meant?"}


def test_a_variable_that_is_like_no_setting_is_reported_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is a hint all the same, also for one that is empty."""
    monkeypatch.setenv("KEYLATCH_ZZZZ", "")
    monkeypatch.setenv("KEYLATCH_", "x")
    found = mistakes()
    assert set(found) == {"KEYLATCH_ZZZZ: no such setting", "KEYLATCH_: no such setting"}
    assert all(found.values())


def test_all_of_them_and_all_wrong_values_are_reported_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They can be corrected in one go."""
    monkeypatch.setenv("KEYLATCH_STOER", STORE)
    monkeypatch.setenv("KEYLATCH_REDIS_URL", REDIS)
    monkeypatch.setenv("KEYLATCH_LEASE", "soon")
    monkeypatch.setenv("KEYLATCH_REDIS_FILE", "/missing")
    named = {wrong.partition(":")[0] for wrong in mistakes(prefix="k_l")}
    words = ("STOER", "REDIS_URL", "LEASE", "REDIS_FILE", "PREFIX")
    assert named == {f"KEYLATCH_{word}" for word in words}


OF_A_SERVICE = {
    "KEYLATCH_SERVICE_HOST": "10.96.0.10",
    "KEYLATCH_SERVICE_PORT": "8700",
    "KEYLATCH_SERVICE_PORT_HTTP": "8700",
    "KEYLATCH_PORT": "tcp://10.96.0.10:8700",
    "KEYLATCH_PORT_8700_TCP": "tcp://10.96.0.10:8700",
    "KEYLATCH_PORT_8700_TCP_PROTO": "tcp",
    "KEYLATCH_PORT_8700_TCP_PORT": "8700",
    "KEYLATCH_PORT_8700_TCP_ADDR": "10.96.0.10",
    "KEYLATCH_ADMIN_SERVICE_HOST": "10.96.0.11",
    "KEYLATCH_ADMIN_SERVICE_PORT": "8701",
    "KEYLATCH_ADMIN_PORT": "tcp://10.96.0.11:8701",
    "KEYLATCH_ADMIN_PORT_8701_UDP_ADDR": "10.96.0.11",
}


def test_what_kubernetes_makes_of_a_service_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Service `keylatch`, or `keylatch-admin`; a port that a person has set is none of these."""
    for name, value in OF_A_SERVICE.items():
        monkeypatch.setenv(name, value)
    assert Settings.load().store == "sqlite:///keylatch.db"
    monkeypatch.setenv("KEYLATCH_PORT", "8700")
    assert list(mistakes()) == ["KEYLATCH_PORT: no such setting"]


def test_every_variable_of_the_project_is_known() -> None:
    """Those of the sidecar, its commands and these tests, so that one file serves app and sidecar;
    the known ones are the fields, and nothing else."""
    kinds = (Settings, ProxySettings, BenchSettings, TestSettings)
    names = {_variables.variable_name(name) for kind in kinds for name in kind.model_fields}
    assert find_unknown(dict.fromkeys(names, "x")) == []
    assert "KEYLATCH_REQUIRE_SERVICES" in names


def test_a_process_without_the_sidecar_knows_its_variables() -> None:
    """An app's, which imports the middleware alone."""
    program = "from keylatch import Settings; Settings.load(); import sys; print(*sys.modules)"
    environment = {**os.environ, "KEYLATCH_VERIFY_REQUEST": "forwarded"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "keylatch_sidecar.cli.program" not in done.stdout.split()


def test_the_middleware_starts_with_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the sidecar and each command do; the rules' mistakes are reported with them."""
    monkeypatch.setenv("KEYLATCH_STOER", "x")
    with pytest.raises(ConfigurationError) as caught:
        APIKeyMiddleware(lambda *_: None, public=["no slash"])  # type: ignore[arg-type]
    message = str(caught.value)
    assert "KEYLATCH_STOER" in message
    assert "no slash" in message


@pytest.mark.parametrize("words", [["keys", "list"], ["serve"], ["doctor"], ["migrate"], ["audit"]])
def test_no_command_makes_a_store_that_was_not_named(
    operator: Operator, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """It ends with 2, names the variable, and leaves the folder empty."""
    monkeypatch.chdir(operator.folder)
    monkeypatch.delenv("KEYLATCH_STORE")
    operator.set(STOER=STORE)
    ending = operator.run(*words)
    said = ending.stdout + ending.stderr
    assert ending.exit_code == 2
    assert "KEYLATCH_STOER: no such setting" in said
    assert "is KEYLATCH_STORE meant?" in said
    assert PASSWORD not in said
    assert list(operator.folder.iterdir()) == []


def test_the_check_would_miss_them_without_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin: the library's own `extra="forbid"` does not look there."""
    monkeypatch.setenv("KEYLATCH_STOER", STORE)
    assert Settings().store == "sqlite:///keylatch.db"


# Files


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    return tmp_path / "secret"


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_a_url_may_be_in_a_file(monkeypatch: pytest.MonkeyPatch, secret: Path, ending: str) -> None:
    """Of the store and of Redis, by variable and by argument; the end of its line is no part."""
    secret.write_text(REDIS + ending, newline="")
    assert Settings.load(redis_file=str(secret)).redis == REDIS
    monkeypatch.setenv("KEYLATCH_REDIS_FILE", str(secret))
    settings = Settings.load()
    assert settings.redis == REDIS
    assert PASSWORD not in repr(settings)
    secret.write_text(STORE + ending, newline="")
    monkeypatch.delenv("KEYLATCH_REDIS_FILE")
    monkeypatch.setenv("keylatch_store_file", str(secret))
    assert Settings.load().store == STORE


def test_an_argument_comes_before_a_file_and_a_file_before_nothing(
    monkeypatch: pytest.MonkeyPatch, secret: Path
) -> None:
    """In whichever form it is given; an empty variable is none."""
    secret.write_text(REDIS)
    monkeypatch.setenv("KEYLATCH_REDIS_FILE", "/missing")
    assert Settings.load(redis="").redis == ""
    monkeypatch.setenv("KEYLATCH_REDIS", "redis://elsewhere")
    assert Settings.load(redis_file=str(secret)).redis == REDIS
    monkeypatch.setenv("KEYLATCH_REDIS", "")
    monkeypatch.setenv("KEYLATCH_REDIS_FILE", str(secret))
    assert Settings.load().redis == REDIS
    monkeypatch.setenv("KEYLATCH_REDIS_FILE", "")
    assert Settings.load().redis == ""


def test_workers_get_the_urls_of_one_store(monkeypatch: pytest.MonkeyPatch, secret: Path) -> None:
    """A store from the command line replaces the other URLs of the environment, in both forms."""
    secret.write_text(STORE)
    monkeypatch.setenv("KEYLATCH_STORE", STORE)
    monkeypatch.setenv("KEYLATCH_STORE_DIRECT_FILE", str(secret))
    monkeypatch.setenv("KEYLATCH_STORE_READ", STORE)
    assert Settings.load().store_direct == STORE
    given = {"store": "postgresql://other/keys", "store_direct": None, "lease": None}
    monkeypatch.setenv("KEYLATCH_STORE_DIRECT", "")  # restored after the export
    _variables.export_variables(of_one_store(given))
    settings = Settings.load()
    assert settings == Settings.load(**given)
    assert (settings.store_direct, settings.store_read) == ("", "")


def test_both_forms_at_once_are_a_mistake(monkeypatch: pytest.MonkeyPatch, secret: Path) -> None:
    """Which of them is right, nothing here can know."""
    secret.write_text(STORE)
    both = {"KEYLATCH_STORE_FILE: KEYLATCH_STORE is set as well": "set one of the two"}
    assert mistakes(store="sqlite:///a.db", store_file=str(secret)) == both
    monkeypatch.setenv("KEYLATCH_STORE", "sqlite:///a.db")
    monkeypatch.setenv("KEYLATCH_STORE_FILE", str(secret))
    assert mistakes() == both


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xff\xfe", "not UTF-8"),
        (f"{STORE}\n{STORE}\n".encode(), "more than one line"),
        (f"mysql://u:{PASSWORD}@h/d".encode(), "neither sqlite nor postgresql"),
    ],
)
def test_a_file_that_holds_no_url_is_named(secret: Path, content: bytes | None, what: str) -> None:
    """By its variable, with a hint, and without a word of what it holds."""
    if content is not None:
        secret.write_bytes(content)
    [(wrong, hint)] = mistakes(store_file=str(secret)).items()
    assert wrong.startswith("KEYLATCH_STORE_FILE: ")
    assert what in wrong
    assert hint


def test_a_url_in_the_place_of_a_path_is_not_repeated() -> None:
    """Where the two are confused, it holds a password."""
    [(wrong, _)] = mistakes(store_file=STORE).items()
    assert wrong.startswith("KEYLATCH_STORE_FILE: the file cannot be read: ")


@pytest.mark.long
def test_workers_read_the_same_files(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an option comes before the file in them as well: else they would use two stores."""
    other = operator.folder / "other.db"
    (operator.folder / "store.url").write_text(f"sqlite:///{operator.folder}/file.db\n")
    monkeypatch.delenv("KEYLATCH_STORE")
    operator.set(STORE_FILE="store.url")
    for words, database in (([], "file.db"), (["--store", f"sqlite:///{other}"], "other.db")):
        made = wait_for_exit(operator.start("keys", "create", "--name", "x", *words))
        assert made.exit_code == 0, made.stderr
        assert (operator.folder / database).exists()
        port = free_port()
        with served(operator, "--port", str(port), "--workers", "2", *words):
            place = f"http://127.0.0.1:{port}"
            eventually(lambda place=place: answers(place))  # type: ignore[misc]
            credential = f"Authorization: Bearer {made.stdout.strip()}".encode()
            assert {send(place, b"GET /verify", credential).status for _ in range(8)} == {200}


# Passwords as arguments


WITH_PASSWORD = [
    STORE,
    STORE.upper(),
    STORE.replace("postgresql", "postgresql+psycopg"),
    STORE.replace("postgresql", "postgres"),
    f"postgresql://u:{PASSWORD}/@#?x@h/d",
    f"postgresql://u@h/d?password={PASSWORD}",
    f"postgresql://u@h/d?sslmode=require&sslpassword={PASSWORD}",
    f"postgresql://u@h/d?pass%77ord={PASSWORD}",
    f"postgresql://u%3A{PASSWORD}@h/d",
    REDIS,
    f"rediss://user:{PASSWORD}@h",
    f"unix://:{PASSWORD}@/run/redis.sock",
    f"unix:///run/redis.sock?password={PASSWORD}",
    f"valkey://:{PASSWORD}@h",
]
COMMANDS = [
    ["serve"],
    ["doctor"],
    ["bench"],
    ["verify"],
    ["migrate"],
    ["audit"],
    ["scan", "."],
    ["backup", "copy.db"],
    ["restore", "copy.db"],
    ["revocations", "apply"],
    ["secrets", "list"],
    ["secrets", "rotate"],
    ["secrets", "retire", "1"],
    ["keys", "create", "--name", "x"],
    ["keys", "import", "x.jsonl"],
    ["keys", "list"],
    ["keys", "show", "key_1"],
    ["keys", "revoke", "key_1"],
    ["keys", "rotate", "key_1"],
    ["revocations", "export"],
    ["keys", "usage", "key_1"],
    ["organizations", "disable", "acme"],
    ["organizations", "revoke", "acme"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("option", ["--store", "--redis"])
def test_no_command_takes_a_password(operator: Operator, command: list[str], option: str) -> None:
    """Every account of the host reads the list of processes. The hint says where it may be."""
    for words in ([option, STORE], [f"{option}={REDIS}"]):
        ending = operator.run(*command, *words)
        assert (ending.exit_code, ending.stdout) == (2, "")
        assert "a URL with a password is never an argument" in ending.stderr
        assert "KEYLATCH_STORE_FILE" in ending.stderr
        assert PASSWORD not in ending.stderr
    assert list(operator.folder.iterdir()) == []


@pytest.mark.parametrize("option", ["--store-direct", "--store-read"])
def test_the_other_urls_of_a_store_have_no_password_either(operator: Operator, option: str) -> None:
    """They are URLs of the same database."""
    for words in ([option, STORE], [f"{option}={STORE}"]):
        ending = operator.run("serve", *words)
        assert (ending.exit_code, ending.stdout) == (2, "")
        assert "a URL with a password is never an argument" in ending.stderr
        assert PASSWORD not in ending.stderr


@pytest.mark.parametrize("url", WITH_PASSWORD)
def test_wherever_the_password_is_in_the_url(operator: Operator, url: str) -> None:
    """Before the @, among the parameters, encoded, or unreadable for the library."""
    ending = operator.run("keys", "list", "--store", url)
    assert (ending.exit_code, ending.stdout) == (2, "")
    assert "never an argument" in ending.stderr
    assert PASSWORD not in ending.stderr.lower()


@pytest.mark.parametrize(
    "words",
    [
        ["--redis", "redis://127.0.0.1:1/0"],
        ["--redis", "redis://user@127.0.0.1:1"],
        ["--redis", "unix:///run/missing.sock?db=1"],
        ["--redis", ""],
    ],
)
def test_a_url_without_one_is_taken(operator: Operator, words: list[str]) -> None:
    """A port is no password, and neither is a user."""
    assert operator.run("keys", "list", *words).exit_code == 0
