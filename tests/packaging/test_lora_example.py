"""examples/lora: its questions are kept apart, and its model folder holds what the GGUF file holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def test_questions_are_kept_apart(load: Callable[[str], Any]):
    """No question is in both splits; a limit takes the first; each answer is a package."""
    data = load("lora/questions_data.py")
    parts = {split: data.rows(split) for split in ("train", "evaluate")}
    asked = {split: {row["prompt"] for row in rows} for split, rows in parts.items()}
    assert not asked["train"] & asked["evaluate"]
    assert [len(asked[split]) for split in parts] == [len(rows) for rows in parts.values()]
    assert 300 <= len(parts["evaluate"]) < 0.2 * len(parts["train"])
    assert {row["completion"] for rows in parts.values() for row in rows} == set(data.packages())
    assert data.rows("train", limit=5) == parts["train"][:5]
    assert data.rows("evaluate/other") is None


def test_weights_get_their_names_and_order_back(load: Callable[[str], Any]):
    """Every tensor gets the name transformers has; queries and keys, which GGUF has permuted, are put back in order."""
    gguf = pytest.importorskip("gguf")
    from transformers import LlamaConfig, LlamaForCausalLM

    make = load("lora/make_model.py")
    sizes = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    wanted = {n: t.bfloat16() for n, t in LlamaForCausalLM(config).state_dict().items() if n != "lm_head.weight"}
    ours = {theirs: gguf_name for gguf_name, theirs in make.NAMES.items()}

    def stored(name: str, tensor: torch.Tensor) -> Any:
        values = tensor.float().numpy()
        if ".q_proj." in name or ".k_proj." in name:  # as llama.cpp's convert_hf_to_gguf.py stores them
            heads = 4 if ".q_proj." in name else 2
            shape = (heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = values.reshape(shape).swapaxes(1, 2).reshape(values.shape)
        if name not in ours:
            _, _, layer, *part, end = name.split(".")
            name = f"blk.{layer}.{ours['.'.join(part)]}.{end}"
        else:
            name = ours[name]
        return SimpleNamespace(name=name, data=np.array(values), tensor_type=gguf.GGMLQuantizationType.F32)

    reader = SimpleNamespace(tensors=[stored(name, tensor) for name, tensor in wanted.items()])
    made = make.weights(reader, {"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2})
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
