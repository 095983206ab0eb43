"""Apps behind `ProxyIdentityMiddleware` for real servers, and twins that guess what a peer is.

Who was let in is appended to the file that ACTS names, a line for each request.
"""

import os
from pathlib import Path
from typing import Any

from keylatch.asgi import ProxyIdentityMiddleware
from keylatch.wsgi import ProxyIdentityMiddleware as WSGIProxyIdentityMiddleware

TRUSTED = os.environ["TRUSTED"].split(",")


def record(key_id: str) -> None:
    """One write, so that lines of several threads stay whole."""
    with Path(os.environ["ACTS"]).open("a") as acts:
        acts.write(f"{key_id}\n")


async def over_asgi(scope: Any, receive: Any, send: Any) -> None:
    """Notes the caller."""
    if scope["type"] == "lifespan":
        while True:
            event = await receive()
            await send({"type": f"{event['type']}.complete"})
            if event["type"] == "lifespan.shutdown":
                return
    record(scope["user"].key_id)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
    await send({"type": "http.response.body", "body": b"done"})


def over_wsgi(environ: Any, start_response: Any) -> list[bytes]:
    """Notes the caller."""
    record(environ["keylatch.principal"].key_id)
    start_response("200 OK", [("Content-Length", "4")])
    return [b"done"]


asgi = ProxyIdentityMiddleware(over_asgi, trusted=TRUSTED)
wsgi = WSGIProxyIdentityMiddleware(over_wsgi, trusted=TRUSTED)


async def guessing(scope: Any, receive: Any, send: Any) -> None:
    """The twin: a peer without an address is a Unix socket, whatever the server says."""
    if scope["type"] == "http" and scope.get("client") is None:
        scope = {**scope, "server": ("/run/guessed.sock", None)}
    await asgi(scope, receive, send)
