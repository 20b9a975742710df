"""export-gguf: transformers reads the file back, and computes what the run's model does."""

from __future__ import annotations

import gguf
import pytest
import tokenizers
import torch
import transformers

from drivetrain import ConfigError, Trainer
from drivetrain_plugins import AdamW, CausalLM, ExportGGUF, Loader, LoRA

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
TEXTS = ["the cat sat on the mat", "a dog ran over the hill", "Zürich, 3 o'clock"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(TEXTS, vocab_size=290, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def trained(kind, tokenizer, folder, **options):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, tie_word_embeddings=options.pop("tied", False))
    model = transformers.AutoModelForCausalLM.from_config(config)
    exporter = ExportGGUF(**options)
    plugins = [AdamW(lr=1e-2), CausalLM(tokenizer=tokenizer), Loader(batch_size=4), WithTokenizer(tokenizer), exporter]
    trainer = Trainer(model, plugins, output=folder)
    trainer.fit([{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS], steps=2)
    return trainer


class WithTokenizer:
    """Gives the run its tokenizer, as hf-model does."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    from drivetrain import hookimpl

    @hookimpl
    def transforms(self, run):
        run.processor = self.tokenizer
        return []


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("llama", True), ("qwen2", False), ("qwen3", True)])
def test_read_back(kind, tied, tokenizer, tmp_path):
    """What transformers makes of the file gives the same logits, to the rounding of float32."""
    trainer = trained(kind, tokenizer, tmp_path, dtype="f32", tied=tied)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    wanted = logits(trainer.run.model, ids)
    assert again.config.tie_word_embeddings == tied or not tied
    torch.testing.assert_close(logits(again, ids), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "limit"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 3e-2)])
def test_types(dtype, limit, tokenizer, tmp_path):
    """A smaller type moves the logits by its rounding and no more."""
    trainer = trained("llama", tokenizer, tmp_path, dtype=dtype)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.tensor([tokenizer(TEXTS[1])["input_ids"]])
    wanted = logits(trainer.run.model, ids)
    off = (logits(again, ids) - wanted).abs().max() / wanted.abs().max()
    assert 0 < off < limit
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds == {dtype.upper(), "F32"}


def test_the_tokenizer(tokenizer, tmp_path):
    """The tokens, their kinds, the merges and the special ids are the tokenizer's."""
    trained("llama", tokenizer, tmp_path)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    vocabulary = tokenizer.get_vocab()
    assert [tokens[number] for number in vocabulary.values()] == list(vocabulary)
    assert len(tokens) == SIZES["vocab_size"]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert len(fields["tokenizer.ggml.merges"].contents()) > 10
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in TEXTS[:3]:
        assert (
            again(text, add_special_tokens=False)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
        )


def test_other_models_are_refused(tokenizer, tmp_path):
    """A model that the format's writer does not know is refused before step 0, with those it knows."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2))
    plugins = [AdamW(), CausalLM(tokenizer=tokenizer), ExportGGUF()]
    with pytest.raises(ConfigError, match=r"export-gguf cannot write this model(.|\n)*gpt2(.|\n)*llama, qwen2, qwen3"):
        Trainer(model, plugins, output=tmp_path).fit([{"input_ids": [1, 2, 3]}] * 4, steps=1)


def test_other_tokenizers_are_refused(tokenizer, tmp_path):
    """Where there is no byte-level BPE tokenizer, the option to leave it out is named."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **SIZES))
    plugins = [AdamW(), CausalLM(tokenizer=tokenizer), ExportGGUF()]
    with pytest.raises(ConfigError, match=r"export-gguf\.tokenizer = false"):
        Trainer(model, plugins, output=tmp_path).fit([{"input_ids": [1, 2, 3]}] * 4, steps=1)


@pytest.mark.parametrize(
    ("extra", "size", "message"), [(LoRA, 300, "no name for the weight"), (None, 200, "more tokens")]
)
def test_what_cannot_be_named_is_told_before_training(extra, size, message, tokenizer, tmp_path):
    """Adapters that nobody merges, and tokens that the model lacks, are refused before step 0."""
    config = transformers.AutoConfig.for_model("llama", **{**SIZES, "vocab_size": size})
    model = transformers.AutoModelForCausalLM.from_config(config)
    plugins = [AdamW(), CausalLM(tokenizer=tokenizer), WithTokenizer(tokenizer), ExportGGUF()]
    trainer = Trainer(model, [*plugins, *([extra(rank=2)] if extra else [])], output=tmp_path)
    with pytest.raises(ConfigError, match=message):
        trainer.fit([{"input_ids": [1, 2, 3]}] * 4, steps=1)
    assert trainer.run.progress.step == 0
