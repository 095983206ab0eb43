"""The keys that keylatch adds to a WSGI `environ`, and the client's address and user agent."""

from typing import Final
from wsgiref.types import WSGIEnvironment

PRINCIPAL: Final = "keylatch.principal"
"""The principal. PEP 3333 allows middlewares to add keys with names of their own."""
REFUSALS: Final = "keylatch.refusals"
"""The `Refusals` with which a view refuses a request."""


def client_info_of(environ: WSGIEnvironment) -> tuple[str | None, str | None]:
    """Address and user agent."""
    return environ.get("REMOTE_ADDR"), environ.get("HTTP_USER_AGENT")
