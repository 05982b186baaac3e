"""The whole line: gRPC clients on loopback, tokenizer, scheduler, executor, and back as text."""

from __future__ import annotations

import asyncio
import time

import grpc

from bench.report import RequestTrace
from bench.workload import Workload
from scalellm.v1 import common_pb2, generation_pb2, generation_pb2_grpc


async def run_line(address: str, workload: Workload) -> tuple[float, list[RequestTrace]]:
    """Keep `concurrency` streams open until all requests are answered. Returns seconds and traces."""
    prompts = workload.prompts()
    places = asyncio.Semaphore(workload.concurrency)
    sampling = common_pb2.SamplingParams(max_tokens=workload.output_len, temperature=0, ignore_eos=True)

    async with grpc.aio.insecure_channel(address) as channel:
        generate = generation_pb2_grpc.GenerationStub(channel).Generate  # type: ignore[no-untyped-call]

        async def one(prompt: list[int]) -> RequestTrace:
            async with places:
                trace = RequestTrace(time.perf_counter())
                request = generation_pb2.GenerateRequest(
                    tokens=generation_pb2.TokenIds(ids=prompt), sampling=sampling, skip_special_tokens=False
                )
                async for response in generate(request):
                    if response.WhichOneof("event") == "delta" and response.delta.num_tokens:
                        trace.arrivals.append(time.perf_counter())
                        trace.counts.append(response.delta.num_tokens)
                return trace

        started = time.perf_counter()
        traces = await asyncio.gather(*(one(prompt) for prompt in prompts))
        return time.perf_counter() - started, list(traces)
