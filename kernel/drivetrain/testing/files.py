"""The kit's data and models: small, deterministic, and made where they are needed."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.options import require
from drivetrain.testing.kinds import CLASSES, SPECIAL, kit_rows, vocabulary_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

TRAIN_ROWS, DEV_ROWS, MAX_TOKENS = 40, 12, 32
CHAT = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }} [SEP] "
    "{% endgeneration %}{% else %}[CLS] {{ message.content }} {% endif %}{% endfor %}"
)
MODULE = '''"""Rows, a loss, metrics and a model, for plugins that take importable functions."""

import torch

from drivetrain.testing.files import DEV_ROWS, TRAIN_ROWS, TinyLanguageModel, TinyModule
from drivetrain.testing.kinds import kit_rows


def rows(split, kind="text"):
    """Return rows of a kind."""
    made = {"train": (TRAIN_ROWS, 0), "evaluate": (DEV_ROWS, 1000)}.get(split)
    return None if made is None else kit_rows(kind, *made)


def loss(outputs, batch):
    """Return the mean cross-entropy."""
    logits, labels = outputs["logits"], batch["labels"]
    if labels.shape == logits.shape:  # a number for each output
        return torch.nn.functional.cross_entropy(logits, labels)
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def metrics(predictions, labels):
    """Return the share of labels that are the largest logit."""
    counted = labels != -100
    best = predictions if predictions.shape == labels.shape else predictions.argmax(-1)
    return {"hits": ((best == labels) & counted).sum() / max(1, counted.sum())}


def build(dropout=0.1):
    """Return a small module."""
    return TinyModule(dropout)


def language(dropout=0.1):
    """Return a small language model."""
    return TinyLanguageModel(dropout)
'''


class TinyModule(torch.nn.Module):
    """A classifier of whatever the kit has: vectors, token ids or sentences; with dropout, and a buffer that moves.

    It takes batches with "x" (B, 8), "pixel_values" (B, C, H, W), "input_ids" (B, L) or "text" (B strings), and
    "labels" or "label" (B,).
    """

    def __init__(self, dropout: float = 0.1) -> None:
        """Draw the weights from the global generator."""
        super().__init__()
        self.embed = torch.nn.Embedding(64, 16)
        self.project = torch.nn.Linear(8, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.drop = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(16, CLASSES)
        self.rows: torch.Tensor
        self.register_buffer("rows", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(  # noqa: PLR0917 - batches may come as tuples
        self,
        x: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        label: torch.Tensor | None = None,
        text: Sequence[str] | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Return the logits (B, 3), and the mean loss where there are labels."""
        if pixel_values is not None:
            x = torch.nn.functional.adaptive_avg_pool1d(pixel_values.mean((1, 2))[:, None], 8)[:, 0]
        device, dtype = self.project.weight.device, self.project.weight.dtype
        if text is not None:
            ids = [[1 + zlib.crc32(word.encode()) % 63 for word in line.split()] for line in text]
            longest = max(map(len, ids))
            input_ids = torch.tensor([line + [0] * (longest - len(line)) for line in ids], device=device)
        if input_ids is not None:
            mask = (input_ids != 0) if attention_mask is None else attention_mask != 0
            x = (torch.nn.functional.one_hot(input_ids % 8, 8) * mask[..., None]).to(dtype).mean(1)
            x = x * (mask.shape[1] / mask.sum(1, keepdim=True))  # the same whatever the padding
        else:
            assert x is not None, "the batch has none of x, input_ids and text"
            input_ids = (x.abs() * 8).long() % 64
            mask = torch.ones_like(input_ids)
        weights = mask.to(dtype)[..., None]
        embedded = (self.embed(input_ids) * weights).sum(1) / weights.sum(1)
        hidden = self.drop(self.norm(self.project(x.to(dtype)) + embedded))
        logits = self.head(hidden)
        if self.training:
            self.rows += len(logits)
        target = label if labels is None else labels
        if target is None:
            return {"logits": logits}
        loss = torch.nn.functional.cross_entropy(logits, target)
        return {"loss": loss, "logits": logits}


class TinyLanguageModel(torch.nn.Module):
    """Scores of the next token for each token by itself: with any mask, packed or flattened, they are the same."""

    def __init__(self, dropout: float = 0.1) -> None:
        """Draw the weights from the global generator."""
        super().__init__()
        self.embed = torch.nn.Embedding(len(vocabulary_ids()), 16)
        self.norm = torch.nn.LayerNorm(16)
        self.drop = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(16, len(vocabulary_ids()))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        """Return the logits (B, L, V)."""
        return {"logits": self.head(self.drop(self.norm(self.embed(input_ids))))}


# --- files -------------------------------------------------------------------------------------------------------


def _write_tokenizer(folder: Path) -> None:
    """Save a word-level tokenizer with a chat template."""
    library = require("transformers", extra="hf", plugin="the kit's model")
    words = require("tokenizers", extra="hf", plugin="the kit's model")
    vocabulary = vocabulary_ids()
    made = words.Tokenizer(words.models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106
    made.pre_tokenizer = words.pre_tokenizers.Whitespace()
    ends = [(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")]
    made.post_processor = words.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    named = {f"{word[1:-1].lower()}_token": word for word in SPECIAL}
    tokenizer = library.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=MAX_TOKENS, **named)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)


def _writer(model: str, config: str, **sizes: Any) -> Callable[[Path], None]:
    """Return a function that saves a random small model of `transformers` and the tokenizer."""

    def write(folder: Path) -> None:
        library = require("transformers", extra="hf", plugin="the kit's model")
        _write_tokenizer(folder)
        made = getattr(library, config)(vocab_size=len(vocabulary_ids()), **sizes)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(3)
            getattr(library, model)(made).save_pretrained(folder)

    return write


def _splits(kind: str) -> dict[str, Any]:
    return {"train": kit_rows(kind, TRAIN_ROWS), "dev": kit_rows(kind, DEV_ROWS, start=1000)}


def _write_dataset(folder: Path) -> None:
    """Save the rows of a kind as a set of the `datasets` library."""
    library = require("datasets", extra="hf", plugin="the kit's dataset")
    splits = _splits(folder.name.removesuffix("-dataset"))
    made = {name: library.Dataset.from_list(rows) for name, rows in splits.items()}
    library.DatasetDict({"train": made["train"], "validation": made["dev"]}).save_to_disk(folder)


def _write_jsonl(path: Path) -> None:
    """Write a split of a kind, a JSON object a line."""
    kind, _, split = path.stem.rpartition("-")
    path.write_text("".join(json.dumps(row) + "\n" for row in _splits(kind)[split]), encoding="utf-8")


def _write_parquet(path: Path) -> None:
    """Write a split of a kind as Parquet, in two row groups."""
    arrow, parquet = (require(name, extra="hf", plugin="the kit's files") for name in ("pyarrow", "pyarrow.parquet"))
    kind, _, split = path.stem.rpartition("-")
    rows = _splits(kind)[split]
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=-(-len(rows) // 2))


def _write_text(path: Path) -> None:
    """Write the sentences of a split, one a line."""
    path.write_text("".join(row["text"] + "\n" for row in _splits("text")[path.stem]), encoding="utf-8")


_write_bert = _writer(
    "BertForSequenceClassification",
    "BertConfig",
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=MAX_TOKENS,
    num_labels=CLASSES,
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
    initializer_range=0.2,
)
_write_llama = _writer(
    "LlamaForCausalLM",
    "LlamaConfig",
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=4 * MAX_TOKENS,
    attention_dropout=0.1,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=2,
    eos_token_id=3,
)
_write_t5 = _writer(
    "T5ForConditionalGeneration",
    "T5Config",
    d_model=16,
    d_kv=8,
    d_ff=32,
    num_layers=2,
    num_heads=2,
    dropout_rate=0.1,
    decoder_start_token_id=0,
)
_write_xlnet = _writer(
    "XLNetLMHeadModel",
    "XLNetConfig",
    d_model=16,
    n_layer=2,
    n_head=2,
    d_inner=32,
    dropout=0.1,
    initializer_range=0.2,
)


def _write_vit(folder: Path) -> None:
    """Save a random small model for 8x8 pictures, and how they are prepared."""
    library = require("transformers", extra="hf", plugin="the kit's model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    made = library.ViTConfig(image_size=8, patch_size=4, num_labels=CLASSES, initializer_range=0.2, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        library.ViTForImageClassification(made).save_pretrained(folder)
    prepared = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared), encoding="utf-8")


def _write_weights(path: Path) -> None:
    """Write other weights for `TinyModule` as a safetensors file."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(9)
        weights = TinyModule().state_dict()
    header, content = {}, b""
    for name, tensor in weights.items():
        start, content = len(content), content + tensor.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, len(content)]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


WRITERS: dict[str, Callable[[Path], None]] = {
    "model": _write_bert, "causal": _write_llama, "seq2seq": _write_t5, "xlnet": _write_xlnet, "vit": _write_vit,
    "weights.safetensors": _write_weights,
}  # fmt: skip
ENDINGS = {"-dataset": _write_dataset, ".jsonl": _write_jsonl, ".parquet": _write_parquet, ".txt": _write_text}


def write_kit(folder: Path) -> Path:
    """Write the module into `folder` and return it; `ensure` adds the rest where it is named."""
    (folder / "kit_module.py").write_text(MODULE, encoding="utf-8")
    return folder


def ensure(folder: Path, name: str) -> Path:
    """Write a part of the kit, if it is not there yet: a model, or rows such as "text-train.jsonl", "text-dataset"."""
    path = folder / name
    if not path.exists():
        writer = WRITERS.get(name) or next(made for ending, made in ENDINGS.items() if name.endswith(ending))
        writer(path)
    return path


def fill(value: Any, folder: Path, rows: str = "text") -> Any:
    """Put the kit's folder in place of "{kit}" in every string of `value`, and write what is named there.

    "{rows}" stands for the kind of rows, as in "{kit}/{rows}-train.jsonl".
    """
    if isinstance(value, dict):
        return {key: fill(item, folder, rows) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(fill(item, folder, rows) for item in value)
    if not isinstance(value, str):
        return value
    filled = value.replace("{rows}", rows)
    if filled.startswith("{kit}/"):
        return str(ensure(folder, filled.removeprefix("{kit}/")))
    return filled.replace("{kit}", str(folder))
