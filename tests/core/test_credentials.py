"""Credentials: exactly the documented grammar is accepted, and whatever comes is answered."""

import string
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keylatch.core.credentials import MAX_VALUE_BYTES, is_identity_header, read
from keylatch.core.decisions import Reason
from keylatch.core.tokens import Token

B64TOKEN = frozenset((string.ascii_letters + string.digits + "-._~+/=").encode())
# Those of RFC 9110 but for the quote: no scheme has one, a badly quoted shell line does.
TCHAR = frozenset((string.ascii_letters + string.digits + "!#$%&*+-.^_`|~").encode())


def understood(values: Sequence[bytes]) -> bytes | Reason:
    """The grammar once more, without regular expressions: what `read` must say."""
    if not values:
        return Reason.MISSING
    value = b",".join(values)
    if len(value) > 512:
        return Reason.MALFORMED
    value = value.strip(b" \t")
    if not value:
        return Reason.MISSING
    scheme, blank, token = value.partition(b" ")
    if scheme.lower() == b"bearer" and blank and set(token.lstrip(b" ")) <= B64TOKEN:
        return token.lstrip(b" ")
    scheme = value.replace(b"\t", b" ").partition(b" ")[0]
    another = set(scheme) <= TCHAR and scheme.lower() != b"bearer"
    return Reason.MISSING if another and not two_in(value) else Reason.MALFORMED


def two_in(value: bytes) -> bool:
    """Whether a second credential, or an empty one, follows behind a comma outside of quotes."""
    parts = value.split(b'"')
    closed = parts if len(parts) % 2 else [*parts[:-2], b'"'.join(parts[-2:])]
    for piece in b"".join(closed[::2]).split(b",")[1:]:
        word, rest = piece.lstrip(b" \t"), b""
        while word and not set(word) <= TCHAR:
            word, rest = word[:-1], word[-1:] + rest
        if not rest or (word and not rest.strip(b" \t")):
            return True
        after = rest.lstrip(b" \t")
        if word and after != rest and not after[:1].isspace() and after[:1] != b"=":
            return True
    return False


def said(values: Sequence[bytes]) -> bytes | Reason:
    answer = read(values)
    return answer.reveal().encode() if isinstance(answer, Token) else answer


pieces = st.sampled_from(
    [b"Bearer", b"bearer", b"bEARER", b"Basic", b"Bearer ", b" ", b"  ", b"\t", b",", b", ", b"="]
    + [b"kl_live_abc", b"a", b"~+/.-_=", b'"', b"'", b"%41", b":", b";", b"\n", b"\r", b"\x00"]
    + [b"\x0b", b"\x0c", b"\x1b", b"\x7f", b"\x80", b"\x85", b"\xa0", b"\xff", b"a" * 500]
)
near_misses = st.lists(pieces, max_size=7).map(b"".join)
one_value = near_misses | st.binary(max_size=40) | st.binary(min_size=500, max_size=530)


@pytest.mark.long
@settings(max_examples=500)
@given(one_value)
@example(b"Bearer\ta")
@example(b"Bearer \ta")
@example(b"Bearer a b")
@example(b"Bearer,a")
@example(b"Bearer " + b"a" * 505)
@example(b"Bearer " + b"a" * 506)
@example(b" " * 513)
@example(b"Bearer a\n")
def test_a_value_is_understood_as_documented(value: bytes) -> None:
    """Token, none or malformed: for any bytes, the same as by the grammar written twice."""
    assert said([value]) == understood([value])


@given(st.lists(one_value, min_size=2, max_size=4))
def test_two_fields_are_what_a_server_makes_of_them(values: list[bytes]) -> None:
    """ASGI servers hand two fields over, WSGI servers join them: one answer, and never a token."""
    assert said(values) == said([b",".join(values)]) == understood(values)
    assert not isinstance(read(values), Token)


@pytest.mark.parametrize("other", [b"Bearer a", b"Bearer b", b"Basic Zm9v", b"", b" ", b"Bearer"])
@pytest.mark.parametrize("comma", [b",", b", "])
@pytest.mark.parametrize("turned", [False, True])
def test_two_credentials_are_never_chosen_between(other: bytes, comma: bytes, turned: bool) -> None:
    """Two fields are malformed, even if they are equal or one is empty, also where joined."""
    for one in (b"Bearer a", b"Basic Zm9v"):
        values = [other, one] if turned else [one, other]
        assert read(values) is Reason.MALFORMED
        assert read([comma.join(values)]) is Reason.MALFORMED


@pytest.mark.parametrize(
    "value",
    [b'Digest username="a, Bearer b", realm = "c",qop=auth', b"Basic Zm9v", b"AWS4 a=b, c=d"],
)
def test_a_single_credential_of_another_scheme_is_none_of_ours(value: bytes) -> None:
    """Parameters behind a comma are no second credential."""
    assert read([value]) is Reason.MISSING


@given(
    st.sampled_from([b"Bearer", b"bearer", b"BEARER", b"bEaReR"]),
    st.integers(1, 9),
    st.binary(min_size=1, max_size=400).map(lambda raw: bytes(b"aZ0-._~+/="[b % 10] for b in raw)),
    st.sampled_from([b"", b" ", b"\t", b" \t "]),
    st.sampled_from([b"", b" ", b"\t", b" \t "]),
)
def test_every_b64token_is_accepted(
    scheme: bytes, blanks: int, token: bytes, before: bytes, after: bytes
) -> None:
    """RFC 6750, 2.1, in any letter case and between any blanks: the token arrives unchanged."""
    assert said([before + scheme + b" " * blanks + token + after]) == token


@given(near_misses, near_misses)
def test_joined_fields_are_no_token(one: bytes, other: bytes) -> None:
    """WSGI servers join two fields with a comma: that never makes a token of two values."""
    assert not isinstance(read([b"Bearer " + one + b"," + other]), Token)


def test_no_field_is_no_credential() -> None:
    """Nothing sent is nothing to complain about."""
    assert read([]) is Reason.MISSING


BARRED = b"17|" + b"Ab0" * 16


@pytest.mark.parametrize("value", [b"Bearer " + BARRED, b" bearer  " + BARRED + b" "])
def test_a_bar_is_read_where_it_is_welcome(value: bytes) -> None:
    """Laravel Sanctum's tokens have one, and RFC 6750 has none."""
    assert read([value]) is Reason.MALFORMED
    token = read([value], allow_pipe=True)
    assert isinstance(token, Token)
    assert token.reveal() == BARRED.decode()


@pytest.mark.parametrize(
    "token",
    [
        *(b"17|" + b"a" * 39, b"17|" + b"a" * 65, b"|" + b"a" * 48, b"x7|" + b"a" * 48),
        *(BARRED + b"|", b"17||" + b"a" * 48, b"17|a_" + b"a" * 46, b"1" * 21 + b"|" + b"a" * 48),
        *(b"17%7C" + b"a" * 48, BARRED + b", Bearer " + BARRED, BARRED + b"\n"),
    ],
)
def test_a_pipe_elsewhere_is_malformed_even_if_pipes_are_allowed(token: bytes) -> None:
    """In that one shape and in no other."""
    assert read([b"Bearer " + token], allow_pipe=True) is Reason.MALFORMED


@given(st.lists(st.binary(max_size=80), max_size=2))
def test_allowing_a_pipe_changes_nothing_else(values: list[bytes]) -> None:
    """Every other value is read as without `allow_pipe`."""
    if not any(b"|" in value for value in values):
        without_pipe, with_pipe = read(values), read(values, allow_pipe=True)
        texts = [
            each.reveal() if isinstance(each, Token) else each for each in (without_pipe, with_pipe)
        ]
        assert texts[0] == texts[1]


def test_the_limit_is_the_documented_one() -> None:
    """512 bytes, blanks included."""
    assert MAX_VALUE_BYTES == 512


@given(st.text(st.sampled_from("xX"), min_size=1, max_size=1), st.data())
def test_every_spelling_of_an_identity_header_is_recognised(x: str, data: st.DataObject) -> None:
    """Any letter case and any mix of `-` and `_`: CGI makes one name of all of them."""
    letters = [data.draw(st.sampled_from([c.lower(), c.upper()])) for c in "keylatch"]
    first, second = data.draw(st.tuples(*[st.sampled_from("-_")] * 2))
    rest = data.draw(st.text(string.ascii_letters + "-_", max_size=12))
    assert is_identity_header(f"{x}{first}{''.join(letters)}{second}{rest}".encode())


@given(st.binary(max_size=30))
@example(b"")
@example(b"x")
def test_what_is_dropped_is_what_cgi_would_fold_together(name: bytes) -> None:
    """A name is one of keylatch's if and only if CGI spells it HTTP_X_KEYLATCH_…"""
    folded = b"HTTP_" + name.upper().replace(b"-", b"_")  # RFC 3875 section 4.1.18
    assert is_identity_header(name) == folded.startswith(b"HTTP_X_KEYLATCH_")


@pytest.mark.parametrize("name", [b"x-keylatch", b"x-keylatchy-id", b"keylatch-key-id", b"x-k"])
def test_other_headers_are_left_alone(name: bytes) -> None:
    """Neighbours are not ours to drop."""
    assert not is_identity_header(name)
