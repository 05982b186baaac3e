"""Tokenizers from GGUF files and Hugging Face directories, against `transformers`' reading of the same files."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from transformers import GemmaTokenizerFast, GPT2TokenizerFast, LlamaTokenizerFast, Qwen2TokenizerFast

from scalellm.services.common.tokenizer_digest import tokenizer_sha256
from scalellm.services.tokenizer.text.detokenizer import TokenTexts
from scalellm.services.tokenizer.text.loading import load_model_tokenizer
from scalellm.services.tokenizer.text.model_tokenizer import ModelTokenizer, UnsupportedTokenizerError

SAMPLES = [
    "",
    "Hello world",
    "  leading,   inner and trailing  ",
    "I'll say: they've 12 345.6 items, don't THEY'RE?",
    "In 2023  14 people (№ ½ ٣٤) paid 1,000,000 €.\n\n\n   Then\r\nleft.\t\tEnd",
    "def f(x):\n        return x**2  # ok\n\n\n\n\n",
    "naïve Übergröße e\u0301a\u0308 ﬁ Å",
    "数据结构 日本語テキスト 한국어 مرحبا שלום नमस्ते",
    "😀👩‍👩‍👧‍👦🇩🇪 \u200b\u00a0\ufeff▁ <0x0A>",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><bos>x<eos> <unused12>\n\n<end_of_turn>",
    " " * 70 + "x" + "\n" * 40,
]


@pytest.fixture(scope="module")
def smollm2_oracle(model_dir: Callable[[str], Path]) -> Any:
    """`transformers` ignores this file's pre-tokenizer, `smollm`, and splits like GPT-2."""
    return GPT2TokenizerFast.from_pretrained(model_dir("smollm2-135m-instruct"), gguf_file="model.gguf")


@pytest.fixture(scope="module")
def smollm2_true(smollm2_oracle: Any) -> Tokenizer:
    """The oracle with the pre-tokenizer of SmolLM2's own tokenizer.json, which cuts out every digit first."""
    tokenizer = copy.deepcopy(smollm2_oracle.backend_tokenizer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def gemma3_oracle(model_dir: Callable[[str], Path]) -> Any:
    return GemmaTokenizerFast.from_pretrained(model_dir("gemma3-270m"), gguf_file="model.gguf")


MANY_EXAMPLES = settings(max_examples=200)
TEXTS = st.one_of(st.text(max_size=30), st.text(st.sampled_from("ab 12\n\t'é数😀▁<>|"), max_size=30))


@pytest.mark.slow  # transformers takes ten seconds to read this file; test_sentence_piece reads a small one of its kind
@MANY_EXAMPLES
@given(text=st.one_of(st.sampled_from(SAMPLES), TEXTS))
def test_gemma3_encodes_like_transformers(text: str, gemma3: ModelTokenizer, gemma3_oracle: Any) -> None:
    # Gemma's own tokenizer.json has "▁▁" and longer as added tokens, as here; `transformers` leaves these out.
    assume("▁▁" not in text)
    assert gemma3.tokenizer.encode(text).ids == gemma3_oracle(text)["input_ids"]


@MANY_EXAMPLES
@given(text=st.one_of(st.sampled_from(SAMPLES), TEXTS))
def test_smollm2_encodes_like_transformers_with_the_right_rule(
    text: str, smollm2: ModelTokenizer, smollm2_oracle: Any, smollm2_true: Tokenizer
) -> None:
    assert smollm2.tokenizer.encode(text).ids == smollm2_true.encode(text).ids
    if not any(char.isnumeric() for char in text):
        assert smollm2.tokenizer.encode(text).ids == smollm2_oracle(text)["input_ids"]


def test_the_smollm_rule_matters(smollm2: ModelTokenizer) -> None:
    assert smollm2.tokenizer.encode("x  12").tokens == ["x", "ĠĠ", "1", "2"]


def test_what_the_real_files_say(smollm2: ModelTokenizer, gemma3: ModelTokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert smollm2.eos_token_ids == (0, 2)  # <|endoftext|>, <|im_end|>
    assert smollm2.special_tokens["eos_token"] == "<|im_end|>"
    assert smollm2.special_token_ids == frozenset(range(17))
    assert smollm2.chat_template is not None
    assert smollm2.chat_template.startswith("{% for message in messages %}")
    assert gemma3.vocab_size == 262144
    assert gemma3.eos_token_ids == (1, 106)  # <eos>, <end_of_turn>
    assert gemma3.chat_template is None
    assert gemma3.tokenizer.encode("x").ids[0] == 2
    assert gemma3.tokenizer.encode("x", add_special_tokens=False).ids[0] != 2


def write_gguf(path: Path, family: str, tokens: list[str], types: list[int], **values: Any) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(family)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in values.items():
        if key == "pre":
            writer.add_tokenizer_pre(value)
        elif key == "merges":
            writer.add_token_merges(value)
        elif key == "scores":
            writer.add_token_scores(value)
        elif key == "template":
            writer.add_chat_template(value)
        elif isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        else:
            writer.add_uint32(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def parts(tokenizer: Tokenizer) -> tuple[list[str], list[int], list[str]]:
    """Return tokens by id, GGUF token types, and merges."""
    added = tokenizer.get_added_tokens_decoder()
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    types = [(3 if added[i].special else 4) if i in added else 1 for i in range(len(tokens))]
    return tokens, types, [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


@pytest.mark.parametrize("rule", ["gpt-2", "default", "llama-bpe", "tekken", "qwen2", None])
def test_byte_level_rules(rule: str | None, byte_level: Tokenizer, tmp_path: Path) -> None:
    tokens, types, merges = parts(byte_level)
    named = {} if rule is None else {"pre": rule}
    path = write_gguf(tmp_path / "model.gguf", "gpt2", tokens, types, merges=merges, eos_token_id=1, **named)
    tokenizer = load_model_tokenizer(path).tokenizer
    if rule == "qwen2":  # the GGUF reader of `transformers` leaves Qwen's normalisation to form C out
        vocab = {token: i for i, token in enumerate(tokens)}
        oracle: Any = Qwen2TokenizerFast(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in merges])
    else:
        oracle = GPT2TokenizerFast.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in SAMPLES:
        if "<|" in text:  # `transformers` adds special tokens of its own to these small vocabularies
            continue
        assert (
            tokenizer.encode(text, add_special_tokens=False).ids
            == oracle.backend_tokenizer.encode(text, add_special_tokens=False).ids
        ), text


def test_added_tokens(byte_level: Tokenizer, tmp_path: Path) -> None:
    tokens, types, merges = parts(byte_level)
    tokenizer = load_model_tokenizer(write_gguf(tmp_path / "a.gguf", "gpt2", tokens, types, merges=merges)).tokenizer
    ids = tokenizer.encode("<|end|>a<think> two words<｜sep▁a b｜>").ids
    assert ids == byte_level.encode("<|end|>a<think> two words<｜sep▁a b｜>").ids
    for skip in (False, True):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == byte_level.decode(ids, skip_special_tokens=skip)


def sentence_piece(tokenizer: Tokenizer, path: Path, **values: Any) -> Path:
    tokens, _, _ = parts(tokenizer)
    types = [2 if t == "<unk>" else 3 if t in ("<s>", "</s>") else 6 if t.startswith("<0x") else 1 for t in tokens]
    scores = [-float(i) if kind == 1 else 0.0 for i, kind in enumerate(types)]
    ids = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return write_gguf(path, "llama", tokens, types, scores=scores, **{**ids, **values})


def test_sentence_piece(byte_fallback: Tokenizer, tmp_path: Path) -> None:
    path = sentence_piece(byte_fallback, tmp_path / "model.gguf")
    tokenizer = load_model_tokenizer(path).tokenizer
    oracle = LlamaTokenizerFast.from_pretrained(tmp_path, gguf_file="model.gguf").backend_tokenizer
    for text in SAMPLES:
        # `transformers` puts no second space before a text that starts with one; the models' own files do.
        if text and not text.startswith(" ") and "▁" not in text:
            assert (
                tokenizer.encode(text, add_special_tokens=False).ids
                == oracle.encode(text, add_special_tokens=False).ids
            )
            assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("The <s>The").tokens == ["<s>", "▁The", "▁", "<s>", "▁The"]


def test_boundary_tokens(byte_fallback: Tokenizer, byte_level: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"

    def ends(path: Path) -> tuple[bool, bool]:
        ids = load_model_tokenizer(path).tokenizer.encode("The").ids
        return ids[0] == 1, ids[-1] == 2

    assert ends(sentence_piece(byte_fallback, path)) == (True, False)
    assert ends(sentence_piece(byte_fallback, path, add_bos_token=False)) == (False, False)
    assert ends(sentence_piece(byte_fallback, path, add_eos_token=True)) == (True, True)
    tokens, types, merges = parts(byte_level)
    for rule, expected in (("llama-bpe", True), ("qwen2", False)):
        write_gguf(path, "gpt2", tokens, types, merges=merges, pre=rule, bos_token_id=1)
        assert ends(path)[0] is expected


def test_unusable_files_are_refused_in_one_sentence(byte_level: Tokenizer, tmp_path: Path) -> None:
    tokens, types, merges = parts(byte_level)
    path = tmp_path / "model.gguf"

    def refused(match: str) -> None:
        with pytest.raises(UnsupportedTokenizerError, match=match):
            load_model_tokenizer(tmp_path)

    refused(r"neither a tokenizer\.json nor a \.gguf")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    refused(r"only the latter is supported")
    path.write_bytes(b"GGML")
    refused("does not start with 'GGUF'")
    write_gguf(path, "gpt2", tokens, types, merges=merges, pre="viking")
    refused("rule 'viking'; supported are .*default.*smollm")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("not a readable GGUF")
    write_gguf(path, "bert", tokens, types)
    refused("type 'bert'; supported are 'gpt2'")
    write_gguf(path, "gpt2", tokens, types)
    refused("no merges")
    write_gguf(path, "gpt2", tokens, types, merges=["q zzzzzz"])
    refused("merges that do not fit")
    write_gguf(path, "gpt2", tokens, types[:-1], merges=merges)
    refused("token types")
    write_gguf(path, "llama", tokens, types)
    refused("score per token")
    write_gguf(tmp_path / "second.gguf", "gpt2", tokens, types, merges=merges)
    refused("2 .gguf files")
    (tmp_path / "tokenizer.json").write_text("{}")
    refused("tokenizer.json")


def test_directory(byte_level: Tokenizer, unigram: Tokenizer, tmp_path: Path) -> None:
    for tokenizer in (byte_level, unigram):
        limited = Tokenizer.from_str(tokenizer.to_str())
        limited.enable_truncation(2)
        limited.enable_padding(length=50)
        limited.save(str(tmp_path / "tokenizer.json"))
        loaded = load_model_tokenizer(tmp_path)
        for text in SAMPLES:
            assert loaded.tokenizer.encode(text).ids == tokenizer.encode(text).ids
    end = unigram.token_to_id("</s>")
    assert loaded.eos_token_ids == (end,)
    assert loaded.chat_template is None

    def write(name: str, value: Any) -> ModelTokenizer:
        (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))
        return load_model_tokenizer(tmp_path)

    roles = {"eos_token": {"content": "</s>", "__type": "AddedToken"}, "unk_token": "<unk>", "bos_token": None}
    loaded = write("tokenizer_config.json", {**roles, "chat_template": "one"})
    assert loaded.eos_token_ids == (end,)
    assert loaded.special_tokens == {"eos_token": "</s>", "unk_token": "<unk>"}
    assert loaded.chat_template == "one"
    templates = [{"name": "default", "template": "two"}, {"name": "rag", "template": "three"}]
    loaded = write("tokenizer_config.json", {**roles, "chat_template": templates})
    assert loaded.chat_templates == {"default": "two", "rag": "three"}
    assert write("chat_template.json", {"chat_template": "four"}).chat_template == "four"
    assert write("chat_template.jinja", "five").chat_template == "five"
    assert write("config.json", {"text_config": {"eos_token_id": 7}}).eos_token_ids == (end, 7)
    assert write("generation_config.json", {"eos_token_id": [9, 8]}).eos_token_ids == (end, 7, 8, 9)
    with pytest.raises(UnsupportedTokenizerError, match=r"generation_config\.json"):
        write("generation_config.json", "{")


def test_digest_tells_tokenizers_apart(
    byte_level: Tokenizer, smollm2: ModelTokenizer, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    assert smollm2.sha256 == tokenizer_sha256(model_dir("smollm2-135m-instruct"))
    tokens, types, merges = parts(byte_level)

    def digest(**values: Any) -> bytes:
        path = write_gguf(tmp_path / "model.gguf", "gpt2", tokens, types, **{"merges": merges, **values})
        assert load_model_tokenizer(path).sha256 == tokenizer_sha256(path) == tokenizer_sha256(tmp_path)
        return tokenizer_sha256(path)

    first = digest(pre="gpt-2", eos_token_id=1)
    assert len(first) == 32
    assert digest(eos_token_id=1, pre="gpt-2", template="any") == first
    others = {digest(pre="qwen2", eos_token_id=1), digest(pre="gpt-2", eos_token_id=2), digest(pre="gpt-2")}
    others.add(digest(pre="gpt-2", eos_token_id=1, merges=merges[:-1]))
    assert len(others | {first}) == 5
    byte_level.save(str(tmp_path / "tokenizer.json"))
    assert load_model_tokenizer(tmp_path).sha256 == tokenizer_sha256(tmp_path) not in others | {first}


def test_a_file_with_which_no_text_can_be_encoded_is_refused(byte_level: Tokenizer, tmp_path: Path) -> None:
    """The library takes a template with a second text, and panics over each text that comes alone."""
    document = json.loads(byte_level.to_str())
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    document["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UnsupportedTokenizerError, match=r"tokenizer.json: the tokenizer cannot encode a text: "):
        load_model_tokenizer(tmp_path)


def test_a_refused_decoder_is_named_in_one_line(byte_level: Tokenizer, tmp_path: Path) -> None:
    document = json.loads(byte_level.to_str())
    strips = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * 400
    document["decoder"] = {"type": "Sequence", "decoders": strips}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UnsupportedTokenizerError, match="tokenizer decoder 'Strip' is not supported") as refused:
        TokenTexts(load_model_tokenizer(tmp_path).tokenizer)
    assert len(str(refused.value)) < 300
