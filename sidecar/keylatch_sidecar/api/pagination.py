"""Lists of keys: a bare array, whole as both dialects expect it, or in pages for those who ask.

    GET /v1/api-keys?limit=100    ->    Link: <?limit=100&cursor=…>; rel="next"    (RFC 8288)

The link is relative to the URL that was asked: whoever asks knows under which name and scheme, and
a proxy in between may have changed both. A cursor is a place in the order of creation, so what is
made or deleted meanwhile moves no other key to another page.

Nothing here keeps the event loop: keys are read by the page and spelled by the slice. A list of
more than one page is sent as it is read, so its length in memory is that of a page; if the store
fails in the middle of it, the connection breaks.
"""

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import timedelta
from typing import Final
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from keylatch.core.decisions import KeyRecord, Principal
from keylatch.management.keyring import Keyring
from keylatch.revocation.invalidations import MAX_SEQ
from keylatch.storage.store import PAGE_SIZE, Page
from keylatch_sidecar.api.errors import InvalidInput
from keylatch_sidecar.api.schemas import JSON, ResponseBody, encode_json, invalid_input

MAX_LIMIT: Final = 1_000
_SLICE: Final = 100
_HEADERS: Final = {"Cache-Control": "no-store"}
_ORDERS: Final = {True: b"n", False: b"o"}  # newest, oldest first: a cursor is for one of them
_CURSOR: Final = re.compile(r"[A-Za-z0-9_-]{12}")
_LIMIT: Final = re.compile(r"[0-9]{1,4}")
_NUMBER: Final = re.compile(r"[0-9]{1,18}")
# The same in base64: the order in eight bits, and a number beyond 0 whose first two bits are 0.
CURSOR_SCHEMAS: Final = {
    newest_first: {
        "type": "string",
        "pattern": f"^b[{second}][A-Za-z0-9_-]{{10}}$",
        "not": {"const": f"b{second[0]}AAAAAAAAAA"},
    }
    for newest_first, second in ((True, "g-j"), (False, "w-z"))
}
"""What a cursor looks like, by whether it is for the newest first."""

Describe = Callable[[KeyRecord], ResponseBody]


async def list_response(
    request: Request,
    keyring: Keyring,
    organization_id: str,
    describe: Describe,
    *,
    newest_first: bool = True,
    deleted: bool = False,
    idle_days: int | None = None,
    by: Principal,
) -> Response:
    """The list that was asked for, of the keys that the caller sees.

    Raises:
        Problem: 400, a limit or a cursor is none.
        StoreUnavailable: nothing was sent yet.
    """
    limit, after = _page_parameters(request, newest_first)
    idle = None if idle_days is None else timedelta(days=idle_days)
    page = await keyring.page(
        organization_id,
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
            link = _link(request, limit, position, newest_first, idle_days)
        body = b"".join([part async for part in _array(page, None, describe)])
        return Response(body, media_type=JSON.media_type, headers=_HEADERS | link)
    rest = keyring.pages(
        organization_id,
        newest_first=newest_first,
        deleted=deleted,
        after=position,
        idle=idle,
        by=by,
    )
    return _StreamedArray(_array(page, rest, describe), request)


class _StreamedArray(Response):
    """An answer that is sent as its parts come, for as long as somebody is there."""

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
            # Asked and not listened for: a task that listens would be one more that can hang.
            if await self._request.is_disconnected():
                return
        await send({"type": "http.response.body", "body": b""})


def encode_cursor(position: int, newest_first: bool) -> str:
    """A place in a list, as it is told."""
    return base64.urlsafe_b64encode(_ORDERS[newest_first] + position.to_bytes(8)).decode()


def _page_parameters(request: Request, newest_first: bool) -> tuple[int | None, int | None]:
    errors = []
    values: dict[str, int | None] = {}
    for name, read, message in (
        ("limit", _limit, f"must be a number from 1 to {MAX_LIMIT}"),
        (
            "cursor",
            lambda text: _decode_cursor(text, newest_first),
            "must come from a link to a next page",
        ),
    ):
        given = request.query_params.getlist(name)
        values[name] = read(given[0]) if len(given) == 1 else None
        if given and values[name] is None:
            errors.append(InvalidInput(name, message, given[-1], location="query"))
    if errors:
        raise invalid_input(errors)
    return values["limit"], values["cursor"]


def _limit(text: str) -> int | None:
    limit = int(text) if _LIMIT.fullmatch(text) else 0
    return limit if 1 <= limit <= MAX_LIMIT else None


def _decode_cursor(text: str, newest_first: bool) -> int | None:
    if not _CURSOR.fullmatch(text):
        return None
    raw = base64.urlsafe_b64decode(text)
    position = int.from_bytes(raw[1:])
    is_valid = raw[:1] == _ORDERS[newest_first] and 0 < position < MAX_SEQ
    return position if is_valid else None


def _link(
    request: Request, limit: int, position: int, newest_first: bool, idle_days: int | None
) -> dict[str, str]:
    query = {"limit": str(limit), "cursor": encode_cursor(position, newest_first)}
    if request.query_params.get("include") == "deleted":
        query["include"] = "deleted"
    if idle_days is not None:
        query["idle"] = str(idle_days)
    return next_link(query)


def next_link(query: Mapping[str, str]) -> dict[str, str]:
    """The header that tells where a list goes on."""
    return {"Link": f'<?{urlencode(query)}>; rel="next"'}


def integer_parameter(request: Request, name: str, largest: int) -> int | None:
    """A number of the query, from 1 on; None: it is not there.

    Raises:
        Problem: 400, it is none.
    """
    given = request.query_params.getlist(name)
    if not given:
        return None
    value = int(given[0]) if len(given) == 1 and _NUMBER.fullmatch(given[0]) else 0
    if not 1 <= value <= largest:
        message = f"must be a number from 1 to {largest}"
        raise invalid_input([InvalidInput(name, message, given[-1], location="query")])
    return value


async def _array(
    first: Page, rest: AsyncIterator[Page] | None, describe: Describe
) -> AsyncIterator[bytes]:
    """A JSON array of all that the pages hold, in parts; whoever waits for the event loop gets it
    between them."""
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
