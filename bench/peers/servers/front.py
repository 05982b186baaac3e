"""OpenAI's completions and chat completions over HTTP, for an engine that takes and gives token ids."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from bench.load.http_server import Reply, serve_http
from bench.peers.servers.stepping import Engine, Stepping

_DEFAULT_MAX_TOKENS = 16


class TextFormat:
    """Text to token ids and back, as the model's own files say.

    Args:
        folder: With `tokenizer.json` and `chat.json` (`bench.peers.weights.write_tokenizer`).
    """

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        chat = json.loads((folder / "chat.json").read_text())
        self.eos_token_ids = set(map(int, chat["eos_token_ids"]))
        self._special_tokens = chat["special_tokens"]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string(chat["template"] or "")

    @property
    def filler(self) -> int:
        """An id that ends neither prompts nor answers: the last special token, or the last of all."""
        added = self.tokenizer.get_added_tokens_decoder()
        special = {token_id for token_id, token in added.items() if token.special}
        return int(max(special - self.eos_token_ids, default=self.tokenizer.get_vocab_size() - 1))

    def encode(self, text: str) -> list[int]:
        """A raw prompt."""
        return list(self.tokenizer.encode(text).ids)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Messages, up to where the answer begins."""
        text = self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens)
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


@dataclass(frozen=True, slots=True)
class _Asked:
    """One request, as far as it is understood."""

    prompt: list[int]
    max_tokens: int
    ignore_eos: bool
    stream: bool
    is_chat: bool


class Front:
    """The handler for `serve_http`: `/models`, `/completions`, `/chat/completions`; greedy decoding only.

    Args:
        model: Name to serve under.
        text: The model's tokenizer and template.
        engine: Computes.
    """

    def __init__(self, model: str, text: TextFormat, engine: Stepping) -> None:
        self._model = model
        self._text = text
        self._engine = engine

    def __call__(self, path: str, body: bytes) -> Reply:
        """Answer one request."""
        if path.endswith("/models"):
            return Reply(_one({"object": "list", "data": [{"id": self._model, "object": "model"}]}))
        try:
            asked = self._understand(path, json.loads(body))
        except (ValueError, LookupError, TypeError) as error:
            return Reply(_one({"error": {"message": f"{type(error).__name__}: {error}", "code": 400}}), status=400)
        if asked.stream:
            return Reply(self._events(asked), "text/event-stream")
        return Reply(self._whole(asked))

    def _understand(self, path: str, body: dict[str, Any]) -> _Asked:
        is_chat = path.endswith("/chat/completions")
        if not is_chat and not path.endswith("/completions"):
            raise ValueError(f"{path} is not served")
        if body.get("temperature"):
            raise ValueError("temperature: only 0 is served")
        prompt = self._text.encode_chat(body["messages"]) if is_chat else self._text.encode(body["prompt"])
        max_tokens = body.get("max_tokens") or body.get("max_completion_tokens") or _DEFAULT_MAX_TOKENS
        return _Asked(prompt, int(max_tokens), bool(body.get("ignore_eos")), bool(body.get("stream")), is_chat)

    async def _pieces(self, asked: _Asked) -> AsyncIterator[tuple[int, str]]:
        """Tokens and text of each step that gave any."""
        decoder = DecodeStream(skip_special_tokens=True)
        async with aclosing(self._engine.generate(asked.prompt, asked.max_tokens, asked.ignore_eos)) as steps:
            async for token_ids in steps:
                texts = (decoder.step(self._text.tokenizer, token_id) for token_id in token_ids)
                yield len(token_ids), "".join(text for text in texts if text)

    async def _events(self, asked: _Asked) -> AsyncIterator[bytes]:
        kind = "chat.completion.chunk" if asked.is_chat else "text_completion"
        head = {"id": "0", "object": kind, "created": int(time.time()), "model": self._model}
        count = 0
        async with aclosing(self._pieces(asked)) as pieces:  # type: ignore[type-var]
            async for num_tokens, text in pieces:
                count += num_tokens
                if text:
                    part = {"delta": {"content": text}} if asked.is_chat else {"text": text}
                    yield _event({**head, "choices": [{"index": 0, **part, "finish_reason": None}]})
        yield _event({**head, "choices": [], "usage": _usage(asked, count)}) + b"data: [DONE]\n\n"

    async def _whole(self, asked: _Asked) -> AsyncIterator[bytes]:
        pieces = [piece async for piece in self._pieces(asked)]
        text = "".join(piece for _, piece in pieces)
        part = {"message": {"role": "assistant", "content": text}} if asked.is_chat else {"text": text}
        usage = _usage(asked, sum(num_tokens for num_tokens, _ in pieces))
        choices = [{"index": 0, **part, "finish_reason": "stop"}]
        yield json.dumps({"id": "0", "model": self._model, "choices": choices, "usage": usage}).encode()


def server_parser(description: str | None, model: str) -> argparse.ArgumentParser:
    """Return the parser of every server's options; `model` describes its model."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help=model)
    parser.add_argument("--tokenizer", type=Path, required=True, help="See bench.peers.weights.write_tokenizer.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    return parser


async def serve_engine(model: str, text: TextFormat, make_engine: Callable[[], Engine], port: int) -> None:
    """Serve until killed, or until the engine's process ends."""
    engine = Stepping(make_engine)
    await engine.ready
    await serve_http(Front(model, text, engine), port)
    await engine.ended


def _usage(asked: _Asked, count: int) -> dict[str, int]:
    return {
        "prompt_tokens": len(asked.prompt),
        "completion_tokens": count,
        "total_tokens": len(asked.prompt) + count,
    }


async def _one(answer: object) -> AsyncIterator[bytes]:
    await asyncio.sleep(0)
    yield json.dumps(answer).encode()


def _event(chunk: object) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"
