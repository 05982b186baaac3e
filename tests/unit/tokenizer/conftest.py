"""Tokenizers the tests share: the two real ones, and two trained here in the shapes that other models use."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from scalellm.services.tokenizer.text.detokenizer import TokenTexts
from scalellm.services.tokenizer.text.loading import load_model_tokenizer
from scalellm.services.tokenizer.text.model_tokenizer import ModelTokenizer

CORPUS = [
    "The committee met on Tuesday, 14 March 2023, to discuss naïve proposals: (a) build; (b) wait.",
    "def step(self, x):\n\tif x > 10:\n\t\treturn x ** 2  # comment\n",
    "Über den Wolken muss die Freiheit wohl grenzenlos sein. L'été, c'est l'été!",
    "数据结构与算法 日本語のテキスト 한국어 문장",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया",
    "😀😃 👩‍👩‍👧‍👦 🇩🇪 e\u0301 a\u0308\u0323",
] * 20


@pytest.fixture(scope="session")
def smollm2(model_dir: Callable[[str], Path]) -> ModelTokenizer:
    return load_model_tokenizer(model_dir("smollm2-135m-instruct"))


@pytest.fixture(scope="session")
def gemma3(model_dir: Callable[[str], Path]) -> ModelTokenizer:
    return load_model_tokenizer(model_dir("gemma3-270m"))


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """Byte-level BPE, trained; the added tokens hold characters outside the byte alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|end|>", "<｜sep▁a b｜>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("two words", special=False)])
    return tokenizer


@pytest.fixture(scope="session")
def byte_fallback() -> Tokenizer:
    """Llama 2's shape: BPE with byte fallback, a space before the text, which the decoder takes off again."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"])
    trained.train_from_iterator(CORPUS[:3] * 20, trainer)
    vocab = trained.get_vocab()
    vocab |= {token: len(vocab) + i for i, token in enumerate(bytes_)}
    model = models.BPE(vocab=vocab, merges=_merges(trained), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.fixture(scope="session")
def unigram() -> Tokenizer:
    """Unigram with Metaspace, as T5 and XLM-R have it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, show_progress=False, special_tokens=["<unk>", "</s>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers(
    smollm2: ModelTokenizer, gemma3: ModelTokenizer, byte_level: Tokenizer, byte_fallback: Tokenizer, unigram: Tokenizer
) -> dict[str, Tokenizer]:
    return {
        "smollm2": smollm2.tokenizer,
        "gemma3": gemma3.tokenizer,
        "byte_level": byte_level,
        "byte_fallback": byte_fallback,
        "unigram": unigram,
    }


@pytest.fixture(scope="session")
def token_texts(tokenizers: dict[str, Tokenizer]) -> dict[str, TokenTexts]:
    return {name: TokenTexts(tokenizer) for name, tokenizer in tokenizers.items()}


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
