"""Lists of keys: a JSON array of all keys, as both dialects define it, or with `?limit=` in pages.

    GET /v1/api-keys?limit=100    ->    Link: <?limit=100&cursor=…>; rel="next"    (RFC 8288)

The link is relative to the request's URL: only the client knows the name and scheme that it used,
because proxies may change both. A cursor is a position in the order of creation, so keys that are
created or deleted meanwhile move no other key to another page.

A long list does not block the event loop: keys are read by the page and encoded by the slice. A
list of more than one page is sent while it is read, so it takes the memory of one page; if the
store fails in the middle of it, the connection breaks.
"""

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Final
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from keylatch.core.decisions import KeyRecord, Principal
from keylatch.management.keyring import Keyring
from keylatch.revocation.invalidations import MAX_SEQ
from keylatch.storage.store import PAGE_SIZE, Page
from keylatch_sidecar.api.parameters import LIMIT, Parameter, read_all
from keylatch_sidecar.api.schemas import JSON, ResponseBody, encode_json

_SLICE: Final = 100
_HEADERS: Final = {"Cache-Control": "no-store"}
_ORDERS: Final = {True: b"n", False: b"o"}  # newest, oldest first: a cursor is for one order
_CURSOR: Final = re.compile(r"[A-Za-z0-9_-]{12}")

Describe = Callable[[KeyRecord], ResponseBody]


async def list_response(
    request: Request,
    keyring: Keyring,
    describe: Describe,
    *,
    newest_first: bool = True,
    deleted: bool = False,
    idle_days: int | None = None,
    by: Principal,
) -> Response:
    """The keys that the caller may see, from the request's cursor on.

    Raises:
        Problem: 400, the limit or the cursor is invalid.
        StoreUnavailable: nothing was sent yet.
    """
    limit, after = read_all(request, LIMIT, CURSORS[newest_first])
    idle = None if idle_days is None else timedelta(days=idle_days)
    page = await keyring.page(
        by.organization_id,
        limit or PAGE_SIZE,
        newest_first=newest_first,
        deleted=deleted,
        after=after,
        idle=idle,
        by=by,
    )
    position = page.next_cursor
    if limit is not None or position is None:
        link = {}
        if limit is not None and position is not None:
            link = _link(limit, position, newest_first, deleted, idle_days)
        body = b"".join([part async for part in _array(page, None, describe)])
        return Response(body, media_type=JSON.media_type, headers=_HEADERS | link)
    rest = keyring.pages(
        by.organization_id,
        newest_first=newest_first,
        deleted=deleted,
        after=position,
        idle=idle,
        by=by,
    )
    return _StreamedArray(_array(page, rest, describe), request)


class _StreamedArray(Response):
    """A response that is sent part by part until the client disconnects."""

    def __init__(self, parts: AsyncIterator[bytes], request: Request) -> None:
        super().__init__(None, media_type=JSON.media_type, headers=_HEADERS)
        del self.headers["content-length"]
        self._parts = parts
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for part in self._parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            # Polled: a task that waits for the disconnection would be one more that can hang.
            if await self._request.is_disconnected():
                return
        await send({"type": "http.response.body", "body": b""})


def encode_cursor(position: int, newest_first: bool) -> str:
    """A position in a list as a cursor."""
    return base64.urlsafe_b64encode(_ORDERS[newest_first] + position.to_bytes(8)).decode()


def _decode_cursor(newest_first: bool, text: str) -> int | None:
    if not _CURSOR.fullmatch(text):
        return None
    raw = base64.urlsafe_b64decode(text)
    position = int.from_bytes(raw[1:])
    is_valid = raw[:1] == _ORDERS[newest_first] and 0 < position < MAX_SEQ
    return position if is_valid else None


def _cursor(newest_first: bool, second: str) -> Parameter[int]:
    # In base64, the order takes 8 bits; the first two bits of the position are 0, the position not.
    schema = {
        "type": "string",
        "pattern": f"^b[{second}][A-Za-z0-9_-]{{10}}$",
        "not": {"const": f"b{second[0]}AAAAAAAAAA"},
    }
    parse = partial(_decode_cursor, newest_first)
    return Parameter("cursor", parse, "must come from a link to a next page", schema)


CURSORS: Final = {True: _cursor(True, "g-j"), False: _cursor(False, "w-z")}
"""The parameter `cursor` of a list that is newest first, and of one that is oldest first."""


def _link(
    limit: int, position: int, newest_first: bool, deleted: bool, idle_days: int | None
) -> dict[str, str]:
    query = {"limit": str(limit), "cursor": encode_cursor(position, newest_first)}
    if deleted:
        query["include"] = "deleted"
    if idle_days is not None:
        query["idle"] = str(idle_days)
    return next_link(query)


def next_link(query: Mapping[str, str]) -> dict[str, str]:
    """The header field that links the next page."""
    return {"Link": f'<?{urlencode(query)}>; rel="next"'}


async def _array(
    first: Page, rest: AsyncIterator[Page] | None, describe: Describe
) -> AsyncIterator[bytes]:
    """A JSON array of the keys of all pages, in parts; other tasks run between two parts."""
    yield b"["
    separator = b""
    async for records in _slices(first, rest):
        yield separator + encode_json([describe(record) for record in records])[1:-1]
        separator = b","
        await asyncio.sleep(0)
    yield b"]"


async def _slices(
    first: Page, rest: AsyncIterator[Page] | None
) -> AsyncIterator[Sequence[KeyRecord]]:
    for start in range(0, len(first.records), _SLICE):
        yield first.records[start : start + _SLICE]
    if rest is not None:
        async for page in rest:
            for start in range(0, len(page.records), _SLICE):
                yield page.records[start : start + _SLICE]
