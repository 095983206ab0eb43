"""Reads request bodies: within limits, as strict JSON, validated by a model.

The limits: 16 KiB within 10 s; UTF-8; no name twice in an object, because parsers disagree on which
of the two counts, and an attacker can exploit two layers that disagree; no unknown fields; no
number beyond a float and at most 32 levels, so that an error response can quote every value.
"""

import asyncio
import json
import math
from collections.abc import Iterable
from typing import Any, Final, TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from keylatch_sidecar.api.errors import NOT_GIVEN, InvalidInput, Problem, invalid_input
from keylatch_sidecar.api.schemas import Body
from keylatch_sidecar.http_server.limits import BODY_SECONDS

MAX_BODY_BYTES: Final = 16 * 1024
_MAX_LEVELS: Final = 32  # no field of a model is nested at all

M = TypeVar("M", bound=Body)


async def read(request: Request, model: type[M]) -> M:
    """The body as a model; an empty body is an empty object.

    Raises:
        Problem: 408, 413, 415, or 400 with the invalid fields.
    """
    content = await read_json(request)
    if not isinstance(content, dict):
        raise Problem(400, "The body must be a JSON object")
    return validated(content, model)


async def read_json(request: Request) -> Any:
    """The body as any JSON value; an empty body is an empty object.

    Raises:
        Problem: 408, 413, 415, or 400.
    """
    return _parse(request, await _read_body(request))


def validated(content: dict[str, Any], model: type[M]) -> M:
    """A JSON object as a model.

    Raises:
        Problem: 400, with the invalid fields.
    """
    names = {field.alias or name for name, field in model.model_fields.items()}
    # Unknown fields are reported here, because pydantic's exception would quote their names.
    errors = [
        InvalidInput(name, "is no field of this body", value)
        for name, value in content.items()
        if name not in names
    ]
    given = {name: value for name, value in content.items() if name in names}
    try:
        validated = model.model_validate(given)
    except ValidationError as error:
        errors = [*_validation_errors(error, given), *errors]
    if errors:
        raise invalid_input(errors)
    return validated


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, as the `object_pairs_hook` of `json.loads`.

    Raises:
        Problem: 400, a name occurs twice.
    """
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise invalid_input(
            [
                InvalidInput(name, "is there twice", content[name])
                for name in content
                if names.count(name) > 1
            ]
        )
    return content


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise Problem(
                        413,
                        f"The body must not exceed {MAX_BODY_BYTES} bytes",
                        headers={"Connection": "close"},
                    )
    except TimeoutError:
        raise Problem(
            408, f"The body did not arrive in {BODY_SECONDS:g} s", headers={"Connection": "close"}
        ) from None
    except ClientDisconnect:  # the client will not read the answer; avoids a traceback in the log
        raise Problem(400, "The body ended early") from None
    return bytes(body)


def _parse(request: Request, body: bytes) -> Any:
    if not body:
        return {}
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise Problem(415, "Send JSON: Content-Type: application/json")
    try:
        content = json.loads(
            body.decode(),
            object_pairs_hook=without_duplicates,
            parse_constant=_reject_constant,
            parse_float=_parse_finite,
        )
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise Problem(415, "The body is not JSON") from None
    except (ValueError, RecursionError):
        raise _beyond_limits() from None
    if not _is_shallow(content):
        raise _beyond_limits()
    return content


def _reject_constant(name: str) -> Any:
    raise Problem(415, f"{name} is not JSON")


def _parse_finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):  # 1e999 is JSON, but an error response could not quote it
        raise ValueError("beyond a float")
    return number


def _is_shallow(content: Any) -> bool:
    level = [content]
    for _ in range(_MAX_LEVELS):
        level = [inner for value in level for inner in _children(value)]
    return not level


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _beyond_limits() -> Problem:
    return Problem(400, "The body has a number that is too large, or is nested too deeply")


def _validation_errors(error: ValidationError, content: dict[str, Any]) -> list[InvalidInput]:
    errors = []
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        path = str(problem["loc"][0]) if problem["loc"] else ""
        message = problem["msg"].removeprefix("Value error, ")
        errors.append(InvalidInput(path, message, content.get(path, NOT_GIVEN)))
    return errors
