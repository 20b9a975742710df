"""Named random streams: every draw is a function of (seed, name, key) and of nothing else.

A stream that is keyed by its position needs no state: resuming, changing the worker count or adding a plugin
cannot move it. So a plugin asks for `run.generator("masked-lm", epoch, index)` where it draws, and the global
generator (dropout) is re-seeded at each optimizer step from ("step", number, rank).
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def derive_seed(seed: int, name: str, *key: int) -> int:
    """Return 63 bits that depend on `seed`, `name` and `key` alone (BLAKE2b, stable across machines)."""
    text = f"{seed}/{name}/{'/'.join(map(str, key))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, name: str, *key: int) -> torch.Generator:
    """Return a fresh CPU generator for the stream `name` at position `key`."""
    return torch.Generator().manual_seed(derive_seed(seed, name, *key))


def seed_globals(seed: int) -> None:
    """Seed the CPU generators that rows are augmented with: torch's, Python's and numpy's legacy one."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 - for datasets that draw from the legacy generator


def global_seeder(device: torch.device) -> Callable[[int], object]:
    """Return the cheapest function that seeds the global generators which `device` draws from.

    `torch.manual_seed` probes every backend (96 us on CPU where the generator itself takes 1 us), so the
    generators are looked up once.
    """
    cpu = torch.default_generator.manual_seed
    if device.type == "cpu":
        return cpu
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        own = torch.cuda.default_generators[device.index or 0].manual_seed

        def seed_both(seed: int) -> None:
            cpu(seed)
            own(seed)

        return seed_both
    return torch.manual_seed
