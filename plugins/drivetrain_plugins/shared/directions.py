"""Which way a metric is better."""

from __future__ import annotations

import re

DIRECTION = '"min" or "max" is better; "auto" knows it from the name'
FALLING = {
    "loss", "error", "err", "perplexity", "ppl", "nll", "mse", "rmse", "mae", "mape", "wer", "cer", "ter", "bpb", "bpc",
    "distance", "divergence", "brier", "ece",
}  # fmt: skip
RISING = {
    "accuracy", "acc", "f1", "precision", "recall", "auc", "auroc", "auprc", "map", "ap", "bleu", "sacrebleu", "rouge",
    "rouge1", "rouge2", "rougel", "meteor", "chrf", "mcc", "r2", "pearson", "spearman", "iou", "dice", "match", "em",
    "reward", "score", "ndcg", "mrr",
}  # fmt: skip


def direction_of(name: str, direction: str, *, option: str = "direction") -> str:
    """Return "min" or "max".

    Args:
        name: the metric's.
        direction: what the user gave: "min", "max" or "auto".
        option: what that is called.

    Raises:
        ValueError: it is "auto", and the name does not say.
    """
    if direction != "auto":
        return direction
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    falls, rises = bool(words & FALLING), bool(words & RISING)
    if falls == rises:
        raise ValueError(f'which way is better for this metric? Give {option} = "min" or "max". Received: {name!r}')
    return "min" if falls else "max"
