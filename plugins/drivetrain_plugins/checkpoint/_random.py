"""The global generators' state as JSON, of one rank and of all."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from drivetrain_plugins.checkpoint._ranks import gather_texts

if TYPE_CHECKING:
    from drivetrain import Run

WORDS = 624  # of a Mersenne Twister


def random_states(run: Run) -> list[dict[str, Any]]:
    """Return the state of every rank's global generators, by rank; all ranks must call it."""
    return [json.loads(text) for text in gather_texts(run, json.dumps(_of_this_rank(run.device)))]


def restore_random_states(states: list[dict[str, Any]] | dict[str, Any], run: Run) -> None:
    """Restore this rank's of what `random_states` returned; a rank that was not there is seeded anew."""
    if isinstance(states, dict):  # schema 1: those of rank 0
        states = [states]
    if run.rank < len(states):
        _restore(states[run.rank], run.device)
        return
    seed = run.seed_for("rank", run.progress.step, run.rank)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global one
    torch.manual_seed(seed % 2**63)


def _of_this_rank(device: torch.device) -> dict[str, Any]:
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - the global one
    state = {
        "python": random.getstate(),
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _text(torch.get_rng_state()),
    }
    if device.type == "cuda":
        state["cuda"] = _text(torch.cuda.get_rng_state(device))
    return state


def _restore(state: dict[str, Any], device: torch.device) -> None:
    name, keys, position, *rest = state["numpy"]
    if len(keys) != WORDS or type(position) is not int or not 0 <= position <= WORDS:  # numpy would read past the end
        raise ValueError(f"expected a position in numpy's {WORDS} words, found {str(position)[:40]} in {len(keys)}")
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, *rest))  # noqa: NPY002 - the global one
    torch.set_rng_state(_tensor(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_tensor(state["cuda"]), device)


def _text(state: torch.Tensor) -> str:
    return bytes(state.numpy()).hex()


def _tensor(state: str | torch.Tensor) -> torch.Tensor:
    return state if isinstance(state, torch.Tensor) else torch.tensor(list(bytes.fromhex(state)), dtype=torch.uint8)
