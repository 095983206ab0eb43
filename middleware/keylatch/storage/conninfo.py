"""The URL of a PostgreSQL store, and what libpq gets for it.

The law of this file: libpq decodes every part of a URL, and every connection is made with the
parameters that it found. SQLAlchemy must not render the URL: it writes a blank as `+`, which libpq
reads as a plus. Only lists of hosts are taken apart here: SQLAlchemy repeats `host`, and each may
have a port.

Nothing is imported from psycopg until there is such a URL, and no message repeats a part of it.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

NOT_POSTGRESQL: Final = "not a PostgreSQL URL"
_SCHEME: Final = re.compile(r"(?:postgresql|postgres)(?:\+([^:/?#]*))?://", re.IGNORECASE)
_DRIVER: Final = "psycopg"
_USER: Final = re.compile(r"[^@/]*@")
_PARAMETER: Final = re.compile(r"\?\w+=")
_HOST_AND_PORT: Final = re.compile(r"(?:\[([^\[\]]+)\]|([^\[\]:/@][^:]*))(?::([^:]*))?")
"""`name:5432` and `[::1]:5432`; neither the folder of a socket nor a bare IPv6 address."""
_NOT_A_URL: Final = "libpq cannot read it: in a password, special characters are written %XX"
_LISTS: Final = ("host", "hostaddr", "port")
_MAX_PORT: Final = 65_535

_DEFAULTS: Final[dict[str, Any]] = {
    "connect_timeout": 4,  # TLS and SCRAM are six round trips: 1.5 s between continents
    "tcp_user_timeout": 5_000,
    "application_name": "keylatch",
}


def is_postgresql(url: str) -> bool:
    """Whether the scheme of a URL is one of PostgreSQL's."""
    return _SCHEME.match(url) is not None


def connection_parameters(url: str, *, needs_primary: bool = True) -> dict[str, Any]:
    """The keyword arguments of psycopg's `connect`; the URL's take precedence over keylatch's.

    Args:
        url: of a store.
        needs_primary: of several hosts, use only one that accepts changes.

    Raises:
        ValueError: libpq cannot use it.
    """
    parameters = parse(url)
    defaults = dict(_DEFAULTS)
    if needs_primary and "," in _hosts(parameters):
        defaults["target_session_attrs"] = "read-write"
    return defaults | parameters


def parameters_by_host(parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parameters of each host that a list names; one element where psycopg has to choose: if
    the order of the hosts is not that of the list."""
    in_other_order = parameters.get("target_session_attrs") == "prefer-standby"
    if in_other_order or "load_balance_hosts" in parameters:
        return [dict(parameters)]
    lists = {name: str(parameters[name]).split(",") for name in _LISTS if name in parameters}
    count = max(map(len, lists.values()), default=1)
    if len(lists.get("port", ())) == 1:
        del lists["port"]  # of all hosts
    if any(len(values) != count for values in lists.values()):
        return [dict(parameters)]
    return [
        {**parameters, **{name: values[position] for name, values in lists.items()}}
        for position in range(count)
    ]


def parse(url: str) -> dict[str, str]:
    """The parameters that a URL sets, by libpq's names.

    In addition to libpq's forms, SQLAlchemy's for several hosts: `?host=h1:p1&host=h2:p2` and
    `?host=h1&host=h2&port=p1&port=p2`. Refused in addition: what is probably a part of a password
    that was not percent-encoded, and ports that libpq would refuse when it connects.

    Raises:
        ValueError: libpq cannot use it; the message repeats no part of the URL.
        ImportError: psycopg is missing, or its libpq.
    """
    scheme = _SCHEME.match(url)
    if scheme is None:
        raise ValueError(NOT_POSTGRESQL)
    if scheme[1] not in (None, _DRIVER):
        raise ValueError("another driver than psycopg: the scheme is written postgresql://")
    if "\0" in url:  # libpq would read no further
        raise ValueError(NOT_POSTGRESQL)
    rest = url[scheme.end() :]
    user = _USER.match(rest)
    start = user.end() if user else 0
    place, _, query = rest[start:].partition("?")
    # libpq would use a part of a password as a host, and repeat it in errors.
    if "@" in place:
        raise ValueError("an @ in a password is written %40, and a / is written %2F")
    if _PARAMETER.search(rest[:start]):
        raise ValueError("an @ in a parameter is written %40, and a ? in a password %3F")
    parameters = _parse_with_libpq(f"postgresql://{rest[:start]}{place}", _NOT_A_URL)
    lists: dict[str, list[str]] = {}
    for position, item in enumerate(query.split("&") if query else (), 1):
        wrong = (
            f"libpq does not know parameter {position} after the ?, or cannot decode its value"
            " (a blank is written %20, and an = %3D)"
        )
        for name, value in _parse_with_libpq(f"postgresql:///?{item}", wrong).items():
            if name in _LISTS:
                lists.setdefault(name, []).extend(value.split(","))
            else:
                parameters[name] = value
    _split_ports(lists)
    parameters |= {name: ",".join(values) for name, values in lists.items()}
    _check_ports(parameters)
    if "-c+" in parameters.get("options", ""):
        raise ValueError("a blank in options is written %20, because libpq reads a + as a plus")
    return parameters


def _parse_with_libpq(url: str, message: str) -> dict[str, str]:
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    try:
        return {name: str(value) for name, value in conninfo_to_dict(url).items()}
    except (psycopg.Error, UnicodeError):  # both repeat the URL
        raise ValueError(message) from None


def _split_ports(lists: dict[str, list[str]]) -> None:
    """Move the ports out of `host=h1:p1`, SQLAlchemy's spelling, into a list of their own."""
    pairs = [_HOST_AND_PORT.fullmatch(host) for host in lists.get("host", ())]
    if not any(pair and pair[3] is not None for pair in pairs):
        return
    if "port" in lists:
        raise ValueError("ports beside the hosts and in a parameter of their own")
    hosts = zip(lists["host"], pairs, strict=True)
    lists["host"] = [(pair[1] or pair[2]) if pair else host for host, pair in hosts]
    lists["port"] = [(pair[3] or "") if pair else "" for pair in pairs]


def _hosts(parameters: Mapping[str, str]) -> str:
    """libpq connects to the addresses where both are given."""
    return parameters.get("hostaddr") or parameters.get("host") or ""


def _check_ports(parameters: dict[str, str]) -> None:
    """Refuse what libpq would refuse when it connects, in a message that repeats it."""
    if "port" not in parameters:
        return
    ports = parameters["port"].split(",")
    if not all(map(_is_port, ports)):
        raise ValueError("a port is a number from 1 to 65535")
    hosts = _hosts(parameters)
    if hosts and len(ports) not in (1, hosts.count(",") + 1):
        raise ValueError("neither one port nor one for each host")


def _is_port(text: str) -> bool:
    return not text or (text.isascii() and text.isdigit() and 1 <= int(text) <= _MAX_PORT)
