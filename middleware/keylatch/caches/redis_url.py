"""The Redis URLs: one server, Sentinel, or a Cluster.

    redis://[user:password@]host:port/db               rediss:// with TLS; valkey:// is the same
    unix:///path.sock?db=1
    redis+sentinel://[user:password@]h1:26379,h2:26379/service/db    rediss+sentinel:// with TLS
    redis+cluster://[user:password@]h1:6379,h2:6379                  rediss+cluster:// with TLS

Query parameters are redis-py's own. `sentinel_username` and `sentinel_password` authenticate at the
Sentinels. The parsed values hold passwords, so no message and no `repr` shows them.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Final, Literal
from urllib.parse import unquote, urlsplit

from redis.asyncio.connection import parse_url

Shape = Literal["server", "sentinel", "cluster"]

_PORTS: Final = {"sentinel": 26379, "cluster": 6379}
_PARTS: Final = re.compile(r"(?:([^/?#]*)@)?([^/?#@]*)(/[^?#]*)?(\?[^#]*)?")


@dataclass(frozen=True, slots=True)
class RedisURL:
    """A parsed URL.

    Args:
        shape: what the hosts are: a Redis server, Sentinels, or nodes of a Cluster.
        uses_tls: for every connection, those to Sentinels included.
        hosts: pairs of host and port; empty for one server, whose host is among the options.
        service: the name under which the Sentinels know the primary.
        options: of a redis-py connection.
        sentinel_options: credentials for the Sentinels.
    """

    shape: Shape
    uses_tls: bool
    hosts: tuple[tuple[str, int], ...] = ()
    service: str = ""
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    sentinel_options: dict[str, Any] = field(default_factory=dict, repr=False)


def parse(url: str) -> RedisURL:
    """Parse a URL.

    Raises:
        ValueError: it is none of the forms above; the message does not repeat it.
    """
    scheme, _, rest = url.partition("://")
    scheme = re.sub("^valkey", "redis", scheme.lower())
    base, _, shape = scheme.partition("+")
    if base not in ("redis", "rediss", "unix") or (base == "unix" and shape):
        raise ValueError("not a Redis URL")
    try:
        if not shape:
            return _parse_server(f"{base}://{rest}")
        if shape == "sentinel":
            return _parse_hosts(base, "sentinel", rest)
        if shape == "cluster":
            return _parse_hosts(base, "cluster", rest)
    except ValueError as error:
        raise ValueError(_safe_message(error)) from None
    raise ValueError("not a Redis URL")


class _Mistake(ValueError):
    """Its message repeats no part of the URL."""


def _safe_message(error: ValueError) -> str:
    return str(error) if isinstance(error, _Mistake) else "not a Redis URL"


def _parse_server(url: str) -> RedisURL:
    if "," in urlsplit(url).netloc.rpartition("@")[2]:
        raise _Mistake("several hosts need redis+sentinel:// or redis+cluster://")
    options = dict(parse_url(url))
    return RedisURL("server", url.startswith("rediss:"), options=options)


def _parse_hosts(base: str, shape: Literal["sentinel", "cluster"], rest: str) -> RedisURL:
    parts = _PARTS.fullmatch(rest)
    if parts is None:
        raise ValueError
    user, authority, path, query = (part or "" for part in parts.groups())
    hosts = tuple(_parse_host(host, _PORTS[shape]) for host in authority.split(","))
    service, _, database = path.strip("/").partition("/")
    if shape == "cluster":
        service, database = "", service
    if (shape == "sentinel" and not service) or not (database.isdecimal() or not database):
        raise _Mistake("Sentinel URLs end with /service or /service/db")
    options: dict[str, Any] = dict(parse_url(f"{base}://{user}@host:1/{database}{query}"))
    for name in ("host", "port", "connection_class"):
        options.pop(name, None)
    sentinel_options = {
        name.removeprefix("sentinel_"): options.pop(name)
        for name in ("sentinel_username", "sentinel_password")
        if shape == "sentinel" and name in options
    }
    if shape == "cluster" and options.pop("db", 0):
        raise _Mistake("a Cluster has only the database 0")
    return RedisURL(shape, base == "rediss", hosts, unquote(service), options, sentinel_options)


def _parse_host(text: str, default_port: int) -> tuple[str, int]:
    parsed = urlsplit(f"//{text}")
    if not parsed.hostname or parsed.path:
        raise ValueError
    return unquote(parsed.hostname), parsed.port or default_port
