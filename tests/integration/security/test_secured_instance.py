"""An instance that is secured from end to end, as an operator brings it up with the command line."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
import trustme

from certificates import issue
from installed_cli import Cli


@pytest.mark.slow
def test_up_status_generate_and_down(tmp_path: Path, model_dir) -> None:
    public, inner = issue(tmp_path / "public", trustme.CA()), issue(tmp_path / "inner", trustme.CA())
    keys, token = tmp_path / "keys.toml", tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    listeners = {"TOKENIZER": public, "SCHEDULER": inner, "EXECUTOR": inner}
    variables = {f"SCALELLM_{name}_TLS_CERT": str(own.cert) for name, own in listeners.items()}
    variables |= {f"SCALELLM_{name}_TLS_KEY": str(own.key) for name, own in listeners.items()}
    variables |= {f"SCALELLM_{name}_LINK_TOKEN_FILE": str(token) for name in listeners}
    variables |= {f"SCALELLM_{name}_LINK_TLS_CA": str(inner.ca) for name in ("TOKENIZER", "SCHEDULER")}
    cli = Cli(tmp_path, SCALELLM_TOKENIZER_API_KEYS=str(keys), SCALELLM_TLS_CA=str(public.ca), **variables)

    code, key, err = cli.run("keys", "create", "--tenant", "acme", "--file", str(keys))
    assert (code, err) == (0, "")
    assert key.strip() not in keys.read_text()
    assert keys.stat().st_mode & 0o077 == 0
    model = str(model_dir("smollm2-135m-instruct"))
    code, _, err = cli.run("up", "--port", "0", "--executor", "fake", "--model", model)
    assert code == 0, err
    try:
        code, out, err = cli.run("status", SCALELLM_API_KEY=key.strip())
        assert code == 0, out + err
        assert "1/1 executors" in out
        generate = ("generate", "Hello", "--max-tokens", "3")
        code, out, err = cli.run(*generate, SCALELLM_API_KEY=key.strip())
        assert (code, bool(out.strip())) == (0, True), err
        code, _, err = cli.run(*generate)
        assert code == 2
        assert err.startswith("error: authorization: is missing; ")
        assert err.endswith(": set SCALELLM_API_KEY, or give --api-key before the command\n")
        code, _, err = cli.run("--api-key", "slm-wrong", *generate)
        assert (code, err.startswith("error: authorization: this key is not known")) == (2, True)
        code, _, err = cli.run("--tls-ca", str(inner.ca), *generate)
        assert (code, "is not of an authority in" in err) == (2, True), err
        code, _, err = cli.run("--tls-ca", str(tmp_path / "none"), *generate)
        assert (code, err) == (1, f"error: cannot read {tmp_path}/none: No such file or directory\n")
    finally:
        code, _, err = cli.run("down")
    assert code == 0, err


def test_keys_create_without_a_file_shows_the_entry(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    code, key, err = cli.run("keys", "create", "--tenant", "ops", "--admin")
    assert (code, key.startswith("slm-"), len(key.strip())) == (0, True, 47)
    assert 'tenant = "ops"\nrole = "admin"' in err
    code, _, err = cli.run("keys", "create", "--tenant", "a:b")
    assert code == 2
    assert err.startswith("error: --tenant: use 1 to 64 letters")
