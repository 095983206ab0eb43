"""Tests that both databases must pass."""

from collections.abc import AsyncIterator

import pytest

from keylatch.storage.store import Store


class StoreTests:
    """For what both databases promise: each class of tests names its own `url`."""

    @pytest.fixture
    def url(self) -> str:
        raise AssertionError("each database has its own")

    @pytest.fixture
    async def store(self, url: str) -> AsyncIterator[Store]:
        store = Store(url)
        await store.open(0)
        yield store
        await store.close()
