"""Addresses as options, links and announcements write them: host:port, an IPv6 address in brackets."""

from __future__ import annotations

import asyncio
import ipaddress
import socket


def split_address(address: str) -> tuple[str, int]:
    """Split `host:port` or `[ipv6]:port`; the host comes without brackets. Raises ValueError."""
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
    """The opposite of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_addresses(addresses: str) -> tuple[str, ...]:
    """The entries of `host:port,host:port,...`. Raises ValueError for one that is not host:port."""
    parts = tuple(part.strip() for part in addresses.split(",") if part.strip())
    for part in parts:
        split_address(part)
    return parts


async def look_up(address: str) -> frozenset[str]:
    """The addresses for which host:port stands.

    An IP address stands for itself. A host name stands for all its addresses, those of IPv4 if it has any: a host that
    answers on both families must not count twice.

    Raises OSError for a name that cannot be looked up, UnicodeError for what is no host name at all.
    """
    host, port = split_address(address)
    if is_ip_address(host):
        return frozenset((join_address(str(ipaddress.ip_address(host)), port),))
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    ipv4 = {str(address[0]) for family, *_, address in found if family is socket.AF_INET}
    return frozenset(join_address(ip, port) for ip in ipv4 or {str(address[0]) for *_, address in found})


def bare_host(host: str) -> str:
    """A host's name or IP address as it was given for itself, where an IPv6 address may have brackets.

    Raises ValueError for what is neither.
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
    """False for a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """True if only this machine reaches the host; False for a name, which may have any address, but localhost."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def local_address(announced: str) -> str:
    """The address to call from this machine: a service that listens everywhere also listens on the loopback."""
    host, port = split_address(announced)
    return join_address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)


def bound_socket(host: str, port: int, *, shares_port: bool = False) -> socket.socket:
    """A TCP socket that has the address and does not listen yet; on `::` it takes IPv4 as well, as gRPC does.

    The last connections of an earlier owner, which wait for their time to run out, do not count as somebody else.
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
