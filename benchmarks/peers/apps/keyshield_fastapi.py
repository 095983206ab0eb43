"""keyshield, formerly fastapi-api-key: its dependency on FastAPI, on SQLAlchemy, its cache on.

As in its README and in its pages on the database and the cache, defaults included: argon2 with a
pepper, a cache in memory for 300 seconds, the time of use written on every request, and a random
delay of 0.1 to 0.3 seconds on every answer, good ones too. Two things differ: tables are made once,
and a writer waits for the others for 60 seconds; SQLite's five are too few for sixteen callers.
"""

import asyncio
import os
from collections.abc import AsyncIterator

from aiocache import SimpleMemoryCache
from fastapi import Depends, FastAPI
from keyshield import ApiKey, ApiKeyService
from keyshield.api import create_depends_api_key
from keyshield.hasher.argon2 import Argon2ApiKeyHasher
from keyshield.repositories.sql import SqlAlchemyApiKeyRepository
from keyshield.services.cached import CachedApiKeyService
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

engine = create_async_engine(
    f"sqlite+aiosqlite:///{os.environ['PEER_FOLDER']}/keyshield.db", connect_args={"timeout": 60}
)
Session = async_sessionmaker(engine, expire_on_commit=False)
hasher = Argon2ApiKeyHasher(pepper="for one benchmark")
cache = SimpleMemoryCache()


async def session() -> AsyncIterator[AsyncSession]:
    async with Session() as opened, opened.begin():
        yield opened


async def service(session: AsyncSession = Depends(session)) -> ApiKeyService:
    repository = SqlAlchemyApiKeyRepository(session)
    return CachedApiKeyService(repo=repository, hasher=hasher, cache=cache)


app = FastAPI()
security = create_depends_api_key(service)


@app.get("/open")
async def open_() -> str:
    return "hello"


@app.get("/protected")
async def protected(key: ApiKey = Depends(security)) -> str:
    return "hello"


async def create_key() -> str:
    async with Session.begin() as session:
        repository = SqlAlchemyApiKeyRepository(session)
        await repository.ensure_table(async_engine=engine)
        _, token = await CachedApiKeyService(repo=repository, hasher=hasher).create(name="me")
    return token


if __name__ == "__main__":
    print(asyncio.run(create_key()))
