"""Metrics over TLS: who shows no certificate of the right authority is told nothing; files are read again."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import pytest
import trustme

from certificates import Identity, issue
from scalellm.cli.scraping import scrape
from scalellm.client import Credentials
from scalellm.services.common.lifecycle import StartError
from scalellm.services.common.metrics import MetricsEndpoint
from scalellm.services.common.tls import TlsFiles
from service_processes import PATIENCE, Spawn


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def own(tmp_path: Path, authority: trustme.CA) -> Identity:
    return issue(tmp_path / "own", authority)


@pytest.fixture
def endpoint(own: Identity):
    files = TlsFiles(own.cert, own.key, own.ca, option="--metrics-tls")
    endpoint = MetricsEndpoint("127.0.0.1", 0, "executor", [], tls=files)
    yield endpoint
    endpoint.stop()


def test_only_who_shows_a_certificate_is_answered(endpoint: MetricsEndpoint, own: Identity, tmp_path: Path) -> None:
    mine = Credentials(tls_ca=own.ca, tls_cert=own.cert, tls_key=own.key).tls_context()
    assert [answer.service for answer in scrape([endpoint.address], mine)] == ["executor"]
    other = issue(tmp_path / "other", trustme.CA())
    strangers = (
        None,
        Credentials(tls_ca=own.ca).tls_context(),
        Credentials(tls_ca=own.ca, tls_cert=other.cert, tls_key=other.key).tls_context(),
    )
    for stranger in strangers:
        assert [dict(answer.samples) for answer in scrape([endpoint.address], stranger)] == [{}]


def test_new_certificates_are_shown(endpoint: MetricsEndpoint, own: Identity, authority: trustme.CA) -> None:
    issue(own.cert.parent, authority)
    context = Credentials(tls_ca=own.ca, tls_cert=own.cert, tls_key=own.key).tls_context()
    assert context is not None
    host, port = endpoint.address.split(":")
    with (
        socket.create_connection((host, int(port))) as plain,
        context.wrap_socket(plain, server_hostname=host) as secured,
    ):
        shown = secured.getpeercert(binary_form=True)
    assert ssl.DER_cert_to_PEM_cert(shown) in own.cert.read_text()


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    files = TlsFiles(tmp_path / "none.pem", tmp_path / "none.key", option="--metrics-tls")
    with pytest.raises(StartError, match="--metrics-tls-cert: cannot read"):
        MetricsEndpoint("127.0.0.1", 0, "executor", [], tls=files)


def test_metrics_stay_on_the_loopback_interface_until_told_otherwise(spawn: Spawn) -> None:
    """127.0.0.2 stands for an address that others reach."""

    def open_elsewhere(*flags: str) -> tuple[bool, bool]:
        service = spawn("scheduler", "--host", "0.0.0.0", "--metrics-port", "0", *flags)
        port = int(service.metrics_address.rpartition(":")[2])
        socket.create_connection(("127.0.0.1", port), PATIENCE).close()
        with socket.socket() as client:
            is_open = client.connect_ex(("127.0.0.2", port)) == 0
        warned = "metrics on 0.0.0.0 are open to everybody who reaches it" in service.log.read_text()
        service.terminate()
        return is_open, warned

    assert open_elsewhere() == (False, False)
    assert open_elsewhere("--metrics-host", "0.0.0.0") == (True, True)
