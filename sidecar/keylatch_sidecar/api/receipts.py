"""What a DELETE says about how far its revoke has spread, and whether it waits for that."""

import re
from typing import Any

from starlette.requests import Request

from keylatch.revocation.propagation import Receipt
from keylatch_sidecar.api.errors import InvalidInput
from keylatch_sidecar.api.schemas import JSON, ResponseBody, invalid_input


class Revocation(ResponseBody):
    """Who knows of a revoke. No request that starts `boundSeconds` or more after this answer is
    accepted by any process; `members` is 0 where every check reads the store itself."""

    seq: int
    acknowledged: int
    members: int
    bound_seconds: float


def waits_for_propagation(request: Request) -> bool:
    """Whether the caller wants the answer when the revoke is known everywhere, which is the
    default; `Prefer: respond-async` (RFC 7240 section 4.1) wants it right after the commit."""
    preferences = ",".join(request.headers.getlist("prefer"))
    words = (re.split(r"[;=]", part)[0].strip().lower() for part in preferences.split(","))
    return "respond-async" not in words


def with_descendants(request: Request) -> bool:
    """Whether what the key created is to be revoked as well: `?descendants=true`.

    Raises:
        Problem: 400, it is neither `true` nor `false`, or there are two of them.
    """
    given = request.query_params.getlist("descendants")
    if given not in ([], ["true"], ["false"]):
        error = InvalidInput("descendants", "must be true or false", given[-1], location="query")
        raise invalid_input([error])
    return given == ["true"]


def revocation(receipt: Receipt) -> Revocation:
    """A receipt for a body."""
    return Revocation(
        seq=receipt.seq,
        acknowledged=receipt.acknowledged,
        members=receipt.members,
        bound_seconds=receipt.bound_seconds,
    )


def headers(receipt: Receipt) -> dict[str, str]:
    """A receipt as a header: a dictionary of RFC 9651."""
    return {
        "X-Keylatch-Revocation": f"seq={receipt.seq}, acknowledged={receipt.acknowledged}, "
        f"members={receipt.members}, bound={receipt.bound_seconds:.3f}"
    }


def revocation_response(content: Any, receipt: Receipt, *, waited: bool) -> JSON:
    """200, or 202 where the revoke is committed and still spreading."""
    if waited:
        return JSON(content, 200, headers(receipt))
    return JSON(content, 202, headers(receipt) | {"Preference-Applied": "respond-async"})
