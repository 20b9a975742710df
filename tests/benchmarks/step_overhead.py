"""What a step costs beside a hand-written loop: `python tests/benchmarks/step_overhead.py`.

A tiny MLP (32-64-2), batch 8, fused AdamW, linear schedule, clipping at 1.0, the loss logged every 50 steps; one thread.
Every contender first proves that it ends in the same parameters. Then fresh processes run interleaved; reported is
the CPU time between two steps, the minimum over rounds, and its ratio to the hand-written loop. Also counted: Python calls
a step, and host syncs in a step (`Tensor.item`, `__bool__`, `__float__`). Not a test: it asserts no time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1")

import torch

ROWS, BATCH, RATE = 4096, 8, 1e-3


class MLP(torch.nn.Module):
    """Two layers; returns its loss and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of (B, 32) against (B,)."""
        return torch.nn.functional.cross_entropy(self.layers(x), labels)


def parts() -> tuple[MLP, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = MLP()
    return model, torch.randn(ROWS, 32), torch.randint(0, 2, (ROWS,))


class Clock:
    """CPU time and Python calls between step `first` and the last."""

    def __init__(self, first: int, last: int, *, calls: bool, syncs: bool) -> None:
        self.first, self.last, self.step, self.calls, self.syncs = first, last, 0, 0, 0
        self.count_calls, self.count_syncs, self.seconds = calls, syncs, 0.0

    def tick(self) -> None:
        """Count one step."""
        self.step += 1
        if self.step == self.first:
            if self.count_calls:
                sys.setprofile(self._profile)
            if self.count_syncs:
                self._patch()
            self.start = time.process_time()
        elif self.step == self.last:
            self.seconds = time.process_time() - self.start
            sys.setprofile(None)
            self.count_syncs = False

    def _profile(self, _frame: object, kind: str, _argument: object) -> None:
        if kind in ("call", "c_call"):
            self.calls += 1

    def _patch(self) -> None:
        for name in ("item", "__bool__", "__float__", "__int__", "tolist"):
            original = getattr(torch.Tensor, name)

            def counted(tensor: torch.Tensor, *rest: object, original: object = original) -> object:
                self.syncs += self.count_syncs
                return original(tensor, *rest)

            setattr(torch.Tensor, name, counted)


def raw(steps: int, clock: Clock) -> MLP:
    """The loop people write, with the order of rows given."""
    model, x, labels = parts()
    rows = [{"x": x[i], "labels": labels[i]} for i in range(ROWS)]
    order = [i % ROWS for i in range(steps * BATCH)]

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    loader = torch.utils.data.DataLoader(rows, batch_size=BATCH, sampler=order, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, (steps - step) / max(1, steps)))
    model.train()
    total, logged = torch.zeros(()), []
    for number, batch in enumerate(loader, 1):
        loss = model(**batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.detach()
        if number % 50 == 0:
            logged.append(total.item() / 50)
            total.zero_()
        clock.tick()
    return model


def drivetrain(steps: int, clock: Clock) -> MLP:
    """The same as a list of ten plugins."""
    from drivetrain import Trainer, hookimpl
    from drivetrain_plugins import (
        Accumulate,
        AdamW,
        Checkpoint,
        Clip,
        Evaluate,
        JsonlLog,
        Linear,
        Loader,
        Progress,
        TensorBoard,
    )

    class InOrder:
        """Take the rows as they come, and tick."""

        @hookimpl
        def build_sampler(self) -> InOrder:
            return self

        def order(self, epoch: int) -> torch.Tensor:
            return torch.arange(ROWS)

        @hookimpl
        def step_end(self) -> None:
            clock.tick()

    model, x, labels = parts()
    never = f"{10**9} steps"
    plugins = [
        Loader(batch_size=BATCH), Accumulate(batches=1), AdamW(lr=RATE), Linear(), Clip(norm=1.0),
        Evaluate(every=never, at_end=False), Checkpoint(every=never, at_end=False), Progress(), JsonlLog(), TensorBoard(),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as output, Path(os.devnull).open("w") as sys.stderr:
        trainer = Trainer(model, [*plugins, InOrder()], output=output, steps=steps, log_every=50)
        data = {"x": x, "labels": labels}
        trainer.fit(data, evaluate=data)
    sys.stderr = sys.__stderr__
    return model


CONTENDERS = {"raw": raw, "drivetrain": drivetrain}


def one(name: str, steps: int, what: str) -> None:
    torch.set_num_threads(1)
    clock = Clock(steps // 4, steps, calls=what == "calls", syncs=what == "syncs")
    model = CONTENDERS[name](steps, clock)
    bytes_ = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    count = steps - steps // 4
    result = {"us": clock.seconds / count * 1e6, "calls": clock.calls / count, "syncs": clock.syncs / count}
    print(json.dumps({**result, "sha": hashlib.sha256(bytes_).hexdigest()}))


def spawn(name: str, steps: int, what: str = "time") -> dict[str, float]:
    command = [sys.executable, __file__, "--one", name, "--steps", str(steps), "--what", what]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", choices=CONTENDERS)
    parser.add_argument("--what", default="time")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.one:
        one(given.one, given.steps, given.what)
        return
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    shas: dict[str, set[str]] = {name: set() for name in CONTENDERS}
    for _ in range(given.rounds):
        for name in CONTENDERS:
            result = spawn(name, given.steps)
            times[name].append(result["us"])
            shas[name].add(str(result["sha"]))
    base = min(times["raw"])
    print(f"parameters equal after {given.steps} steps: {len(set().union(*shas.values())) == 1}")
    print(f"{'contender':<12}{'us/step':>9}{'ratio':>8}{'calls':>8}{'syncs':>8}")
    for name, values in times.items():
        calls, syncs = spawn(name, 500, "calls")["calls"], spawn(name, 500, "syncs")["syncs"]
        print(f"{name:<12}{min(values):>9.0f}{min(values) / base:>8.2f}{calls:>8.0f}{syncs:>8.2f}")


if __name__ == "__main__":
    main()
