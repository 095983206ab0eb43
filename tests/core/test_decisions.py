"""What requests share is immutable."""

import copy
import pickle

import pytest

from keylatch.core.decisions import Allow, Principal

PRINCIPAL = Principal("key_a", "ci", "acme", "SENDING", "live")


def test_a_principal_cannot_be_changed() -> None:
    """All requests with a key share one: a request that promoted its own would promote all."""
    with pytest.raises(AttributeError, match="shared"):
        PRINCIPAL.permission = "FULL"
    with pytest.raises(AttributeError, match="shared"):
        del PRINCIPAL.permission
    assert PRINCIPAL.permission == "SENDING"


def test_scopes_cannot_be_changed() -> None:
    """All requests with a permission share them."""
    shared = Allow(PRINCIPAL).credentials
    assert shared is Allow(PRINCIPAL).credentials
    with pytest.raises(AttributeError):
        shared.scopes.append("FULL")
    with pytest.raises(AttributeError, match="shared"):
        shared.scopes = ["FULL"]
    assert ("SENDING" in shared.scopes, "FULL" in shared.scopes) == (True, False)


def test_a_principal_travels_whole() -> None:
    """To a queue, or into a copy."""
    assert pickle.loads(pickle.dumps(PRINCIPAL)) == copy.deepcopy(PRINCIPAL) == PRINCIPAL
