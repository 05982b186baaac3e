"""A request that ends one engine after the other is found among its neighbours, and not run again."""

import grpc

INTERNAL = grpc.StatusCode.INTERNAL.value[0]


async def test_a_request_that_ends_two_engines_is_quarantined(make_line, eventually):
    line = await make_line(4)
    for executor in line.executors:
        executor.hold()  # whoever takes it up has no token to show
    poison = await line.edge.submit([6, 6, 6], 100_000, temperature=1)
    await eventually(lambda: any(executor.running for executor in line.executors))
    for _ in range(2):
        (victim,) = [executor for executor in line.executors if executor.running]
        await victim.die()
        await eventually(lambda: poison.finish or any(executor.running for executor in line.executors))
    await line.edge.finish(poison)
    assert poison.code == INTERNAL
    message = poison.finish.status.message
    assert f"2 executors died while they ran request 'r{poison.handle}'" in message
    assert sum(len(executor.submits) for executor in line.executors) == 2
    for executor in line.executors:
        executor.release()
    again = await line.edge.submit([6, 6, 6], 100_000, temperature=1, seed=5)
    await line.edge.finish(again)
    assert again.code == INTERNAL
    assert again.finish.status.message.startswith("this request ended engines when it ran before")
    assert message[message.index("(SHA-256") :].split(";")[0] in again.finish.status.message
    others = [await line.edge.submit([6, 6, 6], 8, temperature=2), await line.edge.submit([6, 6, 7], 8)]
    await line.edge.finish(*others)
    for other in others:
        other.check_tokens(8)
    assert line.check_books().rejected == 2
