"""host:port in both families: what is taken apart, put together, refused, and listened on."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm.services.common.addresses import (
    bare_host,
    bound_socket,
    is_loopback,
    join_address,
    local_address,
    split_address,
)
from scalellm.services.common.settings import ServiceSettings
from scalellm.services.tokenizer.config import TokenizerSettings

PORTS = st.integers(1, 65535)
HOSTS = st.one_of(
    st.from_regex(r"[a-z0-9_]([a-z0-9_.-]{0,20}[a-z0-9])?", fullmatch=True),
    st.ip_addresses().map(str),
)


@given(HOSTS, PORTS)
def test_what_is_joined_comes_apart_again(host: str, port: int) -> None:
    assert split_address(join_address(host, port)) == (host, port)
    assert bare_host(host) == host


@given(st.ip_addresses(v=6), PORTS)
def test_an_ipv6_address_needs_brackets_before_a_port(ip: ipaddress.IPv6Address, port: int) -> None:
    assert bare_host(f"[{ip}]") == str(ip)
    with pytest.raises(ValueError, match=r"an IPv6 address stands in brackets"):
        split_address(f"{ip}:{port}")


@pytest.mark.parametrize(
    "bad",
    [
        *(
            "",
            "host",
            "host:",
            ":50",
            "host:0",
            "host:65536",
            "host:x",
            "host:٣",
            "[]:50",
            "[host]:50",
            "[::1",
            "[::1]",
        ),
        *("::1", "[1.2.3.4]:50", "a b:50", "user@host:50", "host/path:50", "http://host:50", "[::1]x:50", "a\n:50"),
        "1:2:3:50",
    ],
)
def test_what_is_no_address(bad: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        split_address(bad)


@pytest.mark.parametrize("bad", ["", "[]", "[::1", "::1]", ":::1", "[host]", "a b", "host:50", "[::1]:50"])
def test_what_is_no_host(bad: str) -> None:
    with pytest.raises(ValueError, match="is neither a host's name nor an IP address"):
        bare_host(bad)


def test_settings_take_both_forms_of_a_host_and_name_what_they_refuse() -> None:
    assert [ServiceSettings(host=host).host for host in ("::1", "[::1]", "::", "localhost")] == [
        *("::1", "::1", "::", "localhost")
    ]
    with pytest.raises(ValueError, match="host:50051' is neither a host's name nor an IP address"):
        ServiceSettings(host="host:50051")
    assert TokenizerSettings(scheduler="[::1]:1").scheduler == "[::1]:1"
    with pytest.raises(ValueError, match=r"an IPv6 address stands in brackets, \[::1\]:50052"):
        TokenizerSettings(scheduler="::1:50052")
    assert ServiceSettings(otlp_endpoint="http://[::1]:4317").otlp_endpoint == "http://[::1]:4317"
    for wrong in ("http://::1:4317", "http://host", "ftp://host:1", "http://host:0", "http://host:1/v1"):
        with pytest.raises(ValueError, match="host:port"):
            ServiceSettings(otlp_endpoint=wrong)


def test_the_loopback_interface() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.8.8.8", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "host", "")))
    assert local_address("0.0.0.0:5") == "127.0.0.1:5"
    assert local_address("[::]:5") == "[::1]:5"
    assert local_address("[fd00::1]:5") == "[fd00::1]:5"


@pytest.mark.parametrize(
    ("host", "reached"), [("127.0.0.1", [True, False]), ("::1", [False, True]), ("::", [True, True])]
)
def test_listening_on_either_family_and_on_both(host: str, reached: list[bool]) -> None:
    with bound_socket(host, 0) as server:
        server.listen()
        port = server.getsockname()[1]
        found = []
        for client in ("127.0.0.1", "::1"):
            try:
                socket.create_connection((client, port), 10).close()
                found.append(True)
            except ConnectionRefusedError:
                found.append(False)
        assert found == reached
        with pytest.raises(OSError, match="in use"):
            bound_socket(host, port)
