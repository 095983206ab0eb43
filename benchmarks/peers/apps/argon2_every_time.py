"""Keys treated as passwords: the database and argon2 on every request, with argon2-cffi's defaults.

It runs in threads, so that the event loop stays free; a second processor helps.
"""

import asyncio
import os
import secrets
import sqlite3

from argon2 import PasswordHasher
from argon2.exceptions import VerificationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

DATABASE = os.environ["PEER_FOLDER"] + "/argon2.db"
hasher = PasswordHasher()


def owner_of(token: str) -> str | None:
    """Whose key it is."""
    key_id, _, secret = token.partition(".")
    with sqlite3.connect(DATABASE) as database:
        found = database.execute("SELECT owner, hash FROM keys WHERE id = ?", (key_id,)).fetchone()
    try:
        return found[0] if found and hasher.verify(found[1], secret) else None
    except VerificationError:
        return None


class CheckedKeys:
    """Lets good keys in."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        token = b""
        for name, value in scope["headers"]:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                token = value[7:]
        owner = await asyncio.to_thread(owner_of, token.decode("latin-1"))
        if owner is None:
            refusal = PlainTextResponse("Unauthorized", 401, {"WWW-Authenticate": "Bearer"})
            return await refusal(scope, receive, send)
        return await self.app({**scope, "user": owner}, receive, send)


async def hello(request: Request) -> PlainTextResponse:
    """The work of both routes."""
    return PlainTextResponse("hello")


routes = [Route("/open", hello), Route("/protected", hello)]
unguarded = Starlette(routes=routes)
guarded = Starlette(routes=routes)
guarded.add_middleware(CheckedKeys)


async def app(scope, receive, send):
    """The open route meets no middleware."""
    chosen = unguarded if scope.get("path") == "/open" else guarded
    await chosen(scope, receive, send)


if __name__ == "__main__":
    key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    with sqlite3.connect(DATABASE) as database:
        database.execute("CREATE TABLE keys (id TEXT PRIMARY KEY, owner TEXT, hash TEXT)")
        database.execute("INSERT INTO keys VALUES (?, 'me', ?)", (key_id, hasher.hash(secret)))
    print(f"{key_id}.{secret}")
