"""The committed tile tables, what of them is compiled ahead of time, and the loader's refusals."""

import json
from dataclasses import replace

import pytest

from scalellm.kernels import Capability, gemm_wna16_workspace_size, num_decode_splits
from scalellm.kernels.splits import decode_programs, least_tiles
from scalellm.kernels.tiles import _ROOT, TILED_OPS, device_slug, read_table, tile_table, tuned_devices

A100, H200, B200 = Capability(80, 108), Capability(90, 132, "NVIDIA H200"), Capability(100, 148)
RULE = {"block_n": 64, "num_warps": 4, "num_stages": 3}
BOUNDED = {"when": {"head_dim": 64}, **RULE}


def write(root, name, rules, sm=90, op="paged_attention_decode"):
    folder = root / op
    folder.mkdir(exist_ok=True)
    content = rules if isinstance(rules, str) else json.dumps({"compute_capability": sm, "rules": rules})
    (folder / name).write_text(content)


def block_n(root, capability, head_dim=128):
    return read_table(root, "paged_attention_decode", capability).choose(element_size=2, head_dim=head_dim)["block_n"]


def test_the_device_chooses_the_table_and_the_call_the_rule(tmp_path):
    write(tmp_path, "sm_80.json", [{**BOUNDED, "block_n": 16}, RULE], sm=80)
    write(tmp_path, "sm_90.json", [{**RULE, "block_n": 32}])
    write(tmp_path, "nvidia-h200.json", [{**RULE, "block_n": 128}])
    assert block_n(tmp_path, A100) == block_n(tmp_path, Capability(89, 142)) == 64
    assert block_n(tmp_path, A100, head_dim=64) == 16
    assert block_n(tmp_path, A100, head_dim=65) == 64
    assert block_n(tmp_path, replace(H200, name="NVIDIA H100 80GB HBM3")) == block_n(tmp_path, B200) == 32
    assert block_n(tmp_path, H200) == 128
    assert block_n(tmp_path, Capability(0, 1)) == 64  # of a machine without such a device


def test_names_of_devices():
    assert device_slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert device_slug("nvidia-h200") == "nvidia-h200"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not an object"),
        ('{"rules": []}', "compute_capability: is missing"),
        ([], "rules: not a list of rules"),
        ([3], r"rules\[0\]: not an object"),
        ([{**RULE, "block_n": 48}], r"rules\[0\].block_n: 48 is not a power of two from 16 to 256"),
        ([{**RULE, "num_stages": 0}], r"rules\[0\].num_stages: 0 is not an integer from 1 to 8"),
        ([{**RULE, "num_warps": True}], r"rules\[0\].num_warps: True is not a power of two from 1 to 32"),
        ([{**RULE, "block_m": 64}], r"rules\[0\].block_m: there is no such key; keys are block_n, num_stages"),
        ([{"block_n": 64, "num_warps": 4}], r"rules\[0\].num_stages: is missing"),
        ([BOUNDED], r"rules\[0\].when: there is no such key"),
        ([RULE, RULE], r"rules\[0\].when: is missing"),
        ([{**BOUNDED, "when": {}}, RULE], r"rules\[0\].when: not an object with a bound"),
        ([{**BOUNDED, "when": {"rows": 1}}, RULE], r"rules\[0\].when.rows: .* may bound element_size, head_dim"),
        ([{**BOUNDED, "when": {"head_dim": 1.5}}, RULE], r"rules\[0\].when.head_dim: 1.5 is not an integer"),
    ],
)
def test_what_is_no_table_is_refused_by_file_and_key(tmp_path, rules, message):
    write(tmp_path, "sm_90.json", rules)
    with pytest.raises(ValueError, match=r"kernels/configs/paged_attention_decode/sm_90.json[:.] ?.*" + message):
        read_table(tmp_path, "paged_attention_decode", H200)


def test_a_table_is_for_one_compute_capability(tmp_path):
    write(tmp_path, "nvidia-h200.json", [RULE], sm=100)
    with pytest.raises(ValueError, match=r"nvidia-h200.json: compute_capability: 100, the device has 90"):
        read_table(tmp_path, "paged_attention_decode", H200)
    with pytest.raises(ValueError, match=r"paged_attention_decode: there is no table for '' and no default"):
        read_table(tmp_path, "paged_attention_decode", A100)


def test_devices_with_tables_of_their_own(tmp_path):
    for op in TILED_OPS:
        write(tmp_path, "sm_90.json", [RULE], op=op)
    write(tmp_path, "nvidia-h200.json", [RULE], op=TILED_OPS[0])
    write(tmp_path, "nvidia-h100-pcie.json", [RULE], op=TILED_OPS[1])
    write(tmp_path, "nvidia-b200.json", [RULE], sm=100, op=TILED_OPS[1])
    assert tuned_devices(90, tmp_path) == ["nvidia-h100-pcie", "nvidia-h200"]
    assert tuned_devices(80, tmp_path) == []


def committed():
    for op in TILED_OPS:
        for file in sorted((_ROOT / op).iterdir(), key=lambda file: file.name):
            yield pytest.param(op, file, id=f"{op}-{file.name}")


@pytest.mark.parametrize(("op", "file"), list(committed()))
def test_every_committed_rule_is_compiled_ahead_of_time(op, file):
    pytest.importorskip("triton")
    from scalellm.kernels.aot.recorder import NUM_SMS, recorded
    from scalellm.kernels.spec import SERVED

    sm = json.loads(file.read_text())["compute_capability"]
    assert sm in NUM_SMS, "the gate compiles for other devices"
    capability = Capability(sm, NUM_SMS[sm], file.name.removesuffix(".json"))
    table = tile_table(op, capability)
    if op == "num_decode_splits":  # is asked for by the cases of decode, without a launch
        assert len(table.rules) == 1
        return
    cases = [case for case in SERVED if case.op == op and case.min_sm <= sm]
    chosen = [tile for case in cases for tile in recorded(case, capability).tiles]
    for i, (_, tile) in enumerate(table.rules):
        assert any(tile is other for other in chosen), f"rules[{i}] is chosen by no case"


def test_the_folders_are_those_of_ops():
    assert sorted(entry.name for entry in _ROOT.iterdir()) == sorted(TILED_OPS)


def test_splits_follow_the_device_and_the_shapes():
    assert [num_decode_splits(H200, kv_heads) for kv_heads in (1, 8, 16, 32, 1000)] == [64, 64, 64, 32, 1]
    assert [least_tiles(H200, block_n) for block_n in (32, 64, 128, 256)] == [4, 2, 1, 1]
    # A program for each share of one long sequence, and in a large batch four for each sequence.
    assert [decode_programs(H200, batch, 64) for batch in (0, 1, 8, 64, 256)] == [0, 64, 64, 256, 1024]
    assert decode_programs(H200, 64, 1) == 64


def test_scratch_of_packed_products():
    assert gemm_wna16_workspace_size(H200, 4, 64, 4096, 6144, 128) == 5 * 64 * 6144
    assert gemm_wna16_workspace_size(H200, 4, 512, 4096, 6144, 128) == 5 * 64 * 6144  # more rows go another way
    assert gemm_wna16_workspace_size(H200, 8, 64, 4096, 57344, 128) == 0
