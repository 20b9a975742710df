"""The kit's data and models: small, deterministic, and made where they are needed."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.options import require

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

TOPICS = (
    ("river", "stone", "cloud", "meadow", "frost", "pine", "valley", "thunder"),
    ("engine", "wheel", "piston", "gearbox", "torque", "brake", "axle", "clutch"),
    ("melody", "chord", "violin", "rhythm", "tempo", "octave", "quartet", "ballad"),
)
GLUE = ("the", "a", "of", "and", "near", "with", "old", "new")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TRAIN_ROWS, DEV_ROWS, MAX_TOKENS = 40, 12, 32
MODULE = '''"""Rows and a model, for plugins that take importable functions."""

from drivetrain.testing.files import DEV_ROWS, TRAIN_ROWS, TinyModule, text_rows


def rows(split):
    """Return labelled sentences."""
    return {"train": text_rows(TRAIN_ROWS), "evaluate": text_rows(DEV_ROWS, start=1000)}.get(split)


def build(dropout=0.1):
    """Return a small module."""
    return TinyModule(dropout)
'''


def text_rows(count: int, start: int = 0, words: int | None = None) -> list[dict[str, Any]]:
    """Return rows {"text", "label"} of three topics, 4 to 12 words long, or of exactly `words`."""
    rows = []
    for number in range(start, start + count):
        label = number * 5 % 3
        length = words or 4 + number * 7 % 9
        picks = [zlib.crc32(f"{number}/{position}".encode()) for position in range(length)]
        text = " ".join((TOPICS[label] if pick % 3 else GLUE)[pick // 7 % 8] for pick in picks)
        rows.append({"text": text, "label": label})
    return rows


def tensor_rows(count: int, start: int = 0) -> dict[str, torch.Tensor]:
    """Return columns "x" (N, 8) float32, three clusters, and "labels" (N,) int64."""
    draws = torch.Generator().manual_seed(100 + start)
    labels = torch.arange(start, start + count) * 5 % 3
    centres = torch.randn(3, 8, generator=draws)
    return {"x": centres[labels] + 0.5 * torch.randn(count, 8, generator=draws), "labels": labels}


def token_rows(count: int, start: int = 0, words: int | None = None) -> list[dict[str, Any]]:
    """Return rows {"input_ids", "labels"} as the kit's tokenizer makes them of `text_rows`; tensors if equally long."""
    vocabulary = vocabulary_ids()
    ends = vocabulary["[CLS]"], vocabulary["[SEP]"]
    rows = []
    for row in text_rows(count, start, words):
        ids = [ends[0], *(vocabulary[w] for w in row["text"].split()), ends[1]]
        rows.append({"input_ids": ids if words is None else torch.tensor(ids), "labels": row["label"]})
    return rows


def vocabulary_ids() -> dict[str, int]:
    """Return the kit's vocabulary."""
    return {word: index for index, word in enumerate([*SPECIAL, *GLUE, *(w for topic in TOPICS for w in topic)])}


class TinyModule(torch.nn.Module):
    """A classifier of whatever the kit has: vectors, token ids or sentences; with dropout, and a buffer that moves.

    It takes batches with "x" (B, 8), "input_ids" (B, L) or "text" (B strings), and "labels" or "label" (B,).
    """

    def __init__(self, dropout: float = 0.1) -> None:
        """Draw the weights from the global generator."""
        super().__init__()
        self.embed = torch.nn.Embedding(64, 16)
        self.project = torch.nn.Linear(8, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.drop = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(16, 3)
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
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Return the mean loss and the logits (B, 3)."""
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
        assert target is not None, "the batch has neither labels nor label"
        loss = torch.nn.functional.cross_entropy(logits, target)
        return {"loss": loss, "logits": logits}


# --- files -------------------------------------------------------------------------------------------------------


def _write_model(folder: Path) -> None:
    """Save a random BERT with three classes and a word-level tokenizer."""
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
    library.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=MAX_TOKENS, **named).save_pretrained(folder)
    config = library.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=MAX_TOKENS,
        num_labels=3,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        library.BertForSequenceClassification(config).save_pretrained(folder)


def _write_dataset(folder: Path) -> None:
    """Save the rows as a set of the `datasets` library."""
    library = require("datasets", extra="hf", plugin="the kit's dataset")
    splits = {"train": text_rows(TRAIN_ROWS), "validation": text_rows(DEV_ROWS, start=1000)}
    library.DatasetDict({name: library.Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(folder)


WRITERS: dict[str, Callable[[Path], None]] = {"model": _write_model, "dataset": _write_dataset}


def write_kit(folder: Path) -> Path:
    """Write the rows and the module into `folder` and return it; `ensure` adds what needs heavy libraries."""
    for name, rows in (("train", text_rows(TRAIN_ROWS)), ("dev", text_rows(DEV_ROWS, start=1000))):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "kit_module.py").write_text(MODULE, encoding="utf-8")
    return folder


def ensure(folder: Path, name: str) -> Path:
    """Write "model" or "dataset" in the kit's folder, if it is not there yet."""
    path = folder / name
    if not path.exists():
        WRITERS[name](path)
    return path


def fill(value: Any, folder: Path) -> Any:
    """Put the kit's folder in place of "{kit}" in every string of `value`, and write what is named there."""
    if isinstance(value, dict):
        return {key: fill(item, folder) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(fill(item, folder) for item in value)
    if not isinstance(value, str) or "{kit}" not in value:
        return value
    for name in WRITERS:
        if f"{{kit}}/{name}" in value:
            ensure(folder, name)
    return value.replace("{kit}", str(folder))
