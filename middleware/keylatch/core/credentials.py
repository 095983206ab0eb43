"""Parses the values of `Authorization` into one token, none, or a refusal.

Servers differ in the values they pass on: two fields as two values (ASGI) or joined by a comma
(WSGI), trailing blanks kept or stripped, values of two megabytes. So this file relies on none of
them and joins separate values (RFC 9110 section 5.3): the same fields get the same answer on every
server. It implements RFC 6750 section 2.1 (`Bearer`, blanks, the characters of a b64token), RFC
9110 section 11.1 (the letter case of the scheme does not matter) and section 5.5 (blanks around a
value are not part of it). It never chooses between two credentials, and never reads the query, a
cookie or the body.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Final

from keylatch.core.decisions import Reason
from keylatch.core.tokens import Token

MAX_VALUE_BYTES: Final = 512

_BEARER: Final = re.compile(rb"[ \t]*[Bb][Ee][Aa][Rr][Ee][Rr] +([A-Za-z0-9\-._~+/=]+)[ \t]*")
# RFC 9110 section 5.6.2: the characters of a scheme's name, without the quote: no scheme has one,
# but a shell command with wrong quoting sends one.
_SCHEME: Final = re.compile(rb"[ \t]*([\w!#$%&*+.^`|~-]+)(?:[ \t]|\Z)")
_QUOTED: Final = re.compile(rb'"[^"]*"')
# After a comma another credential, or nothing; the parameters of Digest are `name = value`.
_NEXT_CREDENTIAL: Final = re.compile(
    rb",[ \t]*(?:[\w!#$%&*+.^`|~-]+(?:[ \t]+(?=[^=\s])|[ \t]*(?=,|\Z))|(?=,|\Z))"
)


# The tokens of Laravel Sanctum; RFC 6750 does not allow the vertical bar.
_BEARER_WITH_PIPE: Final = re.compile(
    rb"[ \t]*[Bb][Ee][Aa][Rr][Ee][Rr] +([0-9]{1,20}\|[A-Za-z0-9]{40,64})[ \t]*"
)


def read(values: Sequence[bytes], *, allow_pipe: bool = False) -> Token | Reason:
    """The one token among the values of a request's `Authorization` fields.

    Args:
        values: one entry for each field, as received.
        allow_pipe: whether to accept Laravel Sanctum's tokens, `{number}|{40 to 64 characters}`.

    Returns:
        the token, `Reason.MISSING` if no bearer credential was sent, or `Reason.MALFORMED` if the
        value is ambiguous, too long, or does not match the grammar.
    """
    if not values:
        return Reason.MISSING
    value = values[0] if len(values) == 1 else b",".join(values)
    if len(value) > MAX_VALUE_BYTES:
        return Reason.MALFORMED
    match = _BEARER.fullmatch(value) or (_BEARER_WITH_PIPE.fullmatch(value) if allow_pipe else None)
    if match is not None:
        return Token(match[1].decode("ascii"))
    if not value.strip(b" \t"):
        return Reason.MISSING
    scheme = _SCHEME.match(value)
    if (
        scheme is None
        or scheme[1].lower() == b"bearer"
        or _NEXT_CREDENTIAL.search(_QUOTED.sub(b"", value))
    ):
        return Reason.MALFORMED
    return Reason.MISSING


def scan_headers(headers: Iterable[tuple[bytes, bytes]]) -> tuple[list[bytes], bool]:
    """The values of `Authorization`, and whether another header is one of keylatch's identity
    headers.

    ASGI requires lower-case names; names in another case are recognised as well.
    """
    values = []
    has_identity_header = False
    for name, value in headers:
        if name in _IGNORED_NAMES:
            continue
        if name == _AUTHORIZATION or name.lower() == _AUTHORIZATION:
            values.append(value)
        elif is_identity_header(name):
            has_identity_header = True
        elif len(_IGNORED_NAMES) < _MAX_IGNORED_NAMES and len(name) <= _MAX_IGNORED_NAME_BYTES:
            _IGNORED_NAMES.add(name)
    return values, has_identity_header


_AUTHORIZATION: Final = b"authorization"
_IGNORED_NAMES: Final[set[bytes]] = set()
"""Names that are neither, so that they are examined once. Clients can fill it with arbitrary names;
then further names are examined each time."""
_MAX_IGNORED_NAMES: Final = 1_000
_MAX_IGNORED_NAME_BYTES: Final = 64


def is_identity_header(name: bytes) -> bool:
    """Whether a header name could be read as one of keylatch's identity headers.

    In any letter case and with any mix of `-` and `_`: WSGI and CGI map these to one name, so a
    client could otherwise impersonate a key with another spelling (Django CVE-2015-0219).
    """
    return name[:1] in b"xX" and name.replace(b"_", b"-").lower().startswith(b"x-keylatch-")
