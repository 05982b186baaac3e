"""Tokenizers the tests share: the two real ones, and two trained here in the shapes that other models use."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from on_demand import OnDemand
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
def model_tokenizers(model_dir: Callable[[str], Path]) -> dict[str, ModelTokenizer]:
    """The real ones. Reading Gemma's takes five seconds of CPU time, so each is read by who asks for it."""
    names = {"smollm2": "smollm2-135m-instruct", "gemma3": "gemma3-270m"}
    return OnDemand(lambda name: load_model_tokenizer(model_dir(names[name])))


@pytest.fixture(scope="session")
def smollm2(model_tokenizers: dict[str, ModelTokenizer]) -> ModelTokenizer:
    return model_tokenizers["smollm2"]


@pytest.fixture(scope="session")
def gemma3(model_tokenizers: dict[str, ModelTokenizer]) -> ModelTokenizer:
    return model_tokenizers["gemma3"]


@pytest.fixture(scope="session")
def tokenizers(model_tokenizers: dict[str, ModelTokenizer]) -> dict[str, Tokenizer]:
    trained = {"byte_level": train_byte_level, "byte_fallback": train_byte_fallback, "unigram": train_unigram}
    return OnDemand(lambda name: trained[name]() if name in trained else model_tokenizers[name].tokenizer)


@pytest.fixture(scope="session")
def byte_level(tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers["byte_level"]


@pytest.fixture(scope="session")
def byte_fallback(tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers["byte_fallback"]


@pytest.fixture(scope="session")
def unigram(tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers["unigram"]


@pytest.fixture(scope="session")
def token_texts(tokenizers: dict[str, Tokenizer]) -> dict[str, TokenTexts]:
    return OnDemand(lambda name: TokenTexts(tokenizers[name]))


def train_byte_level() -> Tokenizer:
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


def train_byte_fallback() -> Tokenizer:
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


def train_unigram() -> Tokenizer:
    """Unigram with Metaspace, as T5 and XLM-R have it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, show_progress=False, special_tokens=["<unk>", "</s>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
