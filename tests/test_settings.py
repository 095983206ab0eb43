"""Settings: where they come from, what is wrong with them, and what they keep to themselves."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keylatch.errors import ConfigurationError
from keylatch.settings import Settings, load_settings

PASSWORD = "hunter2secret"


def test_the_defaults_are_the_documented_ones() -> None:
    """Without any variable: SQLite in the working directory, no Redis, argon2id, one second."""
    settings = Settings.load()
    assert settings.store == "sqlite:///keylatch.db"
    assert (settings.redis, settings.prefix, settings.hasher) == ("", "kl", "argon2id")
    assert (settings.lease, settings.environment, settings.realm) == (1.0, "", "keylatch")
    assert settings.clients is False
    assert settings.permissions == ("FULL", "SENDING")


def test_arguments_come_before_variables_and_variables_before_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None means that an argument was not given; an empty text is an answer."""
    monkeypatch.setenv("KEYLATCH_PREFIX", "env")
    monkeypatch.setenv("KEYLATCH_REDIS", "redis://localhost")
    monkeypatch.setenv("KEYLATCH_LEASE", "0.5")
    monkeypatch.setenv("KEYLATCH_PERMISSIONS", "FULL, SENDING ,READING")
    settings = Settings.load(prefix="arg", redis="", lease=None)
    assert (settings.prefix, settings.redis, settings.lease) == ("arg", "", 0.5)
    assert settings.permissions == ("FULL", "SENDING", "READING")


def test_blanks_around_a_url_are_not_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One at the end would name another file, which would be a new and empty store."""
    monkeypatch.setenv("KEYLATCH_STORE", " sqlite:///keys.db \n")
    assert Settings.load(redis=" ").store == "sqlite:///keys.db"
    assert Settings.load(redis=" ").redis == ""


@pytest.mark.parametrize("name", ["clients", "log_failures", "timing", "tracing"])
@pytest.mark.parametrize(
    ("text", "value"),
    [("on", True), ("true", True), ("1", True), ("off", False), ("False", False), ("0", False)],
)
def test_a_switch_is_a_boolean_in_python_and_a_word_in_a_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: bool
) -> None:
    """An argument comes before the variable, also when it is False."""
    monkeypatch.setenv(f"KEYLATCH_{name.upper()}", text)
    assert getattr(Settings.load(), name) is value
    assert getattr(Settings.load(**{name: not value}), name) is not value


@pytest.mark.parametrize("text", ["", "maybe", "2"])
def test_a_switch_that_is_neither_on_nor_off_is_refused(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """With the variable's name and the words that it may be."""
    monkeypatch.setenv("KEYLATCH_TIMING", text)
    with pytest.raises(ConfigurationError, match="KEYLATCH_TIMING") as caught:
        Settings.load()
    assert [hint for _, hint in caught.value.mistakes] == ["off or on"]


def test_words_are_a_sequence_in_python_and_separated_by_commas_in_a_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blanks around a word are not part of it; no text is no word."""
    monkeypatch.setenv("KEYLATCH_ENVIRONMENTS", "live, test")
    assert Settings.load().environments == ("live", "test")
    monkeypatch.setenv("KEYLATCH_ENVIRONMENTS", "")
    assert Settings.load().environments == ()
    assert Settings.load(permissions=["FULL", "READING"]).permissions == ("FULL", "READING")


WRONG = {
    "store": f"mysql://app:{PASSWORD}@db/keys",
    "store_direct": f"postgresql+psycopg2://app:{PASSWORD}@db/keys",
    "store_read": f"sqlite:///{PASSWORD}.db",
    "durable": "always",
    "redis": f"http://:{PASSWORD}@cache",
    "pepper_file": "/nowhere/that is",
    "prefix": "k_l",
    "hasher": "md5",
    "lease": "soon",
    "environment": "Live!",
    "permissions": "SENDING",
    "realm": 'a "realm"',
    "clients": "yes, please",
}


def test_all_mistakes_are_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every wrong setting is named with a hint, wherever it came from; no value is repeated."""
    for name, value in WRONG.items():
        monkeypatch.setenv(f"KEYLATCH_{name.upper()}", value)
    with pytest.raises(ConfigurationError) as caught:
        Settings.load(prefix="also wrong", colour="red")
    named = {wrong.partition(":")[0] for wrong, _ in caught.value.mistakes}
    assert named == {f"KEYLATCH_{name.upper()}" for name in (*WRONG, "colour")}
    assert all(hint for _, hint in caught.value.mistakes)
    shown = str(caught.value) + repr(caught.value)
    for value in (PASSWORD, "also wrong", *WRONG.values()):
        assert value not in shown
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None, "pydantic's own error would show the input"


STORES = (
    *("", "keys.db", "sqlite://", "sqlite:///", "sqlite:///:memory:", "redis://localhost"),
    *("sqlite:///a?b.db", "sqlite:///keys.db?mode=memory"),  # the name would end at the ?
    *(
        "postgresql://user:a@{}:x@host/db",
        "postgresql://u:a@{}@h/d",
        "postgresql://u@host:{}/db",
        "postgresql+psycopg2://u:{}@host/db",
        "postgresql://u@host/db?{}=1",
        "postgresql://u@host1:1,host2:{}/db",
        "{}://host",
        "mysql://{}@h/d",
    ),
)


@pytest.mark.parametrize("url", STORES)
def test_a_store_that_cannot_be_is_refused(url: str) -> None:
    """Also a URL that its password makes unreadable, and without repeating the password."""
    with pytest.raises(ConfigurationError, match="KEYLATCH_STORE") as caught:
        Settings.load(store=url.format(PASSWORD))
    assert PASSWORD not in str(caught.value)


POSTGRESQL = f"postgresql://app:{PASSWORD}@db/keys"


@pytest.mark.parametrize("package", ["psycopg", "psycopg.conninfo"])
def test_a_url_is_taken_where_its_driver_is_missing(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    """The store says which package to install. Else the settings would blame the URL."""
    monkeypatch.setitem(sys.modules, package, None)
    assert Settings.load(store=POSTGRESQL).store == POSTGRESQL


def test_the_other_urls_of_a_store_are_of_postgresql() -> None:
    """A pooler or a standby of a file does not exist; neither does a replica."""
    others = {
        "store_direct": f" {POSTGRESQL} ",
        "store_read": "postgres://a:1,b:2/keys",
        "durable": "replicated",
    }
    settings = Settings.load(store=POSTGRESQL, **others)
    assert settings.store_direct == POSTGRESQL
    assert (settings.store_read, settings.durable) == (others["store_read"], "replicated")
    assert PASSWORD not in repr(settings)
    with pytest.raises(ConfigurationError) as caught:
        Settings.load(store="sqlite:///keys.db", **others)
    assert [wrong for wrong, _ in caught.value.mistakes] == [
        f"KEYLATCH_{name.upper()}: the store is not PostgreSQL" for name in others
    ]


def test_a_wrong_store_does_not_make_its_other_urls_wrong() -> None:
    """One mistake is reported as one."""
    with pytest.raises(ConfigurationError) as caught:
        Settings.load(store="postgresql://h:port", store_direct=POSTGRESQL, durable="replicated")
    assert len(caught.value.mistakes) == 1


@pytest.fixture
def production(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of a store with all of its URLs."""
    for name in ("STORE", "STORE_DIRECT", "STORE_READ"):
        monkeypatch.setenv(f"KEYLATCH_{name}", f"postgresql://{name.lower()}/keys")


@pytest.mark.usefixtures("production")
def test_the_urls_of_two_stores_are_not_mixed(tmp_path: Path) -> None:
    """Where the store is an argument, the variables' other URLs belong to another store."""
    file = tmp_path / "url"
    file.write_text(POSTGRESQL)
    for arguments in ({"store": POSTGRESQL}, {"store_file": str(file)}):
        settings = Settings.load(**arguments)
        assert (settings.store_direct, settings.store_read) == ("", "")
        settings = Settings.load(**arguments, store_read_file=str(file))
        assert (settings.store_direct, settings.store_read) == ("", POSTGRESQL)
    settings = Settings.load(store_direct=POSTGRESQL)
    assert (settings.store_direct, settings.store_read) == (
        POSTGRESQL,
        "postgresql://store_read/keys",
    )
    assert Settings.load(store="sqlite:///keys.db").store == "sqlite:///keys.db"


@pytest.mark.usefixtures("production")
def test_without_that_leases_would_be_of_another_store() -> None:
    """The broken twin: every setting by itself, from its argument or its variable."""
    settings = load_settings(Settings, {"store": POSTGRESQL}, {})
    assert settings.store_direct == "postgresql://store_direct/keys"


@pytest.mark.parametrize(
    "url",
    [
        *("localhost:6379", "http://localhost", "redis://:{}@host:port", "redis://h:{}/0"),
        *("redis://h/0?colour={}", "redis://h/0?db={}", "redis://h?socket_timeout={}"),
    ],
)
def test_a_redis_url_that_cannot_work_is_refused(url: str) -> None:
    """At the start, and not at the first request that would need Redis."""
    with pytest.raises(ConfigurationError, match="KEYLATCH_REDIS") as caught:
        Settings.load(redis=url.format(PASSWORD))
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["redis://localhost", "rediss://u:p@h:1/2", "unix:///run/redis.sock?db=1", "redis://h/0?db=3"],
)
def test_redis_urls_that_work_are_taken(url: str) -> None:
    """Nothing is connected to at that point."""
    assert Settings.load(redis=url).redis == url


@pytest.mark.parametrize("lease", [0, -1, 60.1, float("nan"), float("inf"), "", "1s"])
def test_a_lease_without_bounds_is_refused(lease: float | str) -> None:
    """A lease that never ends would make a revocation never arrive."""
    with pytest.raises(ConfigurationError, match="KEYLATCH_LEASE"):
        Settings.load(lease=lease)


@given(st.sampled_from(["prefix", "environment", "realm", "permissions"]), st.text(min_size=1))
def test_a_word_is_what_it_must_be_or_a_mistake(name: str, text: str) -> None:
    """Nothing that could break a token, a challenge or a line of a log gets in."""
    try:
        taken = "".join(getattr(Settings.load(**{name: text}), name))
    except ConfigurationError:
        return
    assert taken.isascii()
    assert taken.isprintable()
    assert not set(taken) & set('"\\')


def test_settings_do_not_show_where_keys_are() -> None:
    """URLs hold passwords: repr and str leave them out."""
    settings = Settings.load(
        store=f"postgresql://u:{PASSWORD}@h/d", redis=f"redis://:{PASSWORD}@h/0"
    )
    assert PASSWORD not in repr(settings) + str(settings) + f"{settings!r}"


def test_settings_stay_as_they_were_checked() -> None:
    """They are immutable after the checks."""
    with pytest.raises(ValueError, match="frozen"):
        Settings.load().prefix = "other"  # type: ignore[misc]


SECRET = "5e" * 32


def test_a_pepper_file_has_a_secret_on_each_line(tmp_path: Path) -> None:
    """The newest first; blanks around them and empty lines do not count."""
    file = tmp_path / "pepper"
    file.write_text(f"{SECRET}\n\n  {SECRET[::-1]} \r\n")
    settings = Settings.load(pepper_file=str(file))
    assert settings.file_peppers == (SECRET.encode(), SECRET[::-1].encode())
    assert SECRET not in repr(settings)
    assert Settings.load().file_peppers == ()


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (None, "cannot be read: No such file or directory"),
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("short" * 6, "has a line of fewer than 32 bytes"),
        (f"{SECRET}\nshort\n", "has a line of fewer than 32 bytes"),
        ("x" * 70_000, "is larger than 64 KiB"),
    ],
)
def test_a_pepper_file_of_no_use_stops_the_start(
    tmp_path: Path, content: str | None, wrong: str
) -> None:
    """It says why and what to do, and nothing of what is in it."""
    file = tmp_path / "pepper"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigurationError) as caught:
        Settings.load(pepper_file=str(file))
    assert caught.value.mistakes[0] == (
        f"KEYLATCH_PEPPER_FILE: {wrong}",
        "a file with lines of 32 bytes or more: openssl rand -hex 32 > FILE",
    )
    assert len(caught.value.mistakes) == 1
    assert "short" not in str(caught.value)
    with pytest.raises(ConfigurationError):
        Settings.load(pepper_file=str(tmp_path))  # a folder


def test_a_pepper_file_that_all_may_read_is_reported(tmp_path: Path) -> None:
    """A warning, because some ways of mounting a secret leave no choice."""
    file = tmp_path / "pepper"
    file.write_text(SECRET)
    file.chmod(0o640)
    assert Settings.load(pepper_file=str(file)).warnings == ()
    file.chmod(0o644)
    assert "KEYLATCH_PEPPER_FILE" in Settings.load(pepper_file=str(file)).warnings[0]
