"""A protected WSGI app for real servers, and a way to ask it."""

import http.client
from typing import Any

from keylatch.wsgi import APIKeyMiddleware


def hello(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """Says hello."""
    start_response("200 OK", [("content-type", "text/plain"), ("content-length", "5")])
    return [b"hello"]


def status_of(port: int, path: str, authorization: str = "") -> int:
    """The status of one request, 0 if there is no answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers={"Authorization": authorization})
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


app = APIKeyMiddleware(hello, public=["/healthz"])
