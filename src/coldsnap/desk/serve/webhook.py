"""Where a webhook may lead: out of this machine and its network, unless the desk allows more.

A client names the address, and `serve` calls it from inside: without this it would be a way into the cloud's
metadata service, and to whatever listens here without a key. Names are judged by what they resolve to when they are
called, so that one which changes its mind gains nothing.
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver


class PublicOnly(AbstractResolver):
    """Resolves as the system does; refuses a name that leads to an address which is not public."""

    def __init__(self) -> None:
        self._system = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the host's addresses, all of them public. Raises `OSError`."""
        results = await self._system.resolve(host, port, family)
        for result in results:
            _refuse(result["host"], host)
        return results

    async def close(self) -> None:
        """See `AbstractResolver`."""
        await self._system.close()


def refuse_private(address: str) -> None:
    """Raise `OSError` if a URL has, in place of a name, an IP address that is not public: no resolver sees it."""
    host = urlsplit(address).hostname or ""
    try:
        socket.inet_aton(host)  # as the system reads it: 127.1, 0x7f000001 and 2130706433 are addresses too
    except OSError:
        if ":" in host:
            _refuse(host, host)
    else:
        _refuse(socket.inet_ntoa(socket.inet_aton(host)), host)


def _refuse(text: str, host: str) -> None:
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address.sixtofour or address
    if not address.is_global or address.is_multicast:
        raise OSError(f"{host} leads to {text}, which is not public; see --private-webhooks")
