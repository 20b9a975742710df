"""Points on two sides of a line, and a model that finds the line."""

from __future__ import annotations

import random

import torch


class Line(torch.nn.Module):
    """Tell the side of a point; returns the loss and the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, point: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Take points (B, 2) and sides (B,)."""
        logits = self.linear(point.float())
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows(split: str) -> list[dict[str, object]] | None:
    """Return 200 points to learn from and 100 to measure on."""
    sizes = {"train": 200, "evaluate": 100}
    if split not in sizes:
        return None
    draws = random.Random(split)  # noqa: S311 - not for secrets
    points = [(draws.uniform(-1, 1), draws.uniform(-1, 1)) for _ in range(sizes[split])]
    return [{"point": torch.tensor(p), "labels": int(p[0] > p[1])} for p in points]
