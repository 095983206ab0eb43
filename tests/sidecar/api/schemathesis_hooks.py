"""Schemathesis' settings for the sidecar: the caller's key, and rules that no schema can express.

Loaded by schemathesis itself, in a process of its own; see `test_schemathesis.py`.
"""

import asyncio
import os
from typing import Any

import schemathesis
from schemathesis import AuthContext, CheckContext, Response
from schemathesis.checks import CHECKS

from keylatch.authentication.hashing import CHEAPEST, Hasher
from keylatch.engine import Engine
from keylatch.settings import Settings

Case = schemathesis.Case[Any]

ORGANIZATION = "fuzzed"
BEYOND_SCHEMAS = [  # rules about the time, about two fields, and about the key's state
    "must lie in the future",
    "must end before the year 10000",
    "cannot be combined with expiresAt",
    "must have at most 4096 bytes as JSON",
    "The API key was deleted; that is final",
    "No rotation of the API key is under way",
]


@schemathesis.auth()
class AdminKeyAuth:
    """A FULL key; the next one when a case has revoked this one."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        settings = Settings.load(store=os.environ["FUZZED_STORE"], redis="")
        self._engine = Engine(settings, hasher=Hasher("argon2id", CHEAPEST))

    def get(self, case: Case, context: AuthContext) -> str:
        async def create() -> str:
            keyring = await self._engine.keyring()
            return (await keyring.create(ORGANIZATION, "admin_key")).token.reveal()

        return self._runner.run(create())

    def set(self, case: Case, data: str, context: AuthContext) -> None:
        case.headers["Authorization"] = f"Bearer {data}"


@schemathesis.check
def what_a_schema_allows_is_accepted(
    context: CheckContext,
    response: Response,
    case: Case,
) -> Any:
    """`positive_data_acceptance`, but for rules that no schema can tell."""
    if response.status_code == 400 and any(rule in response.text for rule in BEYOND_SCHEMAS):
        return None
    check: Any = CHECKS.get_one("positive_data_acceptance")
    return check(context, response, case)
