"""Loopback addresses: keylatch uses plain HTTP, so tokens that are sent to any other address can be
read on the network."""

import ipaddress
import socket
from typing import Final

PLAIN_HTTP: Final = "plain HTTP: tokens are sent in cleartext"
HINT: Final = "put TLS in front of it, or listen on 127.0.0.1 or a Unix socket"


def is_host(host: str) -> bool:
    """Whether all addresses of a host name are loopback addresses."""
    try:
        addresses = socket.getaddrinfo(host or None, 0, flags=socket.AI_PASSIVE)
    except OSError:  # nothing can listen there
        return True
    return all(is_address(str(address[0])) for *_, address in addresses)


def is_address(text: str) -> bool:
    """Whether an address is in 127.0.0.0/8, or ::1."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback
