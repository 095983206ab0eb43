"""From header values to one token, none, or a refusal: the grammar is ours, not the server's.

Servers differ in what they hand over: two fields as two values or joined by a comma, trailing
blanks kept or stripped, values of two megabytes. So this file leans on none of them. It knows
RFC 6750 section 2.1 (`Bearer` and a b64token), RFC 9110 section 11.1 (the scheme's letter case
does not matter) and section 5.5 (blanks around a value are no part of it). It never guesses
between two credentials and never looks into the query, a cookie or the body.
"""

import re
from collections.abc import Sequence
from typing import Final

from keylatch.model import Reason
from keylatch.tokens import Token

MAX_VALUE_BYTES: Final = 512

_BEARER: Final = re.compile(rb"[ \t]*[Bb][Ee][Aa][Rr][Ee][Rr] +([A-Za-z0-9\-._~+/=]+)[ \t]*")
# RFC 9110 section 5.6.2: the characters that a scheme's name is made of, but for the quote, which
# no scheme has and a badly quoted shell line does.
_SCHEME: Final = re.compile(rb"[ \t]*([\w!#$%&*+.^`|~-]+)(?:[ \t]|\Z)")


def read(values: Sequence[bytes]) -> Token | Reason:
    """The one token among the values of a request's `Authorization` fields.

    Args:
        values: one entry for each field, as it came over the wire.

    Returns:
        the token, `Reason.MISSING` where no bearer credential was sent, or `Reason.MALFORMED`
        where the value is ambiguous, too long, or not of the grammar.
    """
    if not values:
        return Reason.MISSING
    if len(values) > 1 or len(values[0]) > MAX_VALUE_BYTES:
        return Reason.MALFORMED
    match = _BEARER.fullmatch(values[0])
    if match is not None:
        return Token(match[1].decode("ascii"))
    if not values[0].strip(b" \t"):
        return Reason.MISSING
    scheme = _SCHEME.match(values[0])
    if scheme is not None and scheme[1].lower() != b"bearer":
        return Reason.MISSING
    return Reason.MALFORMED


def is_identity_header(name: bytes) -> bool:
    """Whether a request header's name could be read as one of keylatch's identity headers.

    Any letter case and any mix of `-` and `_` counts: WSGI and CGI fold them into one name, and
    whoever spells it the odd way would otherwise speak for a key (Django CVE-2015-0219).
    """
    return name[:1] in b"xX" and name.replace(b"_", b"-").lower().startswith(b"x-keylatch-")
