"""What going on near the end of an epoch costs beside starting it: `python tests/benchmarks/resume_position.py`.

1,000,000 rows in batches of 32. A run is stopped at 0 and at 99 % of its first epoch and saved; fresh processes then go on
from each, interleaved: for every order, and beside them torch's DataLoader, which has to pass over the batches before
(it skips them, as there is no other way). Reported are the medians of the CPU time and the wall time from `fit` (from the
loader's start) to the end of the first step, so what differs between the two columns is the cost of the place;
what a run does anyway (reading the checkpoint, the permutation of a million rows) is in both. What torch imports with its
first optimizer, about a second, is imported before. Not a test: it asserts no time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1")

import numpy as np
import torch

ROWS, BATCH, TOKENS, PLACE = 1_000_000, 32, 2048, 0.99


class Tokens(torch.nn.Module):
    """The smallest model of token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(256, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return a loss of ids (B, L)."""
        return self.embed(input_ids).square().mean()


def fixed() -> dict[str, torch.Tensor]:
    """Return rows of eight tokens as one tensor."""
    return {"input_ids": torch.arange(ROWS * 8).reshape(ROWS, 8) % 256}


def ragged():
    """Return rows of 1 to 60 tokens, most of them short, as one `Table`."""
    from drivetrain_plugins.shared.table import Ragged, Table

    lengths = np.clip(np.random.default_rng(0).lognormal(2.0, 0.8, ROWS).astype(np.int64), 1, 60)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Table({"input_ids": Ragged(np.arange(offsets[-1], dtype=np.int64) % 256, offsets)})


def pad(rows) -> dict[str, torch.Tensor]:
    """Return ids (B, L) of a batch of `ragged`."""
    ids = rows.columns["input_ids"]
    places = np.arange(ids.lengths.max())
    out = np.zeros((len(ids), len(places)), np.int64)
    out[places < ids.lengths[:, None]] = ids.values
    return {"input_ids": torch.from_numpy(out)}


def trainer_of(name: str, output: str):
    """Return a trainer of the order `name` and its data."""
    from drivetrain import Trainer, hookimpl
    from drivetrain_plugins import SGD, Checkpoint, Loader
    from drivetrain_plugins.order.curriculum import Curriculum
    from drivetrain_plugins.order.group_by_length import GroupByLength
    from drivetrain_plugins.order.random import Random
    from drivetrain_plugins.order.rebalance import Rebalance
    from drivetrain_plugins.order.token_budget import TokenBudget

    class PadRows:
        provides = ("padding",)

        @hookimpl
        def build_collator(self):
            return pad

    class FirstStep:
        """Stop the clock after one step."""

        @hookimpl
        def step_end(self, step) -> None:
            step.run.request_stop("that was it")

    orders = {
        "group-by-length": GroupByLength, "token-budget": lambda: TokenBudget(tokens=TOKENS),
        "curriculum": Curriculum, "rebalance": Rebalance,
    }  # fmt: skip
    collator = [] if name == "random" else [PadRows()]
    loader = Loader() if name == "token-budget" else Loader(BATCH)
    never = Checkpoint(every=f"{10**9} steps", at_end=False)
    plugins = [orders.get(name, Random)(), loader, *collator, SGD(lr=0.1), never, FirstStep()]
    return Trainer(Tokens(), plugins, epochs=1, output=output, device="cpu"), fixed() if name == "random" else ragged()


def save(name: str, share: float, output: str) -> None:
    """Save a run that stands at `share` of its first epoch, without taking the steps before."""
    from drivetrain.loop import checkpoint_path

    trainer, data = trainer_of(name, output)
    run = trainer.assemble(data)
    sampler, batches = run.batches["train"].sampler, len(run.batches["train"])
    run.progress.step = run.progress.applied = int(batches * share)
    bounds = sampler.bounds(0) if hasattr(sampler, "bounds") else torch.arange(0, ROWS + 1, BATCH)
    run.progress.rows_in_epoch = run.progress.rows = int(bounds[run.progress.step])
    run.hooks.save(run, checkpoint_path(run))


def go_on(name: str, output: str) -> list[float]:
    """Return seconds of CPU and of wall from `fit` to the end of the first step."""
    trainer, data = trainer_of(name, output)
    torch.optim.SGD(Tokens().parameters(), lr=0.1)
    started = time.process_time(), time.perf_counter()
    trainer.fit(data, resume=True)
    return [time.process_time() - started[0], time.perf_counter() - started[1]]


def skip(share: float) -> list[float]:
    """Return the same of torch's DataLoader, whose first batches are passed over."""
    rows = torch.utils.data.TensorDataset(fixed()["input_ids"])
    model = Tokens()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    started = time.process_time(), time.perf_counter()
    draws = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(rows, BATCH, shuffle=True, generator=draws)
    (ids,) = next(itertools.islice(loader, int(len(loader) * share), None))
    model(ids).backward()
    optimizer.step()
    return [time.process_time() - started[0], time.perf_counter() - started[1]]


ORDERS = ["random", "group-by-length", "token-budget", "curriculum", "rebalance"]


def spawn(*arguments: str) -> list[float]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=3, metavar=("ORDER", "SHARE", "OUTPUT"))
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.one:
        torch.set_num_threads(1)
        name, share, output = given.one[0], float(given.one[1]), given.one[2]
        if given.save:
            print(json.dumps(save(name, share, output)))
        else:
            print(json.dumps(skip(share) if name == "DataLoader" else go_on(name, output)))
        return
    found: dict[tuple[str, float], list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in itertools.product(range(given.rounds), [*ORDERS, "DataLoader"]):
            for share in (0.0, PLACE):
                output = str(Path(folder) / f"{name}-{share}")
                if number == 0 and name != "DataLoader":
                    spawn("--one", name, str(share), output, "--save")
                found.setdefault((name, share), []).append(spawn("--one", name, str(share), output))
    print(f"{ROWS:,} rows, batches of {BATCH}; seconds to the end of the first step")
    print(f"{'':<18}{'CPU at 0':>10}{f'at {PLACE:.0%}':>10}{'wall at 0':>12}{f'at {PLACE:.0%}':>10}")
    for name in [*ORDERS, "DataLoader"]:
        cpu, wall = ([statistics.median(r[i] for r in found[name, s]) for s in (0.0, PLACE)] for i in (0, 1))
        print(f"{name:<18}{cpu[0]:>10.3f}{cpu[1]:>10.3f}{wall[0]:>12.3f}{wall[1]:>10.3f}")


if __name__ == "__main__":
    main()
