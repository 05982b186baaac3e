"""Addresses in options, links and announcements: host:port, with an IPv6 address in brackets."""

from __future__ import annotations

import asyncio
import ipaddress
import socket


def split_address(address: str) -> tuple[str, int]:
    """Split `host:port` or `[ipv6]:port` into host, without brackets, and port. Raises ValueError."""
    name, separator, port = address.rpartition(":")
    if not separator or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is not host:port")
    try:
        host = bare_host(name)
    except ValueError:
        raise ValueError(f"{address!r} is not host:port") from None
    if ":" in name and name == host:
        raise ValueError(f"{address!r} is not host:port: an IPv6 address stands in brackets, [{name}]:{port}")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """Return host:port, with an IPv6 address in brackets; the inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_addresses(addresses: str) -> tuple[str, ...]:
    """Split `host:port,host:port,...` into its entries. Raises ValueError for an entry that is not host:port."""
    parts = tuple(part.strip() for part in addresses.split(",") if part.strip())
    for part in parts:
        split_address(part)
    return parts


async def look_up(address: str) -> frozenset[str]:
    """Resolve host:port to the addresses that it stands for.

    An IP address stands for itself. A host name stands for all its addresses, but only those of IPv4 if it has any,
    because a host that listens on both families must not count twice.

    Raises OSError for a name that cannot be resolved, UnicodeError for an invalid host name.
    """
    host, port = split_address(address)
    if is_ip_address(host):
        return frozenset((join_address(str(ipaddress.ip_address(host)), port),))
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    ipv4 = {str(address[0]) for family, *_, address in found if family is socket.AF_INET}
    return frozenset(join_address(ip, port) for ip in ipv4 or {str(address[0]) for *_, address in found})


def bare_host(host: str) -> str:
    """Return a host name or IP address that was given without a port, without the brackets of an IPv6 address.

    Raises ValueError if it is neither.
    """
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or any(char in "[]/@#?" or not char.isprintable() or char.isspace() for char in bare):
        raise ValueError(f"{host!r} is neither a host's name nor an IP address")
    if ":" in bare or bare != host:
        try:
            ipaddress.IPv6Address(bare)
        except ValueError:
            raise ValueError(f"{host!r} is neither a host's name nor an IP address") from None
    return bare


def is_ip_address(host: str) -> bool:
    """True if a host is an IP address, and not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """True if a host is localhost or a loopback address. False for any other name, which may have any address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def local_address(announced: str) -> str:
    """Return the address for calls from this machine: the loopback address if the service listens on all interfaces."""
    host, port = split_address(announced)
    return join_address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)


def bound_socket(host: str, port: int, *, shares_port: bool = False) -> socket.socket:
    """Bind a TCP socket, which does not listen yet. On `::` it accepts IPv4 as well, like gRPC.

    Connections of an earlier owner in state TIME_WAIT do not block the address.

    Args:
        host: Name or IP address.
        port: Port; 0 takes a free one.
        shares_port: Set SO_REUSEPORT, so that other listeners of the same user that set it may share the port.

    Raises OSError, socket.gaierror for a name that is not known.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT if shares_port else socket.SO_REUSEADDR, 1)
        if host == "::":
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound
