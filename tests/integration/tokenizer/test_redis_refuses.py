"""A Redis that answers and refuses: clients, the log and the metrics say why, and all is well once it does its work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from redis import Redis

from line import scrape
from scalellm.v1 import generation_pb2
from scripted_scheduler import ScriptedScheduler
from service_processes import RedisProcess, Spawn, eventually


def turn() -> generation_pb2.GenerateRequest:
    chat = generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content="Hi")])
    return generation_pb2.GenerateRequest(chat=chat, session_id="s", sampling={"max_tokens": 2})


async def test_a_turn_without_its_session_says_why(
    spawn: Spawn, redis: RedisProcess, model_dir: Callable[[str], Path], connect: Callable
) -> None:
    scheduler = await ScriptedScheduler().start()
    with Redis.from_url(redis.url) as admin:
        admin.execute_command("ACL", "SETUSER", "user", "on", ">secret", "~scalellm:*", "+@all", "-@scripting")
        service = spawn(
            "tokenizer",
            *("--scheduler", scheduler.address, "--model", str(model_dir("smollm2-135m-instruct")), "--workers", "1"),
            *("--redis-url", redis.url.replace("unix://", "unix://user:secret@"), "--metrics-port", "0"),
        )
        client = connect(service.address)
        await client.wait_serving()  # requests without a session are served
        await eventually(lambda: scrape(service)["scalellm_tokenizer_redis_unusable"] == 1)
        assert "Redis does not permit what the service needs: " in service.log.read_text()
        assert "'eval' command" in service.log.read_text()
        answer = await client.generate(turn())
        assert answer.finished.session == generation_pb2.SESSION_OUTCOME_UNAVAILABLE

        for command, cause in (
            (("ACL", "SETUSER", "user", "resetkeys", "~other:*"), "does not permit what the service needs"),
            (("ACL", "SETUSER", "user", "allkeys", "+@all", "resetpass"), "does not accept the service's password"),
        ):
            admin.execute_command(*command)
            if "resetpass" in command:
                admin.execute_command("CLIENT", "KILL", "USER", "user")
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await client.generate(turn())
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            assert f"the session store {cause}; requests without" in (error.value.details() or "")

        admin.execute_command("ACL", "SETUSER", "user", ">secret")
        await eventually(lambda: scrape(service)["scalellm_tokenizer_redis_unusable"] == 0)
        assert (await client.generate(turn())).finished.session == generation_pb2.SESSION_OUTCOME_SAVED
    await client.channel.close()
    service.terminate()
    await scheduler.stop()
