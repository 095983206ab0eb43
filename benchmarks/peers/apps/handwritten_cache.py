"""What a careful developer writes in an afternoon: argon2 in SQLite, and a dict in front of it.

A pure ASGI middleware remembers the SHA-256 of tokens that were good for a minute (`cachetools`).
For as long a revoked key is still accepted, in each process by its own clock.
"""

import asyncio
import hashlib
import os
import secrets
import sqlite3

from argon2 import PasswordHasher
from argon2.exceptions import VerificationError
from cachetools import TTLCache
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

DATABASE = os.environ["PEER_FOLDER"] + "/handwritten.db"
hasher = PasswordHasher()


def owner_of(token: str) -> str | None:
    """The organisation of a key, by the database and argon2; it takes a tenth of a second."""
    key_id, _, secret = token.partition(".")
    with sqlite3.connect(DATABASE) as database:
        found = database.execute("SELECT owner, hash FROM keys WHERE id = ?", (key_id,)).fetchone()
    try:
        return found[0] if found and hasher.verify(found[1], secret) else None
    except VerificationError:
        return None


class CachedKeys:
    """Lets good keys in."""

    def __init__(self, app):
        self.app = app
        self.known = TTLCache(maxsize=10_000, ttl=60)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        token = b""
        for name, value in scope["headers"]:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                token = value[7:]
        digest = hashlib.sha256(token).digest()
        owner = self.known.get(digest)
        if owner is None:
            owner = await asyncio.to_thread(owner_of, token.decode("latin-1"))
            if owner is None:
                refusal = PlainTextResponse("Unauthorized", 401, {"WWW-Authenticate": "Bearer"})
                return await refusal(scope, receive, send)
            self.known[digest] = owner
        return await self.app({**scope, "user": owner}, receive, send)


async def hello(request: Request) -> PlainTextResponse:
    """The work of both routes."""
    return PlainTextResponse("hello")


routes = [Route("/open", hello), Route("/protected", hello)]
unguarded = Starlette(routes=routes)
guarded = Starlette(routes=routes)
guarded.add_middleware(CachedKeys)


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
