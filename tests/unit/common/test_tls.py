"""PEM files: what is wrong with them is said with the option and the file, and a change is read."""

from __future__ import annotations

import pytest
import trustme

from certificates import issue
from scalellm.services.common.link import LinkDialer
from scalellm.services.common.reload import ConfigFileError
from scalellm.services.common.tls import TlsFiles, channel_credentials, server_credentials


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def identity(tmp_path, authority):
    return issue(tmp_path, authority)


def test_no_files_are_plaintext():
    assert server_credentials(TlsFiles()) is None
    assert channel_credentials(TlsFiles()) is None


def test_refusals_name_the_option_and_the_file(tmp_path, authority, identity):
    other = issue(tmp_path / "other", authority)
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("no certificate")
    cases = {
        "--tls-key: is missing": TlsFiles(cert=identity.cert),
        "--tls-cert: is missing: a listener": TlsFiles(ca=identity.ca),
        "--link-tls-cert: is missing: a certificate": TlsFiles(key=identity.key, option="--link-tls"),
        f"--tls-cert: cannot read {tmp_path}/none.pem": TlsFiles(tmp_path / "none.pem", identity.key),
        f"--tls-cert, --tls-key: {identity.cert} and {other.key} cannot be used: they do not belong": TlsFiles(
            identity.cert, other.key
        ),
        f"--tls-cert, --tls-key: {rubbish} and": TlsFiles(rubbish, identity.key),
        f"--tls-ca: {rubbish} holds no PEM certificate": TlsFiles(identity.cert, identity.key, rubbish),
        "--link-tls-ca: cannot read": TlsFiles(ca=tmp_path / "none.pem", option="--link-tls"),
    }
    for message, files in cases.items():
        with pytest.raises(ConfigFileError) as refusal:
            (channel_credentials if files.option != "--tls" else server_credentials)(files)
        assert str(refusal.value).startswith(message)


def test_link_token(tmp_path):
    path = tmp_path / "token"
    dialer = LinkDialer(token_file=path)
    with pytest.raises(ConfigFileError, match=r"--link-token-file: cannot read .*token"):
        dialer.check()
    for wrong in ("short", "x" * 40 + " y", "é" * 40):
        path.write_text(wrong)
        with pytest.raises(ConfigFileError, match="at least 32 printable ASCII"):
            dialer.check()
    path.write_text("0123456789abcdef" * 2 + "\n")
    assert dialer.metadata() == (("authorization", "Bearer 0123456789abcdef0123456789abcdef"),)
