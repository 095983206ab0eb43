"""Where a key is used from, cut down to what an operator needs to say "that is not us".

The law of this file: no full address and no free text leaves it. A network of 256 IPv4 addresses
or an IPv6 site (/48) tells one's own servers from somebody else's, and no person from another in
the same street; of a user agent only the first product's name is left (RFC 9110 section 10.1.5),
because the rest is anything that a client cares to send.
"""

import ipaddress
import re
from typing import Final

_PREFIX: Final = {4: 24, 6: 48}
_MAX_LENGTH: Final = 128  # of what is looked at
_PRODUCT: Final = re.compile(r"[A-Za-z][A-Za-z0-9._+-]{0,31}(?=[/ ]|$)")


def network_of(host: str | None) -> str | None:
    """The network that an address is in; None where that is no address, as of a Unix socket."""
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
    """The first product's name in a user agent; None where there is none."""
    product = _PRODUCT.match((agent or "")[:_MAX_LENGTH])
    return product[0] if product else None
