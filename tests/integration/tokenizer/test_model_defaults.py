"""A model's own sampling settings reach the executor with every request that does not say otherwise."""

from __future__ import annotations

import aiohttp

from scalellm.v1 import common_pb2, generation_pb2, tokenizer_pb2


async def test_settings_of_the_model_are_defaults(scheduler, spawn, connect, model_dir, tmp_path) -> None:
    for file in model_dir("smollm2-135m-instruct").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.25, "top_k": 20, "top_p": 0.9}')
    started = ("--scheduler", scheduler.address, "--model", str(tmp_path), "--workers", "1")
    for option, expected in (
        ("auto", common_pb2.SamplingParams(temperature=0.25, top_k=20, top_p=0.9)),
        ("none", common_pb2.SamplingParams()),
    ):
        service = spawn("tokenizer", *started, "--generation-config", option)
        client = connect(service.address)
        await client.wait_serving()
        info = await client.tokenizer.GetInfo(tokenizer_pb2.GetInfoRequest())
        assert info.sampling_defaults == expected
        for sampling in (common_pb2.SamplingParams(), common_pb2.SamplingParams(temperature=0, seed=1)):
            scheduler.submits.clear()
            await client.generate(generation_pb2.GenerateRequest(prompt="Hi", sampling=sampling))
            got = scheduler.submits[0].sampling
            assert got.HasField("temperature") == (option == "auto" or sampling.HasField("temperature"))
            assert got.temperature == (0.25 if option == "auto" and not sampling.HasField("temperature") else 0)
            assert got.top_k == expected.top_k
        async with aiohttp.ClientSession() as http:
            for given, top_p in (({}, 0.9 if option == "auto" else 1), ({"top_p": 0.7}, 0.7)):
                body = {"input": "Hi", "max_output_tokens": 1, **given}
                async with http.post(f"http://{service.http_address}/v1/responses", json=body) as reply:
                    told = await reply.json()
                assert (told["temperature"], told["top_p"]) == (0.25 if option == "auto" else 1, top_p)
        await client.channel.close()
        service.terminate()
