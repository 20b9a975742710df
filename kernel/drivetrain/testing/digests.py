"""Comparing runs bit for bit."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from drivetrain.state import Run


def raw(tensor: torch.Tensor) -> bytes:
    """Return the bytes of `tensor`, whatever its dtype."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def encode(tree: Any) -> tuple[str, list[torch.Tensor]]:
    """Return a state tree as JSON text and the tensors it refers to by number.

    Raises:
        TypeError: it holds something that is neither a JSON value nor a tensor; the message says where.
    """
    tensors: list[torch.Tensor] = []

    def walk(value: Any, at: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors.append(value.detach().clone())
            return {"$tensor": len(tensors) - 1}
        if isinstance(value, dict):
            if odd := [key for key in value if not isinstance(key, str)]:
                raise TypeError(f"state{at} has keys that are no strings: {odd[:3]}")
            return {key: walk(item, f"{at}[{key!r}]") for key, item in sorted(value.items())}
        if isinstance(value, (list, tuple)):
            return [walk(item, f"{at}[{index}]") for index, item in enumerate(value)]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"state{at} is neither a JSON value nor a tensor. Received: {type(value).__name__}")

    return json.dumps(walk(tree, ""), sort_keys=True), tensors


def decode(text: str, tensors: list[torch.Tensor]) -> Any:
    """Return the tree that `encode` was given (tuples as lists), with tensors of its own."""

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == {"$tensor"}:
                return tensors[value["$tensor"]].clone()
            return {key: walk(item) for key, item in value.items()}
        return [walk(item) for item in value] if isinstance(value, list) else value

    return walk(json.loads(text))


def fingerprint(tree: Any) -> str:
    """Return a sha256 over names, values, and the dtype, shape and bytes of every tensor of a state tree."""
    text, tensors = encode(tree)
    made = hashlib.sha256(text.encode())
    for tensor in tensors:
        made.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        made.update(raw(tensor))
    return made.hexdigest()


def digest(run: Run, *parts: str) -> str:
    """Return a sha256 over the state of `run`: equal digests are bit-identical runs.

    Args:
        run: assembled or fitted.
        parts: "model", "optimizer", "progress", "interval", "counters" or "plugins"; all of them if none is named.
    """
    state = run.state_dict()
    return fingerprint({part: state[part] for part in parts or sorted(state)})
