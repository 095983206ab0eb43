"""Real servers for the tests of what operators run, removed at the end of each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.members import Deployment
from tests.support.postgresql_cluster import Machines


@pytest.fixture
def machines() -> Iterator[Machines]:
    """Makes PostgreSQL servers, and what is put before them."""
    with Machines() as machines:
        yield machines


@pytest.fixture
def deployment(machines: Machines, tmp_path: Path) -> Deployment:
    """Sidecars with a lease of one second."""
    return machines.add(Deployment(tmp_path))
