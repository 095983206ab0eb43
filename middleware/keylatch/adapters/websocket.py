"""Closes a WebSocket with 1008 (RFC 6455 section 7.4.1) when its key is revoked or expires.

The server then sends the app a disconnect, as if the client had closed; sending raises `OSError`.
"""

import asyncio
import contextlib
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_CLOSE: Final = {
    "type": "websocket.close",
    "code": 1008,
    "reason": "The API key is not valid any more",
}


async def run_until(
    ended: asyncio.Event, app: ASGIApp, scope: Scope, receive: Receive, send: Send
) -> None:
    """Run the app on a WebSocket, and close the WebSocket when the event is set."""
    is_closed = False

    async def close() -> None:
        nonlocal is_closed
        await ended.wait()
        is_closed = True
        with contextlib.suppress(Exception):  # the client may have closed first
            await send(_CLOSE)

    async def send_while_open(message: Message) -> None:
        nonlocal is_closed
        if is_closed:
            raise OSError("the WebSocket was closed: its API key is not valid any more")
        is_closed = message["type"] == "websocket.close"
        await send(message)

    closer = asyncio.create_task(close(), name="keylatch-websocket")
    try:
        await app(scope, receive, send_while_open)
    finally:
        closer.cancel()
