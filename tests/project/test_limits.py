"""The table of limits in SECURITY.md says the numbers of the code, and names tests that exist."""

import re
from pathlib import Path

import pytest

from keylatch_sidecar.http_server import limits
from keylatch_sidecar.http_server.http_methods import AnyMethod
from keylatch_sidecar.http_server.limits import Limits

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "SECURITY.md").read_text().partition("\n## Limits\n")[2].partition("\n## ")[0]
ROWS = [row.strip("|").split(" | ") for row in SECTION.splitlines() if row.startswith("| ")][1:]


@pytest.mark.parametrize(
    ("resource", "expected"),
    [
        ("header fields", f"{limits.HEAD_BYTES // 1024} KiB, then 431"),
        ("request's head", f"{limits.HEAD_SECONDS:g} s from its first byte, then 408"),
        ("send a body", f"{limits.BODY_SECONDS:g} s from the end of the head, then 408"),
        ("read an answer", f"{limits.ANSWER_SECONDS:g} s for each 64 KiB"),
        ("between two requests", f"{limits.IDLE_SECONDS} s"),
        ("connections of a process", f"{limits.CONNECTIONS_SHARE:.0%} of".replace("%", " %")),
        ("connections of a process", f"asks for {limits.MAX_DESCRIPTORS}"),
        ("connections of a process", f"without {limits.MIN_DESCRIPTORS} does not start"),
        ("a check over gRPC", f"{limits.GRPC_MESSAGE_BYTES // 1024} KiB, then RESOURCE_EXHAUSTED"),
        ("a check over gRPC", f"{limits.GRPC_HEADERS} headers"),
        ("calls over gRPC", f"{limits.GRPC_CALLS}, then RESOURCE_EXHAUSTED"),
        ("connections over gRPC", f"{limits.GRPC_CONNECTIONS_SHARE:.0%}".replace("%", " %")),
        ("connections over gRPC", f"after {limits.HEAD_SECONDS:g} s without HTTP/2"),
        ("connections over gRPC", f"after {limits.GRPC_IDLE_SECONDS} s without a call"),
    ],
)
def test_the_table_says_what_the_code_does(resource: str, expected: str) -> None:
    """Each number once, in the row of its resource."""
    [row] = [row for row in ROWS if resource in row[0]]
    assert expected in row[1]


def test_what_is_served_has_these_limits() -> None:
    """The defaults, and no others."""
    assert AnyMethod.limits == Limits()
    for name in Limits.__slots__:
        assert getattr(Limits(), name) == getattr(limits, name.upper())


def test_each_row_names_a_test() -> None:
    """That exists, beside the code that holds the limit."""
    for row in ROWS:
        named = re.findall(r"`(tests/[^`]+)`", row[2])
        assert named, row[0]
        assert [each for each in named if not (ROOT / each).exists()] == []
