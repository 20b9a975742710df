"""Train a small GPT from scratch, byte by byte, on the standard library's own sources.

    python examples/tiny_gpt/train.py               # some minutes on two cores
    python examples/tiny_gpt/train.py --steps 20    # a look

The model is plain PyTorch. What a training loop adds around it is the list of plugins in `main`.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from drivetrain import Trainer
from drivetrain_plugins import AdamW, Clip, Evaluate, ExportSafetensors, JsonlLog, Linear, Loader, Progress

VOCABULARY, CONTEXT, WIDTH, HEADS, LAYERS = 256, 128, 128, 4, 3  # bytes


class Block(nn.Module):
    """Attention, then a feed-forward layer, each on a normed residual stream (B, T, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream with this block's part added."""
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A causal byte model; output and input embeddings are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks, self.norm = nn.Sequential(*[Block() for _ in range(LAYERS)]), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for weight in (self.tokens.weight, self.positions.weight):
            nn.init.normal_(weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the mean loss over bytes, in nats, and the logits (B, T, 256) for ids and labels (B, T)."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        logits = self.head(self.norm(self.blocks(x)))
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class Windows(torch.utils.data.Dataset):
    """Windows of CONTEXT bytes over a text; the labels are the next bytes."""

    def __init__(self, text: bytes) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def __len__(self) -> int:
        """Return the number of windows."""
        return (len(self.text) - 1) // CONTEXT

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return window `index`."""
        window = self.text[index * CONTEXT : index * CONTEXT + CONTEXT + 1]
        return {"ids": window[:-1], "labels": window[1:]}


def sources() -> tuple[bytes, bytes]:
    """Return the standard library's sources: every tenth file is kept aside."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_bytes() for file in files]
    return b"".join(t for i, t in enumerate(texts) if i % 10), b"".join(t for i, t in enumerate(texts) if not i % 10)[
        : 2**18
    ]


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description="Train a small GPT on the standard library's sources.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", default="runs/tiny_gpt")
    given = parser.parse_args()
    torch.manual_seed(0)
    train, kept_aside = sources()

    trainer = Trainer(
        GPT(),
        [
            Loader(batch_size=16, drop_last=True),
            AdamW(lr=2e-3, weight_decay=0.1),
            Linear(warmup=0.05),
            Clip(norm=1.0),
            Evaluate(every="100 steps"),
            Progress(),
            JsonlLog(),
            ExportSafetensors(),
        ],
        output=given.output,
        steps=given.steps,
        log_every="25 steps",
    )
    result = trainer.fit(Windows(train), evaluate=Windows(kept_aside))
    print(f"{result.metrics['evaluate/loss']:.3f} nats a byte on files it has not seen")


if __name__ == "__main__":
    main()
