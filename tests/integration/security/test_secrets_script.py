"""`scripts/secrets`: what it makes fits together, and only the certificates are new when it is called again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import trustme
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError

from certificates import issue
from scalellm.services.common.link_token import read_token
from scalellm.services.common.redis_client import open_redis
from scalellm.services.common.redis_health import probe_redis
from scalellm.services.common.tls import TlsFiles
from service_processes import PATIENCE, ROOT, start_redis

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


def redis_user(folder: Path, service: str) -> tuple[str, str]:
    """Name and password in a service's address of Redis."""
    text = (folder / f"{service}.env").read_text()
    found = re.search(
        rf"^SCALELLM_{service.upper()}_REDIS_URL=rediss://(\w+):(\w{{64}})@redis:6379/0\?ssl_", text, re.M
    )
    assert found is not None
    return found[1], found[2]


async def test_redis_knows_each_service_by_its_password_and_lets_it_do_what_it_needs(tmp_path: Path) -> None:
    assert make(tmp_path / "secrets").returncode == 0
    redis = start_redis(tmp_path, "--aclfile", str(tmp_path / "secrets" / "redis" / "users.acl"))
    try:
        urls = {}
        for service in ("tokenizer", "scheduler"):
            user, password = redis_user(tmp_path / "secrets", service)
            urls[service] = redis.url.replace("unix://", f"unix://{user}:{password}@")
            async with open_redis(urls[service], timeout=PATIENCE) as client:
                await probe_redis(client, sessions=service == "tokenizer")
        with Redis.from_url(urls["tokenizer"]) as tokenizer, Redis.from_url(urls["scheduler"]) as scheduler:
            tokenizer.set("scalellm:session:acme:s", "private")
            scheduler.set("scalellm:affinity:s", "h:1", ex=10)
            for refused in (
                lambda: scheduler.get("scalellm:session:acme:s"),
                lambda: scheduler.eval("return 1", 0),
                lambda: tokenizer.set("other", "1"),
                lambda: tokenizer.flushall(),
                lambda: tokenizer.config_get("*"),
            ):
                with pytest.raises(NoPermissionError):
                    refused()
        # Whoever has no password, such as an executor with its certificate, may ask whether it lives.
        with Redis.from_url(redis.url) as stranger:
            assert stranger.ping()
            for command in (("GET", "scalellm:affinity:s"), ("INFO",), ("ACL", "LIST"), ("EVAL", "return 1", "0")):
                with pytest.raises(NoPermissionError):
                    stranger.execute_command(*command)
            with pytest.raises(AuthenticationError):
                stranger.execute_command("AUTH", "tokenizer", "wrong")
    finally:
        redis.stop()


def test_a_folder_of_an_earlier_release_gets_what_it_lacks(tmp_path: Path) -> None:
    assert make(tmp_path).returncode == 0
    salt = (tmp_path / "tokenizer.env").read_text().splitlines(keepends=True)[0]
    assert salt.startswith("SCALELLM_TOKENIZER_SALT_SECRET=")
    (tmp_path / "tokenizer.env").write_text(salt)
    (tmp_path / "scheduler.env").unlink()
    assert make(tmp_path).returncode == 0
    assert (tmp_path / "tokenizer.env").read_text().startswith(salt)
    users = (tmp_path / "redis" / "users.acl").read_text()
    for service in ("tokenizer", "scheduler"):
        name, password = redis_user(tmp_path, service)
        assert f"user {name} on #" in users
        assert password not in users
    (tmp_path / "scheduler.env").write_text("SCALELLM_SCHEDULER_REDIS_URL=redis://mine\n")
    refused = make(tmp_path)
    assert refused.returncode == 1
    assert "scheduler.env: SCALELLM_SCHEDULER_REDIS_URL has not the form" in refused.stderr
