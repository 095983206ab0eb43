"""Receipts in responses: how far a revocation has propagated."""

from typing import Any

from keylatch.revocation.propagation import Receipt
from keylatch.storage.database import Durability
from keylatch_sidecar.api.schemas import JSON, ResponseBody


class Revocation(ResponseBody):
    """How many of the members have acknowledged a revocation. No process accepts the key for a
    request that starts `boundSeconds` or more after this response. `members` is 0 where every
    check reads the store. `durability`: `replicated` if a synchronous standby has stored it, else
    `local`."""

    seq: int
    acknowledged: int
    members: int
    bound_seconds: float
    durability: Durability


def revocation(receipt: Receipt) -> Revocation:
    """A receipt for a response body."""
    return Revocation(
        seq=receipt.seq,
        acknowledged=receipt.acknowledged,
        members=receipt.members,
        bound_seconds=receipt.bound_seconds,
        durability=receipt.durability,
    )


def headers(receipt: Receipt) -> dict[str, str]:
    """A receipt as a header field: a dictionary of RFC 9651."""
    return {
        "X-Keylatch-Revocation": f"seq={receipt.seq}, acknowledged={receipt.acknowledged}, "
        f"members={receipt.members}, bound={receipt.bound_seconds:.3f}, "
        f"durability={receipt.durability}"
    }


def revocation_response(content: Any, receipt: Receipt, *, waited: bool) -> JSON:
    """200 after the propagation, or 202 right after the commit."""
    if waited:
        return JSON(content, 200, headers(receipt))
    return JSON(content, 202, headers(receipt) | {"Preference-Applied": "respond-async"})
