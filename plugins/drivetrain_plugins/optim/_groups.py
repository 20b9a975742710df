"""What optimizer plugins share: turning the run's parameter groups into an optimizer's, and pairs of numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def with_decay(groups: list[dict[str, Any]], weight_decay: float) -> list[dict[str, Any]]:
    """Return `groups` with their decay filled in; groups that differ in nothing become one (one fused call a step)."""
    merged: list[dict[str, Any]] = []
    for group in groups:
        filled = {"weight_decay": weight_decay, **group}
        options = {k: v for k, v in filled.items() if k != "params"}
        twin = next((m for m in merged if {k: v for k, v in m.items() if k != "params"} == options), None)
        if twin is None:
            merged.append({**filled, "params": list(filled["params"])})
        else:
            twin["params"] += filled["params"]
    return merged


def two(name: str, values: Sequence[float]) -> tuple[float, float]:
    """Return `values` as a pair of floats, which is what optimizers take.

    Raises:
        ValueError: they are not two.
    """
    if len(values) != 2:  # noqa: PLR2004
        raise ValueError(f"{name} must be two numbers. Received: {values!r}")
    return float(values[0]), float(values[1])
