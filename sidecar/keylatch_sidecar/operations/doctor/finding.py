"""What was found, how bad it is, and what to do about it. No finding ever holds a URL."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table.

    Args:
        check: what was looked at.
        status: how bad it is.
        message: what was found.
        hint: what to do about it; empty where nothing has to be done.
    """

    check: str
    status: Status
    message: str
    hint: str = ""


def ok(check: str, message: str) -> Finding:
    """Nothing has to be done."""
    return Finding(check, Status.OK, message)


def warning(check: str, message: str, hint: str) -> Finding:
    """It works, and will work better."""
    return Finding(check, Status.WARNING, message, hint)


def failure(check: str, message: str, hint: str) -> Finding:
    """It does not work, or a promise of keylatch's does not hold."""
    return Finding(check, Status.FAILURE, message, hint)


def worst_status(findings: Iterable[Finding]) -> Status:
    """The worst grade of all."""
    statuses = {finding.status for finding in findings}
    return next((each for each in (Status.FAILURE, Status.WARNING) if each in statuses), Status.OK)
