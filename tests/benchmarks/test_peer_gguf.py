"""benchmarks/peer/to_gguf.py: the GGUF file holds the folder's weights, its queries and keys in GGUF's rotary order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peer.to_gguf import write_gguf

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 6,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES = {
    "model.embed_tokens": (6, 8),
    "model.norm": (8,),
    "model.layers.0.input_layernorm": (8,),
    "model.layers.0.post_attention_layernorm": (8,),
    "model.layers.0.self_attn.q_proj": (8, 8),
    "model.layers.0.self_attn.k_proj": (4, 8),
    "model.layers.0.self_attn.v_proj": (4, 8),
    "model.layers.0.self_attn.o_proj": (8, 8),
    "model.layers.0.mlp.gate_proj": (12, 8),
    "model.layers.0.mlp.up_proj": (12, 8),
    "model.layers.0.mlp.down_proj": (8, 12),
}


def write_folder(folder: Path, dtype: type[np.floating[Any]] = np.float32, **changes: Any) -> dict[str, np.ndarray]:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    weights = {f"{name}.weight": rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    tokenizer = {
        "model": {"type": "BPE", "vocab": {"a": 3, "b": 4, "ab": 5}, "merges": [["a", "b"]]},
        "added_tokens": [{"id": 1, "content": "<s>", "special": True}, {"id": 2, "content": "</s>", "special": True}],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return weights


def test_weights_survive_and_rotary_pairs_become_neighbours(tmp_path: Path) -> None:
    from gguf import GGUFReader

    weights = write_folder(tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf")
    reader = GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == len(SHAPES)
    np.testing.assert_array_equal(tensors["token_embd.weight"], weights["model.embed_tokens.weight"])
    np.testing.assert_array_equal(tensors["blk.0.ffn_down.weight"], weights["model.layers.0.mlp.down_proj.weight"])
    # Head size 4: dimensions (0, 2) and (1, 3) turn together in the folder, (0, 1) and (2, 3) in the file.
    order = [0, 2, 1, 3]
    np.testing.assert_array_equal(tensors["blk.0.attn_k.weight"], weights["model.layers.0.self_attn.k_proj.weight"][order])
    both = order + [4 + row for row in order]
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight"], weights["model.layers.0.self_attn.q_proj.weight"][both])
    assert reader.fields["llama.rope.freq_base"].contents() == 5000.0
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["[unused 0]", "<s>", "</s>", "a", "b", "ab"]
    assert reader.fields["tokenizer.ggml.token_type"].contents() == [5, 3, 3, 1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3"}, "qwen3"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope scaling"),
        ({"dtype": np.float16}, "float16"),
    ],
)
def test_what_would_come_out_wrong_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_folder(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        write_gguf(tmp_path, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
