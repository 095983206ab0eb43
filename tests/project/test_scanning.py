"""The scanners' configurations in `deploy/scanning`: what they find is what keylatch mints."""

import math
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import re2
import yaml
from hypothesis import given
from hypothesis import strategies as st

from keylatch.core.tokens import MacKeys, Token, has_valid_checksum

FOLDER = Path(__file__).parents[2] / "deploy" / "scanning"
GITLEAKS = tomllib.loads((FOLDER / "gitleaks.toml").read_text())
TRUFFLEHOG = yaml.safe_load((FOLDER / "trufflehog.yaml").read_text())
GITHUB = yaml.safe_load((FOLDER / "github.yaml").read_text())
[RULE] = GITLEAKS["rules"]
[DETECTOR] = TRUFFLEHOG["detectors"]
GITHUBS = "(?:{before_secret})({secret_format})(?:{after_secret})".format(**GITHUB)

# RE2 is what gitleaks and trufflehog run: it refuses whatever they would refuse (lookarounds).
EXPRESSIONS = {
    "gitleaks": re2.compile(RULE["regex"]),
    "trufflehog": re2.compile(DETECTOR["regex"]["token"]),
    "github": re2.compile(GITHUBS),
}
PREFIXES = ["kl", "acme", "a1", "x" * 16, "sk9live"]
KEYS = MacKeys([b"n" * 32])
minted = st.builds(
    KEYS.mint,
    st.sampled_from(PREFIXES) | st.from_regex(r"[a-z][a-z0-9]{1,15}", fullmatch=True),
    st.sampled_from(["live", "test"]) | st.from_regex(r"[a-z][a-z0-9]{0,15}", fullmatch=True),
)
Scanner = Callable[[str], list[str]]


@pytest.fixture(params=list(EXPRESSIONS))
def scan(request: pytest.FixtureRequest) -> Scanner:
    """What a scanner reports of a text: each match's first group."""
    expression = EXPRESSIONS[request.param]
    return lambda text: [match.group(1) for match in expression.finditer(text)]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "around",
    ["{}", "KEY={}", '"{}"', "KEY_{}", "?key={}&x", "%20{}", "`{}`.", "{}\n", "\t{},", "a:{}_old"],
)
def test_keys_are_found_where_they_leak(scan: Scanner, prefix: str, around: str) -> None:
    """In code, shells, URLs and prose, whatever the prefix."""
    token = KEYS.mint(prefix, "live").reveal()
    assert scan(around.format(token)) == [token]


@pytest.mark.long
@given(st.lists(minted, min_size=1, max_size=4), st.sampled_from(["\n", " ", "\r\n", "', '"]))
def test_every_minted_token_is_found(tokens: list[Token], between: str) -> None:
    """All of a list, whatever separates them."""
    texts = [token.reveal() for token in tokens]
    for name, expression in EXPRESSIONS.items():
        found = [match.group(1) for match in expression.finditer(between.join(texts))]
        # Joined into one expression, GitHub's three parts take a character on each side along.
        assert found == texts or (name == "github" and len(between) == 1), name
        assert all(has_valid_checksum(text) for text in found)


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t[:-1],
        lambda t: t + "0",
        lambda t: t.replace("_", "-"),
        lambda t: t.replace("kl_", "Kl_"),
        lambda t: t.replace("kl_", "k_"),
        lambda t: t.replace("live", "LIVE"),
        lambda t: t.replace("live", ""),
        lambda t: t[:20] + "." + t[21:],
        lambda t: "kl_" + t.partition("_live_")[2],
        lambda t: t.replace("kl_", "x" * 17 + "_"),
    ],
)
def test_near_misses_are_not_reported(scan: Scanner, damage: Callable[[str], str]) -> None:
    """A scanner that cries wolf is switched off."""
    assert scan(damage(KEYS.mint("kl", "live").reveal())) == []


def entropy(text: str) -> float:
    """Shannon's, in bits a character, as both programs compute it."""
    shares = [count / len(text) for count in Counter(text).values()]
    return -sum(share * math.log2(share) for share in shares)


@given(minted)
def test_no_key_is_too_plain_for_the_threshold(token: Token) -> None:
    """What is minted lies well above it, and what stands in documentation below."""
    for threshold in (RULE["entropy"], DETECTOR["entropy"]):
        assert entropy(token.reveal()) > threshold
        for letter in "Xx0a":
            assert entropy(f"kl_live_{letter * 12}_{letter * 41}") < threshold


@given(minted)
def test_trufflehogs_keywords_stand_in_every_key_of_usual_settings(token: Token) -> None:
    """It tries the expression only where one of them is; the file says what to add."""
    prefix, environment = token.reveal().split("_")[:2]
    is_usual = prefix == "kl" or environment in ("live", "test")
    has_one = any(keyword in f"_{token.reveal()}" for keyword in DETECTOR["keywords"])
    assert has_one or not is_usual


def test_the_files_have_the_shape_that_is_documented() -> None:
    """The fields that the programs know, and no other."""
    known = {"id", "description", "regex", "secretGroup", "entropy", "tags"}
    assert (set(RULE), GITLEAKS["extend"]) == (known, {"useDefault": True})
    assert set(DETECTOR) == {"name", "description", "keywords", "regex", "entropy"}
    assert RULE["secretGroup"] == 1


def test_githubs_test_string_matches() -> None:
    """GitHub wants one before it takes a pattern. It is no key: its CRC-32 is wrong."""
    [match] = EXPRESSIONS["github"].finditer(GITHUB["test_string"])
    assert not has_valid_checksum(match.group(1))


def test_a_rule_for_one_prefix_would_miss_the_others() -> None:
    """The broken twin: an expression made from a single example."""
    twin = re2.compile(r"\bkl_live_[0-9A-Za-z]{12}_[0-9A-Za-z]{41}\b")
    found: list[Any] = [twin.search(KEYS.mint(prefix, "test").reveal()) for prefix in PREFIXES]
    assert found == [None] * len(PREFIXES)
