"""Tiny models of several kinds, and what they say of single samples."""

from __future__ import annotations

import torch
import transformers
from plugin_helpers import cpu_run

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BOTH_WAYS = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 40}


def made(cls, config):
    """Return the model in float64, with weights large enough that attention matters."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return cls(config).double()


def llama(**changed):
    config = transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 1, "initializer_range": 0.2, **changed})
    return made(transformers.LlamaForCausalLM, config)


def gpt2(**changed):
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "bos_token_id": 1}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "eos_token_id": 1, "initializer_range": 0.2}
    return made(transformers.GPT2LMHeadModel, transformers.GPT2Config(**{**sizes, **drops, **changed}))


def bert(**changed):
    return made(
        transformers.BertForMaskedLM, transformers.BertConfig(**{**BOTH_WAYS, "initializer_range": 0.2, **changed})
    )


def roberta(**changed):
    config = {**BOTH_WAYS, "pad_token_id": 1, "initializer_range": 0.2, **changed}
    return made(transformers.RobertaForMaskedLM, transformers.RobertaConfig(**config))


CAUSAL = [llama, gpt2]


def samples(lengths=(4, 1, 7, 3), seed=0):
    """Return rows of tokens that are labels too."""
    draws = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, 40, (n,), generator=draws).tolist() for n in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def alone(model, ids):
    """Return the logits (L, V) of a sample in a row of its own."""
    return model(input_ids=torch.tensor([ids])).logits[0]


def trained_on(plugin, model, **fields):
    """Return the plugin's collator for a run of `model`, after the checks of assembly."""
    run = cpu_run(model=model, **fields)
    collate = plugin.build_collator(run)
    plugin.assembled(run)
    return collate
