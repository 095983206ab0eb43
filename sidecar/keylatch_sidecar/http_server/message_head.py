"""uvicorn's fast protocol, whose parser is shown another head where it would misread a request.

Of what does not decide where the request ends, and only that.
"""

from typing import Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

PLACEHOLDER_METHOD: Final = b"POST"
"""For a method that httptools may not know, or takes for more than a name: where a request ends
does not depend on its method (RFC 9112 section 6)."""


class UpgradeIgnoring(HttpToolsProtocol):
    """Ignores an `Upgrade`, as a server may (RFC 9110 section 7.8), and reads the body.

    httptools ends a request with `Upgrade`, and one with CONNECT, where its head ends, and takes
    the body for the next request. So what it has read of that head is shown once more, to a new
    parser.
    """

    method = ""
    """Of the request that is being parsed, where the parser is shown another one."""

    @property
    def is_upgrade(self) -> bool:
        """Whether the head that has just ended is going to be shown once more."""
        return self.parser.should_upgrade()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.method:
            self.scope["method"], self.method = self.method, ""
        self.headers = []  # trailers end here, and not in the request (RFC 9110 section 6.5.1)

    def feed(self, piece: bytes) -> int:
        """Parse; how many upgrades were asked for.

        Raises:
            httptools.HttpParserError: what is no request.
        """
        upgrades = 0
        while (head_end := self._feed_until_upgrade(piece)) is not None:
            upgrades += 1
            self.method = self.method or self.parser.get_method().decode()
            head = self._head_without_upgrade()
            self._replace_parser()
            self.parser.feed_data(head)
            piece = piece[head_end:]
        return upgrades

    def _feed_until_upgrade(self, piece: bytes) -> int | None:
        """Where in it the head of an upgrade ends, if the parser stopped there."""
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            return int(upgrade.args[0])
        return None

    def _replace_parser(self) -> None:
        """The old one would discard all that comes after `Connection: close, Upgrade`."""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

    def _head_without_upgrade(self) -> bytes:
        line = b"%s %s HTTP/%s" % (
            PLACEHOLDER_METHOD,
            self.url,
            self.parser.get_http_version().encode(),
        )
        kept = [b"%s: %s" % field for field in self.headers if field[0] != b"upgrade"]
        return b"\r\n".join([line, *kept, b"", b""])
