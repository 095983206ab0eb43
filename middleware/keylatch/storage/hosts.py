"""Connects to one of several PostgreSQL hosts.

psycopg tries the hosts of a URL one after the other, each until `connect_timeout`. Where the
machine of the first one is gone and nothing answers for it, the time limit of every query ends
before the second host is tried. So the next host is tried after a short delay, at the same time
(RFC 8305, "Connection Attempt Delay"), and the host that accepted is the first one from then on.
"""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any, Final

import psycopg

from keylatch.storage.conninfo import parameters_by_host

PsycopgConnection = psycopg.AsyncConnection[Any]

_DELAY_SECONDS: Final = 0.25


class Hosts:
    """The hosts of a URL.

    Args:
        parameters: of `keylatch.storage.conninfo.connection_parameters`.
    """

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self._order = parameters_by_host(parameters)

    async def connect(self) -> PsycopgConnection:
        """A connection in autocommit mode to the first host that accepts.

        Raises:
            psycopg.Error: none does.
        """
        waiting = list(self._order)
        attempts: dict[asyncio.Task[PsycopgConnection], dict[str, Any]] = {}
        errors: list[psycopg.Error] = []
        try:
            while waiting or attempts:
                if waiting:
                    parameters = waiting.pop(0)
                    attempts[asyncio.create_task(_connect(parameters))] = parameters
                done, _ = await asyncio.wait(
                    attempts,
                    timeout=_DELAY_SECONDS if waiting else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for attempt in done:
                    parameters = attempts.pop(attempt)
                    try:
                        connection = attempt.result()
                    except psycopg.Error as error:
                        errors.append(error)
                    else:
                        self._prefer(parameters)
                        return connection
        finally:
            _abandon(attempts)
        raise _error_of_all(errors)

    def _prefer(self, parameters: dict[str, Any]) -> None:
        others = [each for each in self._order if each is not parameters]
        self._order = [parameters, *others]


async def _connect(parameters: Mapping[str, Any]) -> PsycopgConnection:
    return await psycopg.AsyncConnection.connect(autocommit=True, **parameters)


def _abandon(attempts: Iterable[asyncio.Task[PsycopgConnection]]) -> None:
    """End attempts that are not needed, and close what they have opened."""
    for attempt in attempts:
        attempt.cancel()
        attempt.add_done_callback(_close)


def _close(attempt: asyncio.Task[PsycopgConnection]) -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().pgconn.finish()


def _error_of_all(errors: list[psycopg.Error]) -> psycopg.Error:
    """One line with the reason of each host."""
    if len(errors) == 1:
        return errors[0]
    reasons = [line for error in errors for line in str(error).splitlines()[:1]]
    return psycopg.OperationalError("; ".join(reasons))
