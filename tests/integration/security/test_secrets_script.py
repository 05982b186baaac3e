"""`scripts/secrets`: what it makes fits together, and only the certificates are new when it is called again."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import trustme

from certificates import issue
from service_processes import ROOT
from services.common.link_token import read_token
from services.common.tls import TlsFiles

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")

SERVICES = ("tokenizer", "scheduler", "executor", "redis", "prometheus")


def make(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SCALELLM_SECRETS": str(folder)}
    command = [ROOT / "scripts" / "secrets", *names]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def names(certificate: Path) -> str:
    command = ["openssl", "x509", "-in", str(certificate), "-noout", "-ext", "subjectAltName"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def signed(certificate: Path, authority: Path) -> bool:
    command = ["openssl", "verify", "-CAfile", str(authority), str(certificate)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_files_fit_together_and_are_for_those_who_need_them(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    assert make(folder, "api.example.com", "203.0.113.7", "fd00::1").returncode == 0
    assert folder.stat().st_mode & 0o777 == 0o700
    for service in SERVICES:
        own = folder / service
        assert own.stat().st_mode & 0o777 == 0o755
        assert {file.stat().st_mode & 0o777 for file in own.iterdir()} == {0o644}
        TlsFiles(own / "inner.pem", own / "inner.key", own / "inner-ca.pem").read()
        assert signed(own / "inner.pem", own / "inner-ca.pem")
        assert f"DNS:{service}," in names(own / "inner.pem")
        assert (own / "link.token").exists() == (service not in ("redis", "prometheus"))
        assert not (own / "edge.key").exists() or service == "tokenizer"
    edge = folder / "tokenizer"
    TlsFiles(edge / "edge.pem", edge / "edge.key", edge / "clients-ca.pem").read()
    assert signed(edge / "edge.pem", folder / "client" / "ca.pem")
    assert signed(folder / "client" / "client.pem", edge / "clients-ca.pem")
    assert not signed(edge / "edge.pem", edge / "inner-ca.pem")
    for name in ("DNS:localhost", "DNS:api.example.com", "IP Address:203.0.113.7", "IP Address:FD00:0:0:0:0:0:0:1"):
        assert name in names(edge / "edge.pem")
    read_token(folder / "executor" / "link.token")


def test_called_again_it_renews_certificates_and_nothing_else(tmp_path: Path) -> None:
    assert make(tmp_path).returncode == 0
    (tmp_path / "tokenizer" / "keys.toml").write_text("# keys")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert make(tmp_path).returncode == 0
    renewed = {str(path.relative_to(tmp_path)) for path, old in before.items() if path.read_bytes() != old}
    pairs = [f"{service}/inner" for service in SERVICES] + ["tokenizer/edge", "tokenizer/probe", "client/client"]
    assert renewed == {f"{pair}.{kind}" for pair in pairs for kind in ("pem", "key")}


def test_a_certificate_of_another_authority_stays(tmp_path: Path) -> None:
    assert make(tmp_path).returncode == 0
    bought = issue(tmp_path / "bought", trustme.CA(), "api.example.com")
    for source, name in ((bought.cert, "edge.pem"), (bought.key, "edge.key"), (bought.ca, "ca.pem")):
        (tmp_path / "tokenizer" / name).write_bytes(source.read_bytes())
    assert "is of another authority: it stays" in make(tmp_path).stderr
    assert (tmp_path / "tokenizer" / "edge.key").read_bytes() == bought.key.read_bytes()
    assert (tmp_path / "client" / "ca.pem").read_bytes() == bought.ca.read_bytes()


def test_what_is_no_name_is_refused(tmp_path: Path) -> None:
    done = make(tmp_path, "https://api.example.com")
    assert done.returncode == 1
    assert done.stderr == "error: https://api.example.com is neither a host's name nor an IP address\n"
