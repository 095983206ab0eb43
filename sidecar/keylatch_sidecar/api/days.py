"""Numbers of days in queries: how far back to look."""

import re
from typing import Final

from starlette.requests import Request

from keylatch.storage.usage import RETENTION_DAYS
from keylatch_sidecar.api.errors import InvalidInput
from keylatch_sidecar.api.schemas import invalid_input

MAX_USAGE_DAYS: Final = RETENTION_DAYS
MAX_IDLE_DAYS: Final = 9_999
_NUMBER: Final = re.compile(r"[0-9]{1,4}")


def read_days(request: Request, name: str, most: int) -> int | None:
    """The days that a parameter of the query names; None: it is not there.

    Raises:
        Problem: 400, it is no number of days, or there are two of them.
    """
    given = request.query_params.getlist(name)
    if not given:
        return None
    days = int(given[0]) if len(given) == 1 and _NUMBER.fullmatch(given[0]) else 0
    if not 1 <= days <= most:
        message = f"must be a number of days from 1 to {most}"
        raise invalid_input([InvalidInput(name, message, given[-1], location="query")])
    return days
