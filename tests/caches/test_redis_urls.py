"""Which URLs of Redis are accepted, and what they mean."""

from typing import Any

import pytest
from redis.crc import key_slot

from keylatch.caches import redis_url
from keylatch.caches.redis_client import check_url, name_in_redis

PASSWORD = "hunter2secret"

ACCEPTED = [
    *("redis://h:1/0", "rediss://h:1/0?ssl_ca_certs=/x", "unix:///x.sock?db=1", "REDIS://h"),
    *("valkey://h:1/0", "valkeys://h:1", "redis://user:p%40ss@h:1/0?protocol=3"),
    *("redis+sentinel://h/main", "redis+sentinel://h1:26379,h2/main/3", "valkey+sentinel://h/main"),
    "rediss+sentinel://u:p@h1,[::1]:4/main/2?sentinel_username=a&sentinel_password=b",
    *("redis+cluster://h", "redis+cluster://h1:1,h2:2/0", "rediss+cluster://u:p@h?ssl_ca_certs=/x"),
]

REFUSED = [
    *("h:1", "http://h", "sentinel://h/main", "unix+sentinel:///x", "redis+proxy://h"),
    *("redis://:{}@h1:1,h2:2/0", "redis+cluster://:{}@h:1/3", "redis+sentinel://:{}@h:1"),
    *("redis+sentinel://:{}@h:1/main/x", "redis+sentinel://:{}@/main", "redis+cluster://:{}@h:x"),
    *("redis+cluster://h?colour={}", "redis+sentinel://h/main?colour={}"),
    *("redis+sentinel://h/main?sentinel_colour={}", "redis+cluster://h?sentinel_password={}"),
]


@pytest.mark.parametrize("url", ACCEPTED)
def test_urls_that_work_are_accepted(url: str) -> None:
    """One server, Sentinel and a Cluster, with and without TLS."""
    assert check_url(f" {url} ") == url


@pytest.mark.parametrize("url", REFUSED)
def test_urls_that_cannot_work_are_refused(url: str) -> None:
    """An unknown option, too; no message repeats a part of the URL."""
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the text differs
        check_url(url.format(PASSWORD))
    assert PASSWORD not in str(refused.value)
    assert refused.value.__cause__ is None


def test_the_parts_of_a_url() -> None:
    """Hosts, service, database, and two pairs of credentials, which no `repr` shows."""
    parsed = redis_url.parse(
        "rediss+sentinel://u:p%2Fw@h1,[::1]:4/ma%2Fin/2?sentinel_password=hunter2&ssl_ca_certs=/x"
    )
    assert parsed.shape == "sentinel"
    assert parsed.uses_tls
    assert parsed.hosts == (("h1", 26379), ("::1", 4))
    assert parsed.service == "ma/in"
    expected: dict[str, Any] = {"username": "u", "password": "p/w", "db": 2, "ssl_ca_certs": "/x"}
    assert parsed.options == expected
    assert parsed.sentinel_options == {"password": "hunter2"}
    assert "hunter2" not in repr(parsed)
    assert "p/w" not in repr(parsed)


def test_all_names_of_a_store_are_in_one_slot() -> None:
    """So MGET may name several of them in a Cluster; names of two stores differ in their slot."""
    names = [name_in_redis("epoch", f"key_{number}").encode() for number in range(100)]
    assert len({key_slot(name) for name in names}) == 1
    assert all(name.startswith(b"keylatch:") for name in names)
    assert key_slot(names[0]) != key_slot(name_in_redis("another", "key_0").encode())


def test_the_twin_without_braces_has_many_slots() -> None:
    """A name without a hash tag maps to a slot of its own."""
    assert len({key_slot(f"keylatch:epoch:key_{number}".encode()) for number in range(100)}) > 10
