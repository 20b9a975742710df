"""What an update costs, and what its state weighs: `python tests/benchmarks/optimizers.py [--rounds 7] [NAME ...]`.

A model of 10 M parameters (an embedding, eight blocks of matrices with biases and norms, a head) with fixed gradients. For
each optimizer the update of a run (`optimizer_step` through the plan, as the loop calls it) and the library used by
hand (as `tests/compose` builds it for its hand-written loop) are timed in turn; reported are the medians of the CPU time of an
update in ms, their ratio, and the bytes of state that a parameter has. One thread. What updates inside the backward pass, or
calls the model again, has no update of its own to time. Not a test: it asserts no time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1")

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from drivetrain import Catalogue, DrivetrainError, Step, Trainer
from drivetrain.testing.compose import example
from drivetrain.testing.files import write_kit

sys.path.insert(0, str(Path(__file__).parents[1] / "compose"))

import table

WITHOUT_UPDATE = {"lbfgs", "lomo", "adalomo", "optimizer-in-backward"}
# Libraries that take a subspace or a matrix root now and then: as many updates as have one of them.
SMALL = {"soap", "shampoo"}  # they decompose matrices as wide as a tensor: on a model of 1.8 M, marked with a star
SLOW = {"galore": 4, "apollo": 4, "muon": 4, "soap": 2, "shampoo": 2}


class Model(torch.nn.Module):
    """10 M parameters; nothing is computed with them."""

    def __init__(self, *, small: bool = False) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(512 if small else 8192, 256)
        block = {"up": (256, 1024), "down": (1024, 256), "qkv": (256, 768), "out": (256, 256)}
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({**{n: torch.nn.Linear(*s) for n, s in block.items()}, "norm": torch.nn.LayerNorm(256)})
            for _ in range(2 if small else 9)
        )
        self.head = torch.nn.Linear(256, 512 if small else 4096)


def gradients(model: torch.nn.Module) -> None:
    """Give every parameter a gradient of its own."""
    draws = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = 0.01 * torch.randn(parameter.shape, generator=draws)


def weight(state: Any) -> int:
    """Return the bytes of all tensors in an optimizer's state."""
    if isinstance(state, torch.Tensor):
        if is_traceable_wrapper_subclass(state):
            names, _ = state.__tensor_flatten__()
            return sum(weight(getattr(state, name)) for name in names)
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(weight, state.values()))
    if isinstance(state, (list, tuple)):
        return sum(map(weight, state))
    return sum(map(weight, vars(state).values())) if hasattr(state, "__dict__") and not callable(state) else 0


def ours(name: str, folder: Path) -> tuple[Any, Any]:
    """Return a function that updates as the loop does, and the run."""
    plugin = example(name, folder)
    run = Trainer(Model(small=name in SMALL), [(name, plugin)], steps=1000, device="cpu").assemble(
        {"x": torch.zeros(8, 1)}
    )
    gradients(run.model)
    step = Step(run, 0, [])
    return lambda: run.hooks.optimizer_step(step), run


def by_hand(name: str, folder: Path) -> Any:
    """Return a function that updates with the library alone."""
    plugin, model = example(name, folder), Model(small=name in SMALL)
    gradients(model)
    spared = [p for n, p in model.named_parameters() if n.endswith("bias") or "norm" in n]
    decayed = [p for n, p in model.named_parameters() if not (n.endswith("bias") or "norm" in n)]
    entry = table.TABLE[name](plugin, folder)
    for prepare in entry.get("prepares", ()):
        prepare(model)
    if "groups" in entry:
        return entry["optimizer"](entry["groups"](model)).step
    return entry["optimizer"]([{"params": decayed}, {"params": spared, "weight_decay": 0.0}]).step


def measure(name: str, folder: Path, rounds: int) -> str:
    """Return a row of the table."""
    try:
        mine, run = ours(name, folder)
        theirs = by_hand(name, folder)
    except DrivetrainError as error:
        return f"{name:22} does not run here: {' '.join(str(error).split())[:120]}"
    updates = SLOW.get(name, 10)
    times: dict[Any, list[float]] = {mine: [], theirs: []}
    for update in times:
        update()
    for number in range(rounds):
        for update in list(times) if number % 2 else list(times)[::-1]:
            started = time.process_time()
            for _ in range(updates):
                update()
            times[update].append((time.process_time() - started) / updates * 1e3)
    parameters = sum(p.numel() for p in run.model.parameters())
    a, b = (statistics.median(times[update]) for update in (mine, theirs))
    ratio = statistics.median(x / y for x, y in zip(times[mine], times[theirs], strict=True))
    state = weight(dict(run.optimizer.state)) / parameters
    return f"{name + '*' * (name in SMALL):22} {a:9.2f} {b:9.2f} {ratio:7.3f} {state:9.2f}"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    catalogue = Catalogue()
    owners = [n for n in catalogue.names if ".optim." in catalogue.entry(n).value and n not in WITHOUT_UPDATE]
    print(f"{sum(p.numel() for p in Model().parameters()) / 1e6:.1f} M parameters; CPU ms an update")
    print(f"{'optimizer':22} {'ours':>9} {'by hand':>9} {'ratio':>7} {'B/param':>9}")
    with tempfile.TemporaryDirectory() as folder:
        kit = write_kit(Path(folder))
        for name in given.names or owners:
            implementation = getattr(catalogue.entry(name).load(), "build_optimizer", None)
            if implementation is not None and not implementation.drivetrain_impl["wrapper"]:
                print(measure(name, kit, given.rounds), flush=True)


if __name__ == "__main__":
    main()
