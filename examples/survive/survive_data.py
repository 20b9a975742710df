"""What the run trains, and on what: a small causal model of bytes, and the standard library's sources.

Everything that is drawn at random must come out the same after a kill: the weights at the start, dropout, which layers
a step skips, the order of the windows, and the place at which each is cut.
"""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

CONTEXT, WIDTH, LAYERS, EVALUATED = 64, 128, 2, 64


class ByteModel(nn.Module):
    """A transformer that predicts the next byte, with stochastic depth (Huang et al. 2016)."""

    def __init__(self, dropout: float, skip: float) -> None:
        super().__init__()
        self.skip = skip
        self.bytes, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = {"nhead": 4, "dim_feedforward": 4 * WIDTH, "dropout": dropout, "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, **layer) for _ in range(LAYERS))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the mean loss over bytes, in nats, for ids and labels (B, T)."""
        hidden = self.bytes(ids) + self.positions.weight
        for layer in self.layers:
            if not self.training or random.random() >= self.skip:  # noqa: S311 - Python's own generator, on purpose
                hidden = layer(hidden, src_mask=self.mask, is_causal=True)
        return {"loss": nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())}


def build(seed: int, dropout: float, skip: float) -> ByteModel:
    """Return the model. Python's and NumPy's global generators are saved and restored by the run, but not seeded."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global one
    return ByteModel(dropout, skip)


class Windows(torch.utils.data.Dataset):
    """Windows of a text, each moved by a few bytes every time it is read."""

    def __init__(self, text: bytes, windows: int | None = None) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.windows = windows or len(self.text) // CONTEXT - 1

    def __len__(self) -> int:
        """Return the number of windows."""
        return self.windows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return window `index`; the labels are the next bytes."""
        start = index * CONTEXT + int(torch.randint(CONTEXT, ()))
        window = self.text[start : start + CONTEXT + 1]
        return {"ids": window[:-1], "labels": window[1:]}


def rows(split: str) -> Windows | None:
    """Return the windows of `split`: some files are kept aside."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-m]*.py"))
    if split == "train":
        return Windows(b"".join(file.read_bytes() for file in files[10:]))
    return Windows(b"".join(file.read_bytes() for file in files[:10]), EVALUATED) if split == "evaluate" else None
