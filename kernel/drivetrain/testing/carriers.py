"""Carriers to call one hook of a plugin with."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.catalogue import Catalogue
from drivetrain.plan import name_plugins
from drivetrain.state import Step
from drivetrain.testing.files import DEV_ROWS, TRAIN_ROWS, TinyModule
from drivetrain.testing.kinds import tensor_rows
from drivetrain.testing.probes import BaseOptimizer
from drivetrain.trainer import Trainer

if TYPE_CHECKING:
    from drivetrain.state import Micro, Run


def tiny_module(dropout: float = 0.1, seed: int = 5) -> TinyModule:
    """Return a `TinyModule` whose weights depend on `seed` alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return TinyModule(dropout)


def make_run(*plugins: Any, model: Any = None, train: Any = None, evaluate: Any = None, **settings: Any) -> Run:
    """Return an assembled run of `plugins` on a tiny model and 40 rows; what they lack, the kit brings.

    Args:
        plugins: instances, or (name, instance) pairs.
        model: instead of the kit's `TinyModule`.
        train: instead of the kit's columns "x" (40, 8) and "labels" (40,).
        evaluate: instead of 12 more such rows, which are given where a plugin evaluates.
        settings: of the run, e.g. `output=tmp_path`; 6 steps on the CPU with seed 7 if not given.
    """
    from drivetrain.testing.compose import owned  # noqa: PLC0415 - it imports this module

    named = name_plugins(plugins, Catalogue(()))
    owns = owned(named.values())
    if "build_optimizer" not in owns:
        named["base-optimizer"] = BaseOptimizer()
    if model is None and "build_model" not in owns:
        model = tiny_module()
    if "build_dataset" not in owns:
        train = tensor_rows(TRAIN_ROWS) if train is None else train
        if evaluate is None and "evaluate" in owns:
            evaluate = tensor_rows(DEV_ROWS, start=1000)
    settings = {"device": "cpu", "seed": 7, **({} if "epochs" in settings else {"steps": 6}), **settings}
    run = Trainer(model, list(named.items()), catalogue=Catalogue(()), **settings).assemble(train, evaluate)
    run.model.train()
    return run


def make_step(run: Run | None = None, *, micros: int = 1, gradients: bool = False, backward: bool = False) -> Step:
    """Return the next step of `run`, counted; with `gradients` they are computed too, through the run's hooks.

    Args:
        run: from `make_run`; a fresh one if None.
        micros: how many micro-batches.
        gradients: fire compute_gradients (accumulate, then gradients_ready).
        backward: fire accumulate only, for a plugin whose gradients_ready is to be called by the test.
    """
    run = make_run() if run is None else run
    stream = run.batches["train"].iterate(run.progress.epoch, run.progress.rows_in_epoch)
    step = Step(run, run.progress.step, list(itertools.islice(stream, micros)))
    step.learning_rate = run.optimizer.param_groups[0]["lr"]
    torch.default_generator.manual_seed(run.seed_for("step", step.number, run.rank))
    run.hooks.count_items(step)
    if gradients:
        run.hooks.compute_gradients(step)
    elif backward:
        run.hooks.accumulate(step)
    return step


def make_micro(run: Run | None = None, *, forward: bool = False) -> Micro:
    """Return a micro-batch of `run`, ready for its forward; with `forward` it has outputs and a loss."""
    micro = make_step(run).micros[0]
    if forward:
        hooks = micro.run.hooks
        hooks.prepare(micro)
        micro.outputs = hooks.forward(micro)
        micro.loss = hooks.compute_loss(micro)
    return micro
