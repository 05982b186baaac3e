"""`python -m bench.peers.servers.onnx_export HF_FOLDER FORM FOLDER`: a model as ONNX Runtime GenAI reads it.

Runs in the environment of that peer, whose own model builder does the work.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
from onnx import helper

# Precision, and what else the builder is told, by form. Four bits lose less with zero points than without; the output
# projection, and the embedding that is one with it, have 8 bits as they have in the GGUF file.
_FORMS = {
    "float32": ("fp32",),
    "int8": ("int8",),
    "int4": ("int4", "is_symmetric=false", "algo_config=rtn_last"),
}
_PRUNE = "/lm_head/prune/Gather"


def export(source: Path, form: str, folder: Path) -> None:
    """Write the folder from one of float32 safetensors. Logits are of each sequence's last token only."""
    precision, *options = _FORMS[form]
    with tempfile.TemporaryDirectory() as cache:
        command = [
            *(sys.executable, "-m", "onnxruntime_genai.models.builder", "--model_name", source.name),
            *("--input", str(source), "--output", str(folder), "--precision", precision),
            *("--execution_provider", "cpu", "--cache_dir", cache, "--extra_options", "prune_lm_head=true", *options),
        ]
        subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True)
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    select_last_tokens(model)
    onnx.save(model, path)


def select_last_tokens(model: onnx.ModelProto) -> None:
    """Select each sequence's own last token for the output projection, where the builder selects the last column.

    In a batch of unequal prompts, which are filled up on the right, the last column is the last token of the longest
    alone. Logits of all tokens instead, the builder's default, are a fifth of a prompt's work and 200 KB a token.
    """
    nodes = model.graph.node
    place, pruned = next((place, node) for place, node in enumerate(nodes) if node.name == _PRUNE)
    hidden, name = pruned.input[0], f"{_PRUNE}/own"
    one, lengths, columns, count, last = (f"{name}/{what}" for what in ("one", "lengths", "columns", "count", "last"))
    model.graph.initializer.append(helper.make_tensor(one, onnx.TensorProto.INT64, [1], [1]))
    own = [
        helper.make_node("ReduceSum", ["attention_mask", one], [lengths], keepdims=1),
        helper.make_node("Shape", [hidden], [columns], start=1, end=2),
        # The mask covers what was computed before, too: of a step that takes one token each, that one.
        helper.make_node("Min", [lengths, columns], [count]),
        helper.make_node("Sub", [count, one], [last]),
        helper.make_node("GatherND", [hidden, last], list(pruned.output), batch_dims=1),
    ]
    nodes.remove(pruned)
    for offset, node in enumerate(own):
        node.name = f"{name}/{node.op_type}"
        nodes.insert(place + offset, node)


if __name__ == "__main__":
    export(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
