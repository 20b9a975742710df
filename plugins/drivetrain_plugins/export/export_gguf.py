"""A GGUF file, which llama.cpp and what is built on it run."""

from __future__ import annotations

import json
import tempfile
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from drivetrain import ConfigError, Problem, __version__, option, plugin, require
from drivetrain_plugins.export._exporting import AtEnd
from drivetrain_plugins.export._paths import replace_whole
from drivetrain_plugins.shared.exports import bare, export_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np

    from drivetrain import Run

# By transformers' name of the architecture: GGUF's name, and whether its attention turns pairs of neighbours.
ARCHITECTURES = {"llama": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}
TYPES = ("f32", "f16", "bf16", "q8_0")


@plugin(
    role="export",
    effect="observes",
    rows="sequences",
    companions={"hf-model": {"path": "{kit}/causal", "task": "causal-lm"}, "causal-lm": {}, "causal-lm-loss": {}},
    example={"at_end": False, "tokenizer": False},
)
class ExportGGUF(AtEnd):
    """Export a decoder (Llama, Qwen2, Qwen3) with its tokenizer as one GGUF file, for llama.cpp.

    Names, metadata and quantization are those of the library `gguf`. Matrices get the type asked for, vectors stay
    float32. A tokenizer must be a byte-level BPE, as these models have.
    """

    plugin: ClassVar[str] = "export-gguf"
    format: ClassVar[str] = "gguf"
    suffix: ClassVar[str] = ".gguf"
    default: ClassVar[str] = "model.gguf"
    to: str | None = option(None, help="file; default: model.gguf in the run's folder")
    at_end: bool = option(True, help="write when the run has ended; else only when asked to")
    dtype: str = option("f16", choices=TYPES, help="type of the matrices; q8_0 is quantized in blocks of 32 to 8 bits")
    tokenizer: bool = option(True, help="write the tokenizer, too; without it a program must bring its own")
    pre: str = option("default", help='how llama.cpp is to split text before BPE: "smollm", "qwen2", "llama-bpe", ...')

    def refuse(self, run: Run) -> None:
        """Refuse a model or a tokenizer that the format cannot hold."""
        require("gguf", plugin=self.plugin, extra="gguf")
        config = getattr(bare(run.model), "config", None)
        kind = getattr(config, "model_type", None)
        if kind not in ARCHITECTURES:
            do = f"it writes {', '.join(ARCHITECTURES)}; export another model by export-hf and convert that"
            received = f"{type(run.model).__name__}, model_type {kind!r}"
            raise ConfigError([Problem(f"{self.plugin} cannot write this model", received, do)])
        scaling = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if scaling != "default":
            what = f"{self.plugin} writes plain rotary positions only"
            raise ConfigError([Problem(what, f"rope_type {scaling!r}", "use export-hf and llama.cpp's own converter")])
        if self.tokenizer and _merges(run.processor) is None:
            do = "set export-gguf.tokenizer = false, and give the program that loads the file a tokenizer"
            received = type(run.processor).__name__
            raise ConfigError([Problem(f"{self.plugin} writes byte-level BPE tokenizers only", received, do)])

    def rehearse(self, run: Run) -> None:
        """Refuse weights that the format has no name for, and tokens that the model does not have."""
        if not self.at_end:
            return
        library: Any = require("gguf", plugin=self.plugin, extra="gguf")
        model: Any = export_model(run)
        names = self._names(library, model.config)
        for key in model.state_dict():
            _named(names, key)
        size = model.config.vocab_size
        if self.tokenizer and (largest := max(run.processor.get_vocab().values())) >= size:
            what = f"{self.plugin}: the tokenizer has more tokens than the model"
            do = "resize the model's embeddings to the tokenizer, or set export-gguf.tokenizer = false"
            raise ConfigError([Problem(what, f"token {largest} of {size}", do)])

    @staticmethod
    def _names(library: Any, config: Any) -> Any:
        arch = getattr(library.MODEL_ARCH, ARCHITECTURES[config.model_type][0].upper())
        return library.get_tensor_name_map(arch, config.num_hidden_layers)

    def write(self, run: Run, path: Path) -> None:
        """Save weights, configuration and tokenizer to the file `path`."""
        replace_whole(path, lambda file: self._write(run, file))

    def _write(self, run: Run, file: Path) -> None:
        library: Any = require("gguf", plugin=self.plugin, extra="gguf")
        model: Any = export_model(run)
        config = model.config
        name, turned = ARCHITECTURES[config.model_type]
        writer = library.GGUFWriter(file, name)
        _describe(writer, config, run)
        if self.tokenizer:
            self._add_tokenizer(library, writer, run.processor, config.vocab_size)
        names = self._names(library, config)
        for key, array in _tensors(model, config, turned=turned):
            self._add(library, writer, _named(names, key), array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _add(self, library: Any, writer: Any, name: str, array: np.ndarray[Any, Any]) -> None:
        kind = getattr(library.GGMLQuantizationType, self.dtype.upper() if array.ndim > 1 else "F32")
        if kind.name == "Q8_0" and array.shape[-1] % 32:  # a row must fill its blocks
            kind = library.GGMLQuantizationType.F16
        writer.add_tensor(name, library.quants.quantize(array, kind), raw_dtype=kind)

    def _add_tokenizer(self, library: Any, writer: Any, processor: Any, size: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            processor.save_pretrained(folder)
            special = library.SpecialVocab(folder, load_merges=True, n_vocab=size)
        words, added, types = processor.get_vocab(), processor.added_tokens_decoder, library.TokenType
        tokens, kinds = [f"[PAD{number}]" for number in range(size)], [types.UNUSED] * size
        for word, number in words.items():
            control = number in added and added[number].special
            tokens[number] = word
            kinds[number] = types.CONTROL if control else types.USER_DEFINED if number in added else types.NORMAL
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        special.add_to_gguf(writer, quiet=True)


def _named(names: Any, key: str) -> str:
    """Return GGUF's name of a weight."""
    found = names.get_name(key, try_suffixes=(".weight", ".bias"))
    if found is None:
        do = "add merge-lora where the model has adapters; else use export-hf"
        raise ConfigError([Problem("export-gguf: GGUF has no name for the weight", key, do)])
    return str(found)


def _merges(processor: Any) -> list[Any] | None:
    """Return the merges of a byte-level BPE tokenizer, or None for another."""
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is None:
        return None
    content = json.loads(backend.to_str())
    bytewise = "ByteLevel" in json.dumps(content.get("pre_tokenizer") or {})
    return content["model"].get("merges") if content["model"]["type"] == "BPE" and bytewise else None


def _describe(writer: Any, config: Any, run: Run) -> None:
    """Write the configuration."""
    writer.add_type("model")
    writer.add_name(getattr(config, "model_type", "model"))
    writer.add_description(f"trained by drivetrain {__version__}, {run.progress.step} steps")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(2)


def _tensors(model: Any, config: Any, *, turned: bool) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield each weight once, as float32; a head that is tied to the embedding is left out, as the format does."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tied = getattr(config, "tie_word_embeddings", False)
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        value = tensor.detach().to("cpu", torch.float32)
        projection = next((n for part, n in heads.items() if f".{part}." in name), None)
        if turned and projection is not None:
            value = _interleaved(value, projection)
        yield name, value.contiguous().numpy()


def _interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows of each head from halves (as transformers turns them) to pairs (as llama.cpp does)."""
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)
