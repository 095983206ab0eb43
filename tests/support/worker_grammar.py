"""One protected app in both protocols, for every server of `grammar`, and a naive twin of it.

The app says what it was handed: whose key it is, how many bytes of body it read, and which header
names beginning with x it saw. It records every call in a file before it answers, so the file shows
whether a refused request reached it.
"""

import json
import os
from collections.abc import Iterable
from typing import Any, Final
from wsgiref.types import StartResponse, WSGIEnvironment

from starlette.types import Receive, Scope, Send

from keylatch.asgi import APIKeyMiddleware as ASGIMiddleware
from keylatch.wsgi import APIKeyMiddleware as WSGIMiddleware

RULES: Final[dict[str, Any]] = {
    "public": ["/healthz", "/docs/{page}"],
    "permissions": {"SENDING": ["POST /v1/emails", "GET /v1/emails/{id}"]},
}
CALLS: Final = os.open(os.environ["GRAMMAR_CALLS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def said(key_id: str | None, body_bytes: int, names: Iterable[str]) -> bytes:
    """The app's answer; `-` and `_` in names are one, as they are in WSGI."""
    x = sorted({name.lower().replace("_", "-") for name in names if name[:1] in "xX"})
    return json.dumps({"key_id": key_id, "body_bytes": body_bytes, "x": x}).encode()


async def hello_asgi(scope: Scope, receive: Receive, send: Send) -> None:
    """The app over ASGI."""
    assert scope["type"] == "http"
    os.write(CALLS, b".")
    body_bytes, more = 0, True
    while more:
        message = await receive()
        body_bytes += len(message.get("body", b""))
        more = message.get("more_body", False)
    names = [name.decode("latin-1") for name, _ in scope["headers"]]
    body = said(getattr(scope["user"], "key_id", None), body_bytes, names)
    length = (b"content-length", str(len(body)).encode())
    headers = [(b"content-type", b"application/json"), length]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def hello_wsgi(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    """The app over WSGI."""
    os.write(CALLS, b".")
    body_bytes = len(environ["wsgi.input"].read())
    names = [name[5:] for name in environ if name.startswith("HTTP_")]
    body = said(getattr(environ["keylatch.principal"], "key_id", None), body_bytes, names)
    length = ("content-length", str(len(body)))
    start_response("200 OK", [("content-type", "application/json"), length])
    return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]


class Naive:
    """What is soon written: the last field counts, the last word of it is the key, and no header
    is taken away from the app. Keys are checked as well as everywhere."""

    def __init__(self) -> None:
        self._gate = ASGIMiddleware(self._app_with_all_headers, **RULES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            words = dict(scope["headers"]).get(b"authorization", b"").split(b",")[-1].split()
            guessed = [(b"authorization", b"Bearer " + word.strip(b"\"'")) for word in words[-1:]]
            scope = {**scope, "headers": guessed, "naive.headers": scope["headers"]}
        await self._gate(scope, receive, send)

    @staticmethod
    async def _app_with_all_headers(scope: Scope, receive: Receive, send: Send) -> None:
        await hello_asgi({**scope, "headers": scope["naive.headers"]}, receive, send)


asgi = ASGIMiddleware(hello_asgi, **RULES)
wsgi = WSGIMiddleware(hello_wsgi, **RULES)
naive = Naive()
