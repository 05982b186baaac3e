"""Turns of a conversation: what the model has read keeps its ids, and the text is always the rendered one."""

import random
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from scalellm.services.tokenizer.text.chat_template import ChatTemplate
from scalellm.services.tokenizer.text.content_as_text import MarkedText
from scalellm.services.tokenizer.text.conversation import ConversationEncoder, Segment, answer_segment
from scalellm.services.tokenizer.text.detokenizer import TokenTexts
from scalellm.services.tokenizer.text.model_tokenizer import ModelTokenizer

IM_END = 2


def encoding(tokenizer: Tokenizer) -> Callable[[MarkedText], Awaitable[list[int]]]:
    async def encode(text: MarkedText) -> list[int]:
        assert not text.mark
        ids: list[int] = tokenizer.encode(text.text, add_special_tokens=False).ids
        return ids

    return encode


@pytest.fixture(scope="module")
def template(smollm2: ModelTokenizer) -> ChatTemplate:
    assert smollm2.chat_template is not None
    return ChatTemplate(smollm2.chat_template, smollm2.special_tokens, max_chars=100_000)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), data=st.data())
async def test_generated_tokens_are_never_encoded_again(
    seed: int, data: st.DataObject, smollm2: ModelTokenizer, template: ChatTemplate, token_texts: dict[str, TokenTexts]
) -> None:
    rng = random.Random(seed)
    tokenizer = smollm2.tokenizer
    encoder = ConversationEncoder(tokenizer)
    messages: list[dict[str, str]] = []
    history: tuple[Segment, ...] = ()
    for _ in range(4):
        messages.append({"role": "user", "content": data.draw(st.text(st.sampled_from("ab \n'é😀1"), max_size=12))})
        rendered = template.render(messages, add_generation_prompt=True)
        turn = await encoder.extend(history, MarkedText(rendered), encoding(tokenizer))
        assert turn.kept == history
        assert tokenizer.decode(turn.token_ids, skip_special_tokens=False) == rendered
        if not history:
            assert turn.token_ids == tokenizer.encode(rendered).ids
        # Tokens as a model draws them, which is not how the encoder would cut the text they spell; cut off by length
        # or ended by the end token.
        answer = [rng.randrange(17, 49152) for _ in range(rng.randrange(8))]
        if rng.random() < 0.7:
            answer.append(IM_END)
        content = tokenizer.decode(answer)
        messages.append({"role": "assistant", "content": content})
        segment = answer_segment(token_texts["smollm2"], answer, content)
        assert segment.token_ids == tuple(answer)
        history = (*turn.segments, segment)


async def test_an_answer_cut_by_a_stop_string(
    smollm2: ModelTokenizer, template: ChatTemplate, token_texts: dict[str, TokenTexts]
) -> None:
    tokenizer = smollm2.tokenizer
    encoder = ConversationEncoder(tokenizer)
    messages = [{"role": "user", "content": "Count."}]
    first = await encoder.extend(
        (), MarkedText(template.render(messages, add_generation_prompt=True)), encoding(tokenizer)
    )
    generated = tokenizer.encode("One, two, three").ids
    for content in ("One, two, th", "One, two", "", "One"):
        segment = answer_segment(token_texts["smollm2"], generated, content)
        assert content.startswith(segment.text)
        assert segment.token_ids == tuple(generated[: len(segment.token_ids)])
        assert tokenizer.decode(list(segment.token_ids)) == segment.text
        longer = tokenizer.decode(generated[: len(segment.token_ids) + 1])
        assert not content.startswith(longer)
        turns = [*messages, {"role": "assistant", "content": content}, {"role": "user", "content": "More."}]
        rendered = template.render(turns, add_generation_prompt=True)
        second = await encoder.extend((*first.segments, segment), MarkedText(rendered), encoding(tokenizer))
        assert len(second.kept) == 2
        assert tokenizer.decode(second.token_ids, skip_special_tokens=False) == rendered


def test_an_answer_that_is_cut_inside_a_character(smollm2: ModelTokenizer, token_texts: dict[str, TokenTexts]) -> None:
    ids = smollm2.tokenizer.encode("ok 𝄞").ids
    cut = ids[:-1]
    content = smollm2.tokenizer.decode(cut)
    assert content.endswith("\ufffd")
    assert answer_segment(token_texts["smollm2"], cut, content) == Segment(content, tuple(cut))
    assert answer_segment(token_texts["smollm2"], cut, "ok") == Segment("ok", tuple(ids[:1]))


async def test_a_template_that_rewrites_the_past_costs_only_what_it_rewrites(
    smollm2: ModelTokenizer, token_texts: dict[str, TokenTexts]
) -> None:
    tokenizer = smollm2.tokenizer
    encoder = ConversationEncoder(tokenizer)
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    source += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    trimming = ChatTemplate(source, {}, max_chars=10_000)
    messages = [{"role": "user", "content": "Hi"}]
    first = await encoder.extend(
        (), MarkedText(trimming.render(messages, add_generation_prompt=True)), encoding(tokenizer)
    )
    answer = [*tokenizer.encode(" Hello").ids, IM_END]
    history = (*first.segments, answer_segment(token_texts["smollm2"], answer, " Hello"))
    messages += [{"role": "assistant", "content": " Hello"}, {"role": "user", "content": "Bye"}]
    rendered = trimming.render(messages, add_generation_prompt=True)
    second = await encoder.extend(history, MarkedText(rendered), encoding(tokenizer))
    assert second.kept == first.segments
    assert tokenizer.decode(second.token_ids, skip_special_tokens=False) == rendered


async def test_a_tokenizer_that_puts_a_space_before_every_text(byte_fallback: Tokenizer) -> None:
    encoder = ConversationEncoder(byte_fallback)

    async def turn(kept: str, rest: str) -> list[int]:
        ids = byte_fallback.encode(kept, add_special_tokens=False).ids
        return (
            await encoder.extend((Segment(kept, tuple(ids)),), MarkedText(kept + rest), encoding(byte_fallback))
        ).token_ids

    # Beside a special token the parts are encoded as the whole is; between words the whole has to be encoded anew.
    for kept, rest in (
        ("<s>The comm", "</s>ittee met"),
        ("The</s>", "committee met"),
        ("The", " committee"),
        ("The", ""),
    ):
        assert await turn(kept, rest) == byte_fallback.encode(kept + rest, add_special_tokens=False).ids
