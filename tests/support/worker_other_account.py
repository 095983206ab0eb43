"""Another account of this host, which has no business with a store. Started by root.

    python worker_other_account.py read|hold|start PATH

`read` tries to open the store's files until it is killed, `hold` to hold its lock file, and `start`
to use the store. It says `ready` when it begins, and then what it came to.
"""

import asyncio
import fcntl
import os
import sys
from pathlib import Path

from keylatch.errors import StoreUnavailable
from keylatch.storage.store import Store

ACCOUNT = 65534
ENDS = ("", "-wal", "-shm", "-lock", "-journal")


def read(path: Path) -> None:
    """Says `read` once it has opened one of them."""
    places = [f"{path}{end}" for end in ENDS]
    while True:
        for place in places:
            try:
                os.close(os.open(place, os.O_RDONLY))
            except OSError:
                continue
            print("read", flush=True)
            return


def hold(path: Path) -> None:
    """Says `held`, and lets go when it is told to."""
    try:
        with Path(f"{path}-lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            print("held", flush=True)
            sys.stdin.read()
    except PermissionError:
        print("refused", flush=True)


def start(path: Path) -> None:
    """Says why it cannot."""

    async def opened() -> None:
        store = Store(f"sqlite:///{path}")
        try:
            await store.open(0)
        except StoreUnavailable as error:
            print(error.message, flush=True)
        await store.close()

    asyncio.run(opened())


if __name__ == "__main__":
    os.setgroups([])
    os.setgid(ACCOUNT)
    os.setuid(ACCOUNT)
    print("ready", flush=True)
    {"read": read, "hold": hold, "start": start}[sys.argv[1]](Path(sys.argv[2]))
