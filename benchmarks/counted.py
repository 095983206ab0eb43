"""Counts calls: a wrapper around a store, a hasher or a Redis client."""

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

T = TypeVar("T")

_IN_PLACE: Final = ("position_nowait", "invalidations_since_nowait")
"""Calls of a store that wait for nothing and still are calls."""


class Counted:
    """Delegates everything to a target, and counts the calls that cost I/O or work.

    Those are coroutines, what a Redis client does, and what reads the store in place. Other
    attributes are handed out as they are, so that a hot path costs what it costs.

    Args:
        target: does the work.
        calls: counts, by name.
    """

    def __init__(self, target: Any, calls: "Counter[str]") -> None:
        self._target = target
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        is_asked = (
            inspect.iscoroutinefunction(found)
            or name in _IN_PLACE
            or (callable(found) and type(self._target).__module__.startswith("redis."))
        )
        return self._counting(name, found) if is_asked else found

    def _counting(self, name: str, found: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*given: Any, **named: Any) -> Any:
            self._calls[name] += 1
            return found(*given, **named)

        return counting


def counted(target: T, calls: "Counter[str]") -> T:
    """The target, counted; for its callers it is of the same type."""
    return cast(T, Counted(target, calls))
