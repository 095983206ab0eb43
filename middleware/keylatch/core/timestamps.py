"""Times: aware datetimes for callers, milliseconds since the Unix epoch (UTC) inside keylatch.

The law of this file: no I/O, no clock. Both directions are exact integer arithmetic.
"""

from datetime import UTC, datetime, timedelta
from typing import Final, overload

from keylatch.errors import InvalidValue

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)


@overload
def datetime_of(milliseconds: int) -> datetime: ...
@overload
def datetime_of(milliseconds: int | None) -> datetime | None: ...
def datetime_of(milliseconds: int | None) -> datetime | None:
    """The time as an aware datetime in UTC; None stays None."""
    return None if milliseconds is None else _EPOCH + milliseconds * _MILLISECOND


def milliseconds_of(when: datetime | None, field: str) -> int | None:
    """The time in milliseconds, rounded down; None stays None.

    Args:
        when: an aware datetime.
        field: the argument that an error names.

    Raises:
        InvalidValue: it is naive, so it does not say which instant it means.
    """
    if when is None:
        return None
    if not isinstance(when, datetime) or when.utcoffset() is None:
        raise InvalidValue(field, "must be a datetime with a time zone, as datetime.now(UTC) has")
    return (when - _EPOCH) // _MILLISECOND
