"""The same bytes on every server, and ten thousands of inputs that no server ever saw."""

import re
from collections.abc import Sequence

import pytest

from keylatch.core.decisions import Reason
from keylatch.core.tokens import Token
from tests.adapters import grammar
from tests.adapters.grammar import CASES, SERVERS, Keys, Server
from tests.core import fuzz_credentials


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """One store with keys of every kind, for all servers."""
    return Keys.minted(tmp_path_factory.mktemp("grammar"))


@pytest.mark.long
@pytest.mark.parametrize("server", SERVERS, ids=lambda server: server.name)
def test_every_server_gives_the_answers_of_the_table(server: Server, keys: Keys) -> None:
    """Byte for byte: refused and accepted requests, and those that the server refuses by itself."""
    for package in server.packages:
        pytest.importorskip(package)
    with grammar.serving(server, keys) as served:
        wrong = [cell.wrong for cell in map(served.run_case, CASES) if cell.wrong]
    assert not wrong, "\n".join(wrong)


@pytest.mark.long
def test_a_naive_twin_is_found_out(keys: Keys) -> None:
    """The table is no rubber stamp: guessing, stripping and trusting show as wrong cells."""
    with grammar.serving(grammar.H11, keys, app="naive") as served:
        wrong = {cell.case.name for cell in map(served.run_case, CASES) if cell.wrong}
    assert wrong >= {
        "two equal fields",
        "two unequal fields",
        "Basic field, then Bearer",
        "two keys, comma",
        "tab as separator",
        "quoted key",
        "a key without a scheme",
        "a value of 513 bytes",
        "fold with a second key",
        "two fields, then good",
        "X_Keylatch_Key_Id",
        "identity on a public path",
    }
    assert "a good key" not in wrong, "it is a twin, not a wreck"


def test_the_table_says_why() -> None:
    """Names are unique, and every exception of a server has its reason, and no reason none."""
    assert len(CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)
    assert [case.name for case in CASES if bool(case.but) != bool(case.why)] == []
    assert [case.name for case in CASES if case.expected in case.but.values()] == []


def test_who_passes_here_passes_there() -> None:
    """No request passes on one server and is refused by keylatch on another one, but for those
    that the servers hand over as different requests, to keylatch and app alike."""
    assert [case.name for case in CASES if grammar.is_read_differently(case)] == [
        "key in a trailer",
        "fold with a tab as separator",
        "public path, two slashes",
        "public path, fragment",
        "public path, absolute form",
        "SENDING parameter, get",
    ]


def test_no_input_breaks_the_parsers() -> None:
    """20,000 mutants: no exception, no token beyond the grammar, and joined is as apart."""
    report = fuzz_credentials.fuzz(seed=1, count=20_000)
    assert report.failures == []
    assert set(report.kinds) == {
        "MISSING",
        "MALFORMED",
        "accepted, minted here",
        "accepted, of another store",
    }
    assert min(report.kinds.values()) > 200, "each outcome is met often"


def test_the_fuzzer_finds_a_naive_parser_out() -> None:
    """It says with which input and seed."""

    def naive(values: Sequence[bytes]) -> Token | Reason:
        match = re.fullmatch(rb"\s*bearer\s+([\x21-\x7e]+)\s*", b"".join(values[-1:]), re.I)
        return Token(match[1].decode()) if match else Reason.MISSING

    failures = fuzz_credentials.fuzz(seed=1, count=2_000, reader=naive).failures
    assert len(failures) > 20
    assert failures[0].startswith("seed 1, input ")
    assert fuzz_credentials.fuzz(seed=1, count=2_000, reader=naive).failures == failures
