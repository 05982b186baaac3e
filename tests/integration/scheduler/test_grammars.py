"""Requests whose answers have a shape, among executors of which not all can keep to one."""

import grpc

from scalellm.v1 import scheduler_pb2


async def test_a_grammar_goes_to_executors_that_take_it(
    make_executor, make_scheduler, make_edge, make_line, eventually
):
    old = await make_line()
    refused = await old.edge.submit(20, 12, grammar="start: /a/")
    await old.edge.finish(refused)
    assert refused.finish.status.code == grpc.StatusCode.UNIMPLEMENTED.value[0]
    assert refused.finish.status.field == "structured_output"
    old.check_books()
    unable, able = await make_executor(), await make_executor(takes_grammars=True)
    server = await make_scheduler(unable, able)
    ready = scheduler_pb2.EXECUTOR_PHASE_READY
    await eventually(lambda: [executor.phase for executor in server.service.get_state().executors] == [ready, ready])
    edge = await make_edge(server.address).open()
    streams = [await edge.submit(20, 12, grammar="start: /a/" if place % 2 else "") for place in range(12)]
    await edge.finish(*streams)
    for stream in streams:
        stream.check_tokens(12)
    assert [submit.grammar for submit in able.submits].count("start: /a/") == 6
    assert not any(submit.grammar for submit in unable.submits)
