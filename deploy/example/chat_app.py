"""A WebSocket that stays open for as long as its key is good.

    keylatch keys create --name me
    uvicorn --lifespan on --app-dir deploy/example chat_app:app

Connect to ws://127.0.0.1:8000/chat with the header `Authorization: Bearer <key>`, then revoke the
key: the connection is closed with 1008, whether the app is listening or talking at that moment.
"""

from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from keylatch.asgi import APIKeyMiddleware


async def chat(websocket: WebSocket) -> None:
    """Greets, and echoes each message until either side closes."""
    await websocket.accept()
    await websocket.send_text(f"hello {websocket.user.key_name}")
    async for message in websocket.iter_text():
        await websocket.send_text(message)


app = Starlette(routes=[WebSocketRoute("/chat", chat)])
app.add_middleware(APIKeyMiddleware)
