"""uvicorn's httptools protocol, which ignores requests to upgrade the connection.

The parser gets a modified head of such a request. The modifications never change where the request
ends.
"""

from typing import Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

PLACEHOLDER_METHOD: Final = b"POST"
"""Replaces methods that httptools does not know, or treats specially: where a request ends does not
depend on its method (RFC 9112 section 6)."""


class UpgradeIgnoring(HttpToolsProtocol):
    """Ignores `Upgrade`, as a server may (RFC 9110 section 7.8), and reads the body.

    httptools ends a request with `Upgrade` or CONNECT after its head, and parses the body as the
    next request. So the head is parsed again, without `Upgrade`, by a new parser.
    """

    method = ""
    """The method of the request that is being parsed, if it was replaced."""

    @property
    def is_upgrade(self) -> bool:
        """Whether the head that has just ended will be parsed again."""
        return self.parser.should_upgrade()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.method:
            self.scope["method"], self.method = self.method, ""
        self.headers = []  # so that trailers are not added to the request (RFC 9110 section 6.5.1)

    def feed_data(self, piece: bytes) -> int:
        """Parse, and return how many requests asked for an upgrade.

        Raises:
            httptools.HttpParserError: the bytes are not a request.
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
        """The end of the head in `piece`, if the parser stopped at an upgrade."""
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            return int(upgrade.args[0])
        return None

    def _replace_parser(self) -> None:
        """The old parser would discard everything after `Connection: close, Upgrade`."""
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
