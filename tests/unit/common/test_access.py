"""Access control: the file of keys, the table of methods, and changes while a service runs."""

from __future__ import annotations

import contextvars

import grpc
import pytest
from google.protobuf.descriptor_pool import Default

from scalellm.services.common.access import METHODS, Access, open_access
from scalellm.services.common.api_keys import (
    DEFAULT_TENANT,
    Role,
    Tenant,
    TenantLimits,
    key_entry,
    new_key,
    read_api_keys,
)
from scalellm.services.common.errors import StatusError
from scalellm.services.common.reload import ConfigFileError
from scalellm.services.scheduler.config import SchedulerSettings
from scalellm.v1 import executor_pb2, generation_pb2, scheduler_pb2, sessions_pb2, tokenizer_pb2

GENERATE = "/scalellm.v1.Generation/Generate"
CONNECT = "/scalellm.v1.Scheduler/Connect"
DRAIN = "/scalellm.v1.Scheduler/Drain"
HEALTH = "/grpc.health.v1.Health/Check"
TOKEN = "0123456789abcdef" * 2


def bearer(secret):
    return (("authorization", f"Bearer {secret}"),)


def code(access, method, metadata=()):
    try:
        access.check(method, metadata)
    except StatusError as error:
        return error.code
    return grpc.StatusCode.OK


def tenant_of(access, key, method=GENERATE):
    """Return the tenant of a call that shows a key, in a context of its own as calls have."""

    def call():
        access.check(method, bearer(key))
        return access.tenant()

    return contextvars.Context().run(call)


@pytest.fixture
def user_key():
    return new_key()


@pytest.fixture
def admin_key():
    return new_key()


@pytest.fixture
def key_file(tmp_path, user_key, admin_key):
    path = tmp_path / "keys.toml"
    limits = "[limits]\nconcurrent_requests = 7\n[tenants.acme]\ntokens_per_minute = 1000\n"
    path.write_text(limits + key_entry(user_key, "acme", Role.USER) + key_entry(admin_key, "ops", Role.ADMIN))
    return path


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return path


def test_every_method_of_every_service_is_in_the_table():
    assert [module.DESCRIPTOR for module in (executor_pb2, generation_pb2, scheduler_pb2, sessions_pb2, tokenizer_pb2)]
    names = ("Executor", "Generation", "Scheduler", "Sessions", "Tokenizer")
    services = [Default().FindServiceByName(f"scalellm.v1.{name}") for name in names]
    listed = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert {method for method in METHODS if method.startswith("/scalellm.")} == listed


def test_without_files_everything_is_open():
    access = Access()
    assert access.is_open
    assert access.interceptors == ()
    assert access.tenant() is DEFAULT_TENANT


def test_roles(key_file, token_file, user_key, admin_key):
    ok, denied, unknown = (
        grpc.StatusCode.OK,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
    )
    access = Access(key_file, token_file)
    callers = {
        "nobody": (),
        "stranger": bearer(new_key()),
        "garbled": (("authorization", "Basic abc"),),
        "user": bearer(user_key),
        "admin": bearer(admin_key),
        "link": bearer(TOKEN),
    }
    expected = {
        HEALTH: (ok, ok, ok, ok, ok, ok),
        GENERATE: (unknown, unknown, unknown, ok, ok, denied),
        DRAIN: (unknown, unknown, unknown, denied, ok, ok),
        CONNECT: (unknown, unknown, unknown, denied, denied, ok),
        "/scalellm.v1.Generation/Unheard": (unknown, unknown, unknown, denied, denied, denied),
    }
    assert {
        method: tuple(code(access, method, metadata) for metadata in callers.values()) for method in expected
    } == expected
    assert tenant_of(access, user_key) == Tenant("acme", TenantLimits(tokens_per_minute=1000))
    assert tenant_of(access, admin_key) == Tenant("ops", TenantLimits(concurrent_requests=7))


def test_each_call_has_the_tenant_that_it_showed(key_file, user_key, admin_key):
    access = Access(key_file)
    assert [tenant_of(access, key).name for key in (user_key, admin_key)] == ["acme", "ops"]
    for method, key in ((HEALTH, user_key), (DRAIN, user_key), (GENERATE, new_key())):
        with pytest.raises(StatusError) as error:
            tenant_of(access, key, method)
        assert error.value.code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED), method


def test_links_are_known_by_certificate_where_there_is_no_token(key_file):
    assert code(Access(key_file, trusts_certificates=True), CONNECT) is grpc.StatusCode.OK
    assert code(Access(key_file, trusts_certificates=True), DRAIN) is grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(ConfigFileError, match="--api-keys: on this service needs --link-token-file or --tls-ca"):
        open_access(SchedulerSettings(api_keys=key_file), serves_links=True)


def test_changes_are_taken_over_and_mistakes_are_not(key_file, user_key, monkeypatch, caplog):
    monkeypatch.setattr("scalellm.services.common.access._REFRESH_INTERVAL", 0.0)
    access = Access(key_file)
    key_file.write_text("[[keys]]\n")
    assert code(access, GENERATE, bearer(user_key)) is grpc.StatusCode.OK
    assert "keys.0.sha256: Field required" in caplog.text
    other = new_key()
    key_file.write_text(key_entry(other, "acme", Role.USER))
    assert code(access, GENERATE, bearer(user_key)) is grpc.StatusCode.UNAUTHENTICATED
    assert code(access, GENERATE, bearer(other)) is grpc.StatusCode.OK


@pytest.mark.parametrize("how", ["gone", "broken"])
def test_keys_that_cannot_be_read_for_long_open_nothing(key_file, user_key, monkeypatch, how):
    monkeypatch.setattr("scalellm.services.common.access._REFRESH_INTERVAL", 0.0)
    access, text = Access(key_file), key_file.read_text()
    assert not access.is_failing
    if how == "gone":
        key_file.unlink()
    else:
        key_file.write_text("[[keys]]")
    assert code(access, GENERATE, bearer(user_key)) is grpc.StatusCode.OK
    assert (access.is_failing, access.is_stale) == (True, False)
    monkeypatch.setattr("scalellm.services.common.access._STALE_LIMIT", 0.0)
    assert access.is_stale
    assert code(access, GENERATE, bearer(user_key)) is grpc.StatusCode.UNAVAILABLE
    assert code(access, HEALTH) is grpc.StatusCode.OK
    key_file.write_text(text)
    assert code(access, GENERATE, bearer(user_key)) is grpc.StatusCode.OK
    assert (access.is_failing, access.is_stale) == (False, False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("keys = 3", "keys: Input should be a valid list"),
        ('[[keys]]\nsha256 = "x"\ntenant = "a"', "keys.0.sha256: String should match"),
        (key_entry("k", "a:b", Role.USER), "keys.0.tenant: String should match"),
        (key_entry("k", "a", Role.LINK), "keys.0.role: must be user or admin"),
        (key_entry("k", "a", Role.USER) * 2, "keys.1.sha256: the key is listed twice"),
        ("[limits]\nrequests_per_second = 3", "limits.requests_per_second: Extra inputs are not permitted"),
        ("[tenants.a]\ntokens_per_minute = 0", "tenants.a.tokens_per_minute: Input should be greater than or equal to"),
        ("[tenants.a]\nweight = 0.001", "tenants.a.weight: Input should be greater than or equal to 0.01"),
        ("[limits]\nweight = inf", "limits.weight: Input should be less than or equal to 100"),
        ("[", "is not TOML"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, text, said):
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ConfigFileError) as error:
        read_api_keys(path)
    assert str(error.value).startswith(f"--api-keys: {path}")
    assert said in str(error.value)
