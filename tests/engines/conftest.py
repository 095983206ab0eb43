"""Real servers for the tests of what operators run, removed at the end of each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.members import Deployment
from tests.support.postgresql_cluster import Machines


@pytest.fixture
def machines() -> Iterator[Machines]:
    """Makes PostgreSQL servers."""
    machines = Machines()
    yield machines
    machines.remove()


@pytest.fixture
def deployment(machines: Machines, tmp_path: Path) -> Iterator[Deployment]:
    """Sidecars with a lease of one second, which end before the servers do."""
    deployment = Deployment(tmp_path)
    yield deployment
    deployment.stop()
