"""`compose.yaml` with `deploy/secure.yaml`, as an operator does it: without certificate, key and token nobody gets in.

The tests share one project and run in this order.
"""

from __future__ import annotations

import os
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from certificates import issue
from compose_stack import ROOT, ComposeStack
from scalellm.client import Client, ClientError, Credentials
from scalellm.services.common.api_keys import Role, key_entry, new_key
from scalellm.v1 import generation_pb2

INTRUDER = """
import grpc
from pathlib import Path
from scalellm.v1 import scheduler_pb2 as pb, scheduler_pb2_grpc
folder = Path("/run/secrets")
ca, cert, key = ((folder / name).read_bytes() for name in ("inner-ca.pem", "inner.pem", "inner.key"))
for channel in (
    grpc.insecure_channel("scheduler:50052"),
    grpc.secure_channel("scheduler:50052", grpc.ssl_channel_credentials(ca)),
    grpc.secure_channel("scheduler:50052", grpc.ssl_channel_credentials(ca, key, cert)),
):
    try:
        print(scheduler_pb2_grpc.SchedulerStub(channel).GetState(pb.GetStateRequest(), timeout=10))
    except grpc.RpcError as error:
        print(error.code().name)
    channel.close()
"""

AT_REDIS_WITHOUT_A_PASSWORD = """
import redis
files = {f"ssl_{name}": f"/run/secrets/inner{end}" for name, end in
    (("ca_certs", "-ca.pem"), ("certfile", ".pem"), ("keyfile", ".key"))}
client = redis.Redis(host="redis", ssl=True, **files)
print(client.ping())
for command in (("GET", "scalellm:affinity:kept"), ("KEYS", "*"), ("EVAL", "return 1", "0"), ("CONFIG", "GET", "*")):
    try:
        print(client.execute_command(*command))
    except redis.exceptions.NoPermissionError:
        print("NOPERM")
"""


def make_secrets(folder: Path) -> None:
    subprocess.run([ROOT / "scripts" / "secrets"], env={**os.environ, "SCALELLM_SECRETS": str(folder)}, check=True)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what an operator makes: the secret files, and an API key for a tenant."""
    folder = tmp_path_factory.mktemp("secrets")
    make_secrets(folder)
    return folder


@pytest.fixture(scope="module")
def credentials(secrets: Path) -> Credentials:
    key = new_key()
    (secrets / "tokenizer" / "keys.toml").write_text(key_entry(key, "acme", Role.USER))
    return Credentials(key, secrets / "client" / "ca.pem")


@pytest.fixture(scope="module")
def stack(figures: list[str], secrets: Path, credentials: Credentials) -> Iterator[ComposeStack]:
    stack = ComposeStack(COMPOSE_FILE="compose.yaml:deploy/secure.yaml", SCALELLM_SECRETS=str(secrets))
    try:
        stack.compose("build", timeout=1500)
        started = time.monotonic()
        stack.compose("up", "--wait", "--wait-timeout", "300", timeout=600)
        figures.append(f"secured: up --wait {time.monotonic() - started:.0f} s (with the model)")
        yield stack
    finally:
        stack.down()
        stack.remove_images()


def say_yes(stack: ComposeStack, credentials: Credentials, session_id: str) -> generation_pb2.GenerateResponse:
    chat = generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content="Say yes.")])
    turn = generation_pb2.GenerateRequest(chat=chat, session_id=session_id, sampling={"max_tokens": 8})
    with Client(stack.address, credentials=credentials) as client, client.generate(turn, timeout=60) as stream:
        return list(stream)[-1]


def refusal(stack: ComposeStack, credentials: Credentials) -> str:
    with pytest.raises(ClientError) as error:
        say_yes(stack, credentials, "refused")
    return error.value.code.name


def shown_certificate(stack: ComposeStack) -> str:
    host, port = stack.address.split(":")
    return ssl.get_server_certificate((host, int(port)), timeout=10)


def test_who_shows_a_key_over_tls_is_served_with_a_session(stack: ComposeStack, credentials: Credentials) -> None:
    assert say_yes(stack, credentials, "kept").finished.session == generation_pb2.SESSION_OUTCOME_SAVED
    assert refusal(stack, Credentials(credentials.api_key)) == "UNAVAILABLE"
    assert refusal(stack, Credentials("", credentials.tls_ca)) == "UNAUTHENTICATED"
    assert refusal(stack, Credentials(new_key(), credentials.tls_ca)) == "UNAUTHENTICATED"


def test_within_the_network_nobody_gets_in_without_certificate_and_token(stack: ComposeStack) -> None:
    said = stack.compose("exec", "-T", "tokenizer", "python", "-c", INTRUDER)
    assert said.split() == ["UNAVAILABLE", "UNAVAILABLE", "UNAUTHENTICATED"]
    for options in ((), ("--tls", "--cacert", "/run/secrets/inner-ca.pem")):
        with pytest.raises(AssertionError, match="Connection reset|closed the connection"):
            stack.compose("exec", "-T", "redis", "redis-cli", *options, "ping")


def test_a_certificate_alone_gives_no_access_to_redis(stack: ComposeStack) -> None:
    said = stack.compose("exec", "-T", "executor", "python", "-c", AT_REDIS_WITHOUT_A_PASSWORD)
    assert said.split() == ["True", *["NOPERM"] * 4]


def test_no_container_sees_the_secrets_of_another(stack: ComposeStack) -> None:
    inner = ["inner-ca.pem", "inner.key", "inner.pem"]
    assert stack.compose("exec", "-T", "redis", "ls", "/run/secrets").split() == [*inner, "users.acl"]
    for service in ("scheduler", "executor"):
        assert stack.compose("exec", "-T", service, "ls", "/run/secrets").split() == [*inner, "link.token"]


def test_prometheus_scrapes_a_secured_line(stack: ComposeStack) -> None:
    stack.start_prometheus()
    stack.wait_scraped(tokenizer=1, scheduler=1, executor=1)


def test_renewed_certificates_are_taken_over(stack: ComposeStack, secrets: Path, credentials: Credentials) -> None:
    before = shown_certificate(stack)
    make_secrets(secrets)
    deadline = time.monotonic() + 30
    while (shown := shown_certificate(stack)) == before:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert shown == (secrets / "tokenizer" / "edge.pem").read_text()
    stack.compose("restart", "redis")  # which reads its files at its start
    stack.wait_running("redis", 1)
    assert say_yes(stack, credentials, "renewed").finished.session == generation_pb2.SESSION_OUTCOME_SAVED


def test_clients_may_have_to_show_a_certificate(stack: ComposeStack, secrets: Path, credentials: Credentials) -> None:
    stack.set("SCALELLM_TOKENIZER_TLS_CA", "/run/secrets/clients-ca.pem")
    stack.compose("up", "-d", "--no-deps", "--wait", "tokenizer")  # whose health is asked for with one
    own = Credentials(
        credentials.api_key, credentials.tls_ca, secrets / "client" / "client.pem", secrets / "client" / "client.key"
    )
    assert say_yes(stack, own, "mutual").HasField("finished")
    assert refusal(stack, credentials) == "UNAVAILABLE"


def test_a_certificate_of_another_authority(stack: ComposeStack, secrets: Path, credentials: Credentials) -> None:
    bought = issue(secrets / "bought", trustme.CA(), "api.example.com")
    for source, name in ((bought.cert, "edge.pem"), (bought.key, "edge.key"), (bought.ca, "ca.pem")):
        (secrets / "tokenizer" / name).write_bytes(source.read_bytes())
    stack.set("SCALELLM_EDGE_NAME", "api.example.com")
    stack.compose("up", "-d", "--no-deps", "--wait", "tokenizer")
    make_secrets(secrets)  # which leaves it alone
    assert (secrets / "tokenizer" / "edge.pem").read_bytes() == bought.cert.read_bytes()
    own = Credentials(
        credentials.api_key,
        secrets / "client" / "ca.pem",
        secrets / "client" / "client.pem",
        secrets / "client" / "client.key",
        tls_name="api.example.com",
    )
    assert say_yes(stack, own, "bought").HasField("finished")


def test_down_leaves_nothing(stack: ComposeStack) -> None:
    stack.down()
    assert stack.left() == []
