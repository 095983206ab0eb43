"""FastAPI's `HTTPBearer` and async SQLAlchemy: looked up on every request, and its use is recorded.

One UPDATE and commit a request. SQLite's write-ahead log and `synchronous=NORMAL` are on and a
writer waits for the others for 30 seconds; with its defaults it would be slower, or fail.
"""

import asyncio
import hashlib
import os
import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import String, event, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

engine = create_async_engine(
    f"sqlite+aiosqlite:///{os.environ['PEER_FOLDER']}/fastapi_last_used.db",
    connect_args={"timeout": 30},
)
Session = async_sessionmaker(engine, expire_on_commit=False)


@event.listens_for(engine.sync_engine, "connect")
def write_ahead(connection, record):
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


class Base(DeclarativeBase):
    pass


class Key(Base):
    __tablename__ = "keys"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str]
    last_used: Mapped[datetime | None]


def digest_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


async def session() -> AsyncIterator[AsyncSession]:
    async with Session() as opened:
        yield opened


async def current_key(
    given: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())],
    session: Annotated[AsyncSession, Depends(session)],
) -> Key:
    """The key of the caller, used now."""
    used = update(Key).where(Key.digest == digest_of(given.credentials))
    key = await session.scalar(used.values(last_used=datetime.now(UTC)).returning(Key))
    if key is None:
        raise HTTPException(401, "Invalid API key", {"WWW-Authenticate": "Bearer"})
    await session.commit()
    return key


app = FastAPI()


@app.get("/open")
async def open_() -> str:
    return "hello"


@app.get("/protected")
async def protected(key: Annotated[Key, Depends(current_key)]) -> str:
    return "hello"


async def create_key() -> str:
    token = secrets.token_urlsafe(32)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with Session.begin() as session:
        session.add(Key(digest=digest_of(token), owner="me"))
    return token


if __name__ == "__main__":
    print(asyncio.run(create_key()))
