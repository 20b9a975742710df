"""Handwritten digits that come with scikit-learn, as pictures, and a small convolutional network for them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

KEPT_ASIDE = 0.2
SCALE = 255 / 16  # the pictures have 17 shades


def rows(split: str, limit: int | None = None) -> list[dict[str, Any]] | None:
    """Return {"image": uint8 (8, 8), "label"} of `split`; which are kept aside depends on their pixels only."""
    if split not in {"train", "evaluate"}:
        return None
    pixels, labels = load_digits(return_X_y=True)
    made = []
    for picture, label in zip((pixels * SCALE).astype(np.uint8), labels, strict=True):
        aside = int(hashlib.sha256(picture.tobytes()).hexdigest(), 16) % 1000 < 1000 * KEPT_ASIDE
        if aside == (split == "evaluate"):
            made.append({"image": picture.reshape(8, 8), "label": int(label)})
    return made[:limit]


class Network(torch.nn.Module):
    """Two convolutions and a linear layer: an ordinary module that knows nothing of drivetrain."""

    def __init__(self, width: int = 32, dropout: float = 0.1) -> None:
        """Draw the weights."""
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(1, width, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(width, width, 3, padding=1),
            torch.nn.BatchNorm2d(width),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Dropout(dropout),
        )
        self.head = torch.nn.Linear(width * 16, 10)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return {"logits" (B, 10)} and, with labels (B,), the mean {"loss"}."""
        logits = self.head(self.features(pixel_values))
        if labels is None:
            return {"logits": logits}
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}
