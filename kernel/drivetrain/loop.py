"""The kernel's default operations. Read from top to bottom they are a hand-written training loop."""

from __future__ import annotations

import itertools
import logging
import math
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.data import InProcess, Sequential, Shuffled, count_labels, count_shifted_labels, shifts_labels, stack
from drivetrain.errors import ConfigError, DataError, TrainingError
from drivetrain.hooks import hookimpl
from drivetrain.rng import derive_seed, global_seeder
from drivetrain.state import EVALUATE, SAVE, STOP, Micro, Run, Step
from drivetrain.streams import Streamed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from drivetrain.hooks import Hooks

log = logging.getLogger("drivetrain")
NORMS = (
    torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.GroupNorm, torch.nn.modules.batchnorm._BatchNorm,  # noqa: SLF001
)  # fmt: skip


def move(batch: Any, device: torch.device) -> Any:
    """Return `batch` with every tensor on `device`."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(move(value, device) for value in batch)
    return batch


class Defaults:
    """What happens where no plugin owns an operation."""

    is_drivetrain_default = True

    def __init__(self, run: Run, model: Any, datasets: Mapping[str, Any]) -> None:
        """Keep what `Trainer` was given."""
        self._run, self._model, self._datasets = run, model, datasets
        self._accumulation: int = run.facts.get("accumulation", 1)
        self._may_differ = run.world_size > 1 and run.facts.get("may_skip", False)

    @property
    def _hooks(self) -> Hooks:
        return self._run.hooks

    # --- the loop ------------------------------------------------------------------------------------------------

    @hookimpl
    def fit(self, run: Run) -> None:
        """Run epochs to the end."""
        try:
            while not run.finished:
                self._hooks.epoch(run)
        except BaseException as error:
            self._hooks.failed(run, error)
            raise

    @hookimpl
    def epoch(self, run: Run) -> None:
        """Step through what is left of the epoch."""
        hooks, progress, seed_global = self._hooks, run.progress, global_seeder(run.device)
        train_step, plan_step, step_end = hooks.train_step, hooks.plan_step, hooks.step_end
        seed, rank, lonely = run.settings.seed, run.rank, run.world_size == 1
        factors = _factors(run)
        log_due, log_interval = self._run.settings.log_every, self._log_interval
        run.stream = run.micros("train", progress.epoch, progress.rows_in_epoch, progress.position)
        while not run.finished:
            step = plan_step(run)
            if step is None:
                break
            groups = run.optimizer.param_groups  # loading a state makes others
            for group, factor in zip(groups, factors(progress.applied), strict=False):  # a skipped step moves nothing
                group["lr"] = group["initial_lr"] * factor
            step.learning_rate = groups[0]["lr"]
            seed_global(derive_seed(seed, "step", progress.step, rank))
            train_step(step)
            run.advance(step)
            self._measure(run, step)
            step_end(step)
            if log_due.due(run) or run.finished:
                log_interval(run, step)
            if run.votes or not lonely:
                self._attend(run)
        run.stream = None

    @hookimpl
    def plan_step(self, run: Run) -> Step | None:
        """Take the next micro-batches."""
        micros = list(itertools.islice(run.stream or (), self._accumulation))
        return Step(run, run.progress.step, micros) if micros else None

    @hookimpl
    def train_step(self, step: Step) -> None:
        """Count, compute gradients, clip, update."""
        hooks = self._hooks
        hooks.count_items(step)
        hooks.compute_gradients(step)
        hooks.clip_gradients(step)
        if self._may_differ:
            self._agree_on_skipping(step)
        hooks.optimizer_step(step)
        hooks.zero_grad(step)

    @hookimpl
    def count_items(self, step: Step) -> None:
        """Weigh each micro-batch by its share of the step's items, over all ranks."""
        micros, run = step.micros, step.run
        if len(micros) == 1 and run.world_size == 1:  # the scale is 1
            micro = micros[0]
            micro.run, micro.step, step.num_rows, step.num_items = run, step, micro.num_rows, micro.num_items
            return
        rows, items = sum(m.num_rows for m in micros), sum(m.num_items for m in micros)
        if run.world_size > 1:
            both = torch.tensor([rows, items], device=run.device)
            torch.distributed.all_reduce(both)
            rows, items = both.tolist()
        step.num_rows, step.num_items = rows, items
        last = micros[-1]
        for micro in micros:
            micro.run, micro.step, micro.is_last = run, step, micro is last
            micro.scale = micro.num_items / items if items else 0.0

    @hookimpl
    def compute_gradients(self, step: Step) -> None:
        """Accumulate, then let everyone see the gradients."""
        self._hooks.accumulate(step)
        self._hooks.gradients_ready(step)

    @hookimpl
    def accumulate(self, step: Step) -> None:
        """Add up the gradients of all micro-batches; the sum of their scaled losses is the step's loss."""
        hooks, total = self._hooks, None
        for micro in step.micros:
            if micro.num_items == 0:  # its mean would be 0/0
                continue
            hooks.prepare(micro)
            micro.outputs = hooks.forward(micro)
            micro.loss = hooks.compute_loss(micro)
            hooks.backward(micro)
            micro.outputs = None  # free the activations before the next forward
            loss = micro.loss.detach()
            total = loss if total is None else total + loss
        if total is None:
            if step.num_items:  # over all ranks: others have some, and this one adds nothing to their step
                total = torch.zeros((), device=step.run.device)
            else:
                step.skip("no target items")
        step.loss = total

    @hookimpl
    def prepare(self, micro: Micro) -> None:
        """Move the batch to the model; on a CPU it is there."""
        if micro.run.device.type != "cpu":
            micro.batch = move(micro.batch, micro.run.device)

    @hookimpl
    def forward(self, micro: Micro) -> Any:
        """Call the model."""
        batch = micro.batch
        if hasattr(batch, "keys"):
            return micro.run.model(**batch)
        return micro.run.model(*batch) if isinstance(batch, (tuple, list)) else micro.run.model(batch)

    @hookimpl
    def compute_loss(self, micro: Micro) -> torch.Tensor:
        """Take the model's own mean loss."""
        outputs = micro.outputs
        loss: torch.Tensor | None = outputs if isinstance(outputs, torch.Tensor) else None
        if hasattr(outputs, "get"):
            loss = outputs.get("loss")
        if loss is None or loss.ndim:
            raise TrainingError(
                "the model returned no scalar loss and no plugin owns compute_loss. "
                f"Received: {type(outputs).__name__} {list(outputs) if hasattr(outputs, 'keys') else ''}. "
                "Return the mean loss (a 0-dim tensor, or under the key 'loss'), or name a loss plugin"
            )
        return loss if micro.scale == 1.0 else loss * micro.scale

    @hookimpl
    def backward(self, micro: Micro) -> None:
        """Add this micro-batch's gradients."""
        micro.loss.backward()

    @hookimpl
    def grad_norm(self, step: Step) -> torch.Tensor:
        """Measure the total norm as `torch.nn.utils.clip_grad_norm_` does, without its walks and checks."""
        norms = torch._foreach_norm([p.grad for p in step.run.parameters if p.grad is not None])  # noqa: SLF001
        return torch.linalg.vector_norm(torch.stack(norms))  # type: ignore[no-any-return]

    @hookimpl
    def optimizer_step(self, step: Step) -> None:
        """Apply the update."""
        if step.skipped is None:
            step.run.optimizer.step()

    @hookimpl
    def zero_grad(self, step: Step) -> None:
        """Drop the gradients."""
        for parameter in step.run.parameters:
            parameter.grad = None

    @hookimpl
    def agree(self, run: Run, votes: int) -> int:
        """Return the union of all ranks' votes."""
        if run.world_size == 1:
            return votes
        bits = [STOP, SAVE, EVALUATE]
        asked = torch.tensor([bool(votes & bit) for bit in bits], dtype=torch.int32, device=run.device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return sum(bit for bit, yes in zip(bits, asked.tolist(), strict=True) if yes)

    # --- around a step -------------------------------------------------------------------------------------------

    @staticmethod
    def _agree_on_skipping(step: Step) -> None:
        """Skip on all ranks what one of them skips."""
        skips = torch.tensor(step.skipped is not None, dtype=torch.int32, device=step.run.device)
        torch.distributed.all_reduce(skips, torch.distributed.ReduceOp.MAX)
        if skips.item() and step.skipped is None:
            step.skip("another rank asked")

    def _measure(self, run: Run, step: Step) -> None:
        """Add the step to what the next log averages; everything stays on the device."""
        if step.loss is None:  # a step without target items has no loss to average
            return
        run.interval_steps += 1
        run.interval_loss = step.loss if run.interval_loss is None else run.interval_loss + step.loss

    def _log_interval(self, run: Run, step: Step) -> None:
        loss = run.interval_loss
        if run.world_size > 1 and loss is not None:
            loss = loss.clone()
            torch.distributed.all_reduce(loss)  # each rank's loss is its share of the global mean
        metrics: dict[str, Any] = {
            "loss": loss / run.interval_steps if loss is not None else math.nan,
            "learning_rate": step.learning_rate,
            "epoch": run.epochs,
            **run.extras,
        }
        if step.grad_norm is not None:
            metrics["grad_norm"] = step.grad_norm
        if run.skipped_steps:
            metrics["skipped_steps"] = run.skipped_steps
        run.interval_steps, run.interval_loss = 0, None
        run.log(metrics)

    def _attend(self, run: Run) -> None:
        """Do what was asked for, once all ranks agree: evaluate, then save, then stop."""
        votes, reasons = self._hooks.agree(run, run.votes), run.reasons
        run.votes, run.reasons = 0, {}
        if votes & EVALUATE and self._answered(run, "evaluate", reasons.get(EVALUATE)):
            for split in run.evaluated:
                evaluate(run, split)
            if run.votes or run.world_size > 1:  # asked for in `evaluated`: it concerns this step's weights
                votes, reasons = votes | self._hooks.agree(run, run.votes), {**run.reasons, **reasons}
                run.votes, run.reasons = 0, {}
        if votes & SAVE and self._answered(run, "save", reasons.get(SAVE)):
            self._hooks.save(run, checkpoint_path(run))
        if votes & STOP:
            run.stopped = reasons.get(STOP, "another rank asked")

    @staticmethod
    def _answered(run: Run, hook: str, reason: str | None) -> bool:
        """Tell whether some plugin does what was asked for; if none does, say so, and train on."""
        if run.plan.hooks[hook].owner is None:
            log.warning("step %d: asked to %s (%s), but no plugin of this run does", run.progress.step, hook, reason)
            return False
        return True

    # --- assembly ------------------------------------------------------------------------------------------------

    @hookimpl
    def build_model(self, run: Run) -> Any:
        """Use the given model."""
        run.shifted_labels = shifts_labels(self._model)
        return self._model

    @hookimpl
    def build_dataset(self, run: Run, split: str) -> Any:  # noqa: ARG002
        """Use the given data."""
        return self._datasets.get(split)

    @hookimpl
    def build_collator(self, run: Run, split: str) -> Any:  # noqa: ARG002
        """Stack equally shaped rows."""
        return stack

    @hookimpl
    def build_sampler(self, run: Run, split: str) -> Any:
        """Shuffle what is trained on."""
        rows = len(run.datasets[split])
        return Shuffled(rows, run.settings.seed) if split == "train" else Sequential(rows)

    @hookimpl
    def build_count(self, run: Run, split: str) -> Any:  # noqa: ARG002
        """Count labels that are not -100; shifted, where the model's loss shifts them."""
        return count_shifted_labels if run.shifted_labels else count_labels

    @hookimpl
    def bad_row(self, run: Run, reason: str) -> None:  # noqa: ARG002
        """Refuse it."""
        raise DataError(reason)

    @hookimpl
    def build_batches(self, run: Run, split: str, fetch: Any, sampler: Any) -> Any:  # noqa: ARG002
        """Make batches of 8 in this process."""
        if sampler is None:
            return Streamed(fetch, 8, rank=run.rank, world_size=run.world_size)
        return InProcess(fetch, sampler, 8, rank=run.rank, world_size=run.world_size)

    @hookimpl
    def parameter_groups(self, run: Run) -> list[dict[str, Any]]:
        """Decay weights; do not decay biases and the weights of norms."""
        spared = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in run.model.named_modules()
            for name, _ in module.named_parameters(recurse=False)
            if name == "bias" or isinstance(module, NORMS) or "norm" in type(module).__name__.lower()
        }
        named = [(n, p) for n, p in run.model.named_parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [(n, p) for n, p in named if n not in spared]},
            {"params": [(n, p) for n, p in named if n in spared], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    @hookimpl
    def count_steps(self, run: Run) -> int:
        """Take the given number, or what the epochs make of the data."""
        if run.settings.steps is not None:
            return int(run.settings.steps)
        if run.rows_per_epoch is None:
            raise ConfigError("nobody knows the length of the training data, a stream: give steps instead of epochs")
        return math.ceil((run.settings.epochs or 0) * math.ceil(len(run.batches["train"]) / self._accumulation))

    @hookimpl
    def build_schedule(self, run: Run) -> None:  # noqa: ARG002
        """Keep the rate."""
        return


def _factors(run: Run) -> Callable[[int], Iterable[float]]:
    """Return the function from applied steps to each group's factor."""
    schedule, groups = run.schedule or (lambda _: 1.0), len(run.optimizer.param_groups)
    if callable(schedule):
        return lambda applied: itertools.repeat(schedule(applied))
    if len(schedule) != groups:
        raise ConfigError(f"build_schedule gave {len(schedule)} functions for {groups} groups of the optimizer")
    return lambda applied: [one(applied) for one in schedule]


def evaluate(run: Run, split: str) -> dict[str, float]:
    """Evaluate `split`, log the metrics under its name and tell `evaluated`."""
    if split not in run.batches:
        raise ConfigError(f"there is no split {split!r} to evaluate. Received: {sorted(run.batches)}")
    if run.plan.hooks["evaluate"].owner is None:
        raise ConfigError("no plugin of this run evaluates: add `evaluate`")
    metrics: dict[str, float] = run.hooks.evaluate(run, split)
    run.log({f"{split}/{name}": value for name, value in metrics.items()})
    run.hooks.evaluated(run, split, metrics)
    return metrics


def checkpoint_path(run: Run) -> Path:
    """Return where a checkpoint of this step belongs."""
    if run.settings.output is None:
        raise ConfigError("saving needs the run's folder: Trainer(..., output=...) or [run] output = ...")
    return run.settings.output / "checkpoints" / f"step-{run.progress.step:08d}"
