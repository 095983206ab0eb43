"""One meaning for a path: the view that a router chooses is one that this key may call.

The property is tried on generated targets (`path_space`) against one site in every framework
(`path_sites`), in this process and on real servers. A twin that compares text must be caught by it.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.adapters import grammar, path_servers
from tests.adapters.path_calls import IN_PROCESS, Site
from tests.adapters.path_servers import SERVERS, Server
from tests.adapters.path_space import Target, targets
from tests.support.engines import Times
from tests.support.path_sites import ALLOWED, ANONYMOUS, FULL, SENDING

CALLERS: Final = (ANONYMOUS, SENDING)


def wrong_calls(site: Any, tried: Iterator[Target]) -> tuple[list[str], Counter[tuple[str, str]]]:
    """Every call of a view that this caller may not call, and how often each was called at all."""
    wrong: list[str] = []
    called: Counter[tuple[str, str]] = Counter()
    for target in tried:
        for caller in CALLERS:
            name = site.view(target, caller)
            if name is not None:
                called[name, caller] += 1
                if caller not in callers_of(name, target.method):
                    wrong.append(f"{caller} called {name!r} by {target}")
    return wrong, called


def callers_of(name: str, method: str) -> frozenset[str]:
    """Which keys may call a view by a method. Frameworks take `get` for GET."""
    method = method.upper()
    return ALLOWED[name].get("GET" if method == "HEAD" else method, frozenset({FULL}))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", IN_PROCESS)
def test_no_path_leads_to_a_view_that_the_key_may_not_call(name: str, times: Times) -> None:
    """Control characters, slashes, dots, encodings, letter case, Unicode forms, suffixes, root
    paths and mounts: whatever the router makes of them, with a SENDING key and with none."""
    with Site(name) as site:
        wrong, called = wrong_calls(site, targets(seed=1, count=times(400, 12_000)))
    assert wrong == []
    assert called["docs", ANONYMOUS] > 0, "what is public is served"
    assert called["email", SENDING] > 0, "and what the rules open"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> grammar.Keys:
    """One store with a SENDING key, for all servers."""
    return grammar.Keys.minted(tmp_path_factory.mktemp("paths"))


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("server", SERVERS, ids=lambda server: server.name)
def test_no_request_on_a_real_server_does(server: Server, keys: grammar.Keys, times: Times) -> None:
    """The same targets, byte for byte, through the parsers of seven servers; daphne's clients
    choose the root path in a header, too."""
    count = times(100, 1_000)
    tried = targets(seed=2, count=count, rooted=bool(server.root), below=server.below)
    with path_servers.served(server, keys) as site:
        wrong, called = wrong_calls(site, tried)
    assert wrong == []
    assert called.total() > 0


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_twin_that_compares_text_is_caught(name: str) -> None:
    """The same property fails for it, on every router."""
    with Site(name, is_twin=True) as twin:
        wrong, _ = wrong_calls(twin, targets(seed=1, count=400))
    assert len(wrong) >= 1
