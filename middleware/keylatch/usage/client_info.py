"""The client of a key: its network and its software, enough to recognize an unknown client.

The law of this file: no full address and no free text leaves it. A network of 256 IPv4 addresses
or an IPv6 site (/48) distinguishes an organisation's own servers from others, but not one person
from a neighbour. Of a user agent only the name of the first product is kept (RFC 9110 section
10.1.5), because the rest may be any text.
"""

import ipaddress
import re
from typing import Final

_PREFIX: Final = {4: 24, 6: 48}
_MAX_LENGTH: Final = 128  # longer values are cut or ignored
_PRODUCT: Final = re.compile(r"[A-Za-z][A-Za-z0-9._+-]{0,31}(?=[/ ]|$)")


def network_of(host: str | None) -> str | None:
    """The network of an address; None if it is no address, as for a Unix socket."""
    if not host or len(host) > _MAX_LENGTH:
        return None
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    prefix = _PREFIX[address.version]
    return str(ipaddress.ip_network((address, prefix), strict=False))


def family_of(agent: str | None) -> str | None:
    """The name of the first product in a user agent, or None."""
    product = _PRODUCT.match((agent or "")[:_MAX_LENGTH])
    return product[0] if product else None
