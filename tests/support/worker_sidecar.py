"""A sidecar in a process of its own; it prints its port when it serves.

    python worker_sidecar.py STORE [trusting]

`trusting` is a broken twin: it does not judge the acting key again in the transaction of a change.
"""

import sys
from typing import Any

import uvicorn

from keylatch.authentication.hashing import Cost, Hasher
from keylatch.engine import Engine
from keylatch.settings import Settings
from keylatch.storage import authorization
from keylatch.storage.authorization import Authority
from keylatch_sidecar.app import create_app


def always_authorize(*_: Any, **__: Any) -> Authority:
    """The twin's rule: a key that was valid when the call began is valid."""
    return Authority()


class PortPrintingServer(uvicorn.Server):
    """A server that says where it listens."""

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self.servers[0].sockets[0].getsockname()[1], flush=True)


def serve(store: str) -> None:
    """Until SIGTERM."""
    engine = Engine(
        Settings.load(store=store, redis="", lease=0.5, max_keys=0, max_changes=0),
        hasher=Hasher("argon2id", Cost(memory_kib=1024, passes=1)),
    )
    config = uvicorn.Config(
        create_app(engine),
        host="127.0.0.1",
        port=0,
        log_level="warning",
        lifespan="on",
        timeout_keep_alive=75,  # clients keep connections for longer than five seconds
    )
    PortPrintingServer(config).run()


if __name__ == "__main__":
    if sys.argv[2:] == ["trusting"]:
        authorization.reauthorize = always_authorize
    serve(sys.argv[1])
