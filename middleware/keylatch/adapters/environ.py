"""The keys that keylatch adds to a WSGI `environ`, and what a refusal takes from it."""

from typing import Final
from wsgiref.types import WSGIEnvironment

PRINCIPAL: Final = "keylatch.principal"
"""Where in `environ` the principal is: PEP 3333 lets a middleware add keys of its own name."""
REFUSALS: Final = "keylatch.refusals"
"""Where in `environ` a view that asks for more finds the answers to refuse with."""


def client_info_of(environ: WSGIEnvironment) -> tuple[str | None, str | None]:
    """Address and user agent."""
    return environ.get("REMOTE_ADDR"), environ.get("HTTP_USER_AGENT")
