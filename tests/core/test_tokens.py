"""Tokens: minted ones parse, damaged ones are refused, none shows itself."""

import copy
import pickle
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keylatch.core.tokens import MAX_LENGTH, SCAN_PATTERN, MacKeys, Token, has_valid_checksum

KEYS = MacKeys([b"n" * 32, b"o" * 32])
prefixes = st.from_regex(r"[a-z][a-z0-9]{1,15}", fullmatch=True)
environments = st.from_regex(r"[a-z][a-z0-9]{0,15}", fullmatch=True)
minted = st.builds(KEYS.mint, prefixes, environments)
token_characters = st.sampled_from(string.ascii_letters + string.digits + "_-.~+/=")


@given(minted)
def test_every_minted_token_has_a_valid_mac_and_is_found_by_scanners(token: Token) -> None:
    """A minted token has a valid MAC and at most 96 characters, and found in any text around it."""
    text = token.reveal()
    assert KEYS.verify_mac(Token(text))
    assert len(text) <= MAX_LENGTH
    assert re.findall(SCAN_PATTERN, f"KEY={text};") == [text]
    assert has_valid_checksum(text)
    assert token.key_id == "key_" + text.split("_")[2]
    assert token.partial == f"{text.split('_')[0]}_...{text[-4:]}"


@given(minted, st.data())
def test_one_changed_character_is_refused(token: Token, data: st.DataObject) -> None:
    """Any one character replaced by any other is refused without I/O."""
    text = token.reveal()
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(token_characters.filter(lambda c: c != text[at]))
    assert not KEYS.verify_mac(Token(text[:at] + other + text[at + 1 :]))


@given(minted, st.data())
def test_one_dropped_character_is_refused(token: Token, data: st.DataObject) -> None:
    """Any one character left out is refused."""
    text = token.reveal()
    at = data.draw(st.integers(0, len(text) - 1))
    assert not KEYS.verify_mac(Token(text[:at] + text[at + 1 :]))


@given(minted, st.data())
def test_one_added_character_is_refused(token: Token, data: st.DataObject) -> None:
    """Any one character put in anywhere is refused."""
    text = token.reveal()
    at = data.draw(st.integers(0, len(text)))
    assert not KEYS.verify_mac(Token(text[:at] + data.draw(token_characters) + text[at:]))


@given(minted, st.data())
def test_two_swapped_characters_are_refused(token: Token, data: st.DataObject) -> None:
    """Any two different characters that change places are refused."""
    text = token.reveal()
    one = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.integers(0, len(text) - 1).filter(lambda at: text[at] != text[one]))
    swapped = list(text)
    swapped[one], swapped[other] = swapped[other], swapped[one]
    assert not KEYS.verify_mac(Token("".join(swapped)))


@given(st.text(max_size=120))
def test_any_text_is_refused_without_an_exception(text: str) -> None:
    """Whatever is presented, the answer is no and nothing is raised."""
    assert not KEYS.verify_mac(Token(text))
    assert Token(text).partial == "..."


def test_a_forged_token_with_a_good_crc_is_refused() -> None:
    """A token with a good CRC and another store's MAC is refused."""
    other_token = MacKeys([b"s" * 32]).mint("kl", "live")
    assert has_valid_checksum(other_token.reveal())
    assert not KEYS.verify_mac(other_token)


def test_mac_keys_rotate() -> None:
    """Tokens with the MAC of an older key are accepted; new ones are minted with the newest."""
    old = MacKeys([b"o" * 32])
    assert KEYS.verify_mac(old.mint("kl", "live"))
    assert not old.verify_mac(KEYS.mint("kl", "live"))


def test_a_token_shows_its_masked_form_only() -> None:
    """repr, str, format, %, pickles, copies and iteration do not give the token away."""
    token = KEYS.mint("kl", "live")
    secret = token.reveal().rpartition("_")[2]
    shown = [repr(token), str(token), f"{token}", f"{token:>100}", f"{token!r}", "%s" % token]  # noqa: UP031
    shown += [repr([token]), repr(copy.copy(token)), repr(pickle.loads(pickle.dumps(token)))]
    assert all(secret not in text and token.masked in text for text in shown)
    assert secret.encode() not in pickle.dumps(token)
    with pytest.raises(TypeError):
        list(token)
    assert not hasattr(token, "__dict__")


@pytest.mark.parametrize("prefix", ["", "k", "K1", "k_l", "1k", "k" * 17, "kl\n"])
def test_a_prefix_of_another_form_is_not_minted(prefix: str) -> None:
    """A prefix can never hold the separator or upset the parser."""
    with pytest.raises(ValueError, match="prefix"):
        KEYS.mint(prefix, "live")


@pytest.mark.parametrize("keys", [[], [b"short"]])
def test_weak_mac_keys_are_rejected(keys: list[bytes]) -> None:
    """Without a real key the check would accept all tokens."""
    with pytest.raises(ValueError, match="MAC key"):
        MacKeys(keys)
