"""What hooks receive: the carriers `Run`, `Step` and `Micro`, and the records they return.

A hot hook takes one mutable carrier, so that a wrapper can change what the inner call sees and a skipped update is
a field (`step.skip(reason)`) instead of control flow.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain.options import option
from drivetrain.rng import derive_seed, generator
from drivetrain.triggers import Trigger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from drivetrain.hooks import Hooks
    from drivetrain.plan import Plan
    from drivetrain.protocols import Batches


def _path(value: str | Path | None) -> Path | None:
    if value is not None and (not str(value).strip() or any(part in str(value) for part in ("$", "://", "\0"))):
        raise ValueError(f"output must name a local folder; variables are not expanded. Received: {str(value)!r}")
    return None if value is None else Path(value).expanduser()


@attrs.define(kw_only=True)
class Settings:
    """The `[run]` table: what belongs to no plugin."""

    output: Path | None = option(None, converter=_path, help="the run's folder")  # noqa: RUF009 - attrs
    epochs: float | None = option(None, gt=0, lt=2**31, help="passes over the training data")
    steps: int | None = option(None, ge=1, lt=2**53, help="optimizer steps, instead of epochs")
    seed: int = option(0, ge=0, lt=2**63, help="every stream of the run derives from it")
    device: str = option("auto", help='"auto", or what torch.device takes')
    log_every: Trigger = option("50 steps", converter=Trigger.parse, help="how often `log` is fired")  # noqa: RUF009 - attrs

    def __attrs_post_init__(self) -> None:
        """Refuse two lengths."""
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"epochs and steps contradict each other. Received: {self.epochs=}, {self.steps=}")


class Stage(enum.IntEnum):
    """When a model transform applies; the kernel applies them in this order."""

    ADAPT, CONVERT, PARTITION, RECOMPUTE, COMPILE, SHARD = range(6)


@attrs.frozen
class Transform:
    """A change to the model: `apply(model)` returns the model to use from there on."""

    stage: Stage
    apply: Callable[[torch.nn.Module], torch.nn.Module]
    exclusive: bool = False


@attrs.frozen
class Exporter:
    """One export format: `write(run, path)` makes the folder or file `path`."""

    format: str
    write: Callable[[Run, Path], None]
    suffix: str = ""


@attrs.define(eq=True)
class Progress:
    """Where a run stands; advanced at one place (`Run.advance`) and saved at step boundaries only.

    `step` counts attempted optimizer steps, `applied` those that changed the weights (schedules and averages follow
    it). The position is (`epoch`, `rows_in_epoch`) in global rows, whatever the batch size and number of ranks.
    """

    step: int = 0
    applied: int = 0
    epoch: int = 0
    rows_in_epoch: int = 0
    rows: int = 0
    items: int = 0
    position: Any = None  # in a stream: what it gave as its position, JSON values


@attrs.define(eq=False, repr=False)
class Micro:
    """One micro-batch on its way through forward, loss and backward."""

    batch: Any
    num_rows: int
    num_items: Any  # valid target items: an int, or a 0-dim tensor where a loss plugin counts on the device
    run: Run = None  # type: ignore[assignment]  # set by the loop before any hook sees it
    step: Step | None = None  # None in an evaluation
    scale: Any = 1.0  # this micro-batch's share of the step's items; the mean loss is multiplied by it
    outputs: Any = None
    loss: Any = None  # 0-dim tensor, already scaled
    is_last: bool = True
    bad: Sequence[str] = ()  # rows that were left out, each with its reason
    position: Any = None  # of a stream, after this micro-batch
    ends: bool = False  # a stream's epoch is over after it
    number: int | None = None  # in an evaluation: which of this rank's micro-batches it is


@attrs.define(eq=False, repr=False)
class Step:
    """One optimizer step."""

    run: Run
    number: int
    micros: list[Micro]
    num_rows: int = 0  # over all ranks
    num_items: Any = 0  # over all ranks; set by `count_items`
    loss: Any = None  # 0-dim tensor: mean over the step's items of this rank's micro-batches, detached
    grad_norm: Any = None  # 0-dim tensor, where a plugin measured it
    learning_rate: float = 0.0
    skipped: str | None = None  # why the update must not be applied

    def skip(self, reason: str) -> None:
        """Do not apply this update: no schedule, average or applied-step counter moves."""
        self.skipped = reason


def _uncast(loaded: Any, saved: Any) -> Any:
    """Undo torch's cast of loaded state to its parameter's type: float32 moments of bfloat16 weights lose bits."""
    if isinstance(saved, dict) and isinstance(loaded, dict):
        return {key: _uncast(loaded[key], value) for key, value in saved.items()}
    if isinstance(saved, torch.Tensor) and saved.dtype != loaded.dtype:
        return saved.to(loaded.device)
    return loaded


STOP, SAVE, EVALUATE = 1, 2, 4


@attrs.define(eq=False, repr=False)
class Run:
    """Everything one training run owns; plugins read and set its public fields while it is assembled."""

    settings: Settings = attrs.field(factory=Settings)
    hooks: Hooks = None  # type: ignore[assignment]  # the callable hooks, frozen where hot
    plan: Plan = None  # type: ignore[assignment]
    plugins: dict[str, Any] = attrs.field(factory=dict)
    facts: dict[str, Any] = attrs.field(factory=dict)  # what plugins declare, e.g. accumulation
    device: torch.device = attrs.field(factory=lambda: torch.device("cpu"))
    rank: int = 0
    world_size: int = 1
    model: Any = None
    processor: Any = None  # tokenizer or processor, where the model has one
    shifted_labels: bool = False  # the model's loss predicts labels[..., 1:]
    optimizer: Any = None
    parameters: tuple[torch.nn.Parameter, ...] = ()  # those the optimizer updates
    schedule: Any = None  # applied steps -> factor on each group's initial rate, or a list of such, one a group
    datasets: dict[str, Any] = attrs.field(factory=dict)  # by split: "train", "evaluate", "evaluate/NAME"
    batches: dict[str, Batches] = attrs.field(factory=dict)
    progress: Progress = attrs.field(factory=Progress)
    total_steps: int = 0
    stream: Iterator[Micro] | None = None  # the micro-batches left in this epoch
    votes: int = 0  # what was asked for since the last boundary: STOP | SAVE | EVALUATE
    reasons: dict[int, str] = attrs.field(factory=dict)
    stopped: str | None = None  # why the run ended early
    skipped_steps: int = 0
    interval_steps: int = 0  # what the next `log` averages over
    interval_loss: torch.Tensor | None = None
    extras: dict[str, Any] = attrs.field(factory=dict)  # name -> tensor or number, shown at the next `log`
    metrics: dict[str, float] = attrs.field(factory=dict)  # the newest value of everything logged

    def seed_for(self, name: str, *key: int) -> int:
        """Return the seed of stream `name` at position `key`, e.g. for `random.Random`."""
        return derive_seed(self.settings.seed, name, *key)

    def generator(self, name: str, *key: int) -> torch.Generator:
        """Return the torch generator of stream `name` at position `key`."""
        return generator(self.settings.seed, name, *key)

    @property
    def rows_per_epoch(self) -> int | None:
        """Rows one training epoch consumes over all ranks (dropped ones not counted); None for a stream."""
        return self.batches["train"].rows_per_epoch

    @property
    def evaluated(self) -> list[str]:
        """Splits that are evaluated: those whose names begin with "evaluate", or what the fact says, by a plugin."""
        return self.facts.get("evaluated_sets", [split for split in self.batches if split.startswith("evaluate")])  # type: ignore[no-any-return]

    @property
    def finished(self) -> bool:
        """True when the run has taken all its steps or was stopped."""
        return self.stopped is not None or self.progress.step >= self.total_steps

    def _request(self, vote: int, reason: str) -> None:
        self.votes |= vote
        self.reasons.setdefault(vote, reason)

    def request_stop(self, reason: str) -> None:
        """End the run at the next step boundary, when all ranks have heard of it."""
        self._request(STOP, reason)

    def request_save(self, reason: str) -> None:
        """Save a checkpoint at the next step boundary; requests combine."""
        self._request(SAVE, reason)

    def request_evaluate(self, reason: str) -> None:
        """Evaluate at the next step boundary; requests combine."""
        self._request(EVALUATE, reason)

    def advance(self, step: Step) -> None:
        """Move every counter past `step`; a position at the end of an epoch becomes the start of the next."""
        progress = self.progress
        progress.step += 1
        if step.skipped is None:
            progress.applied += 1
        else:
            self.skipped_steps += 1
        progress.rows += step.num_rows
        progress.rows_in_epoch += step.num_rows
        progress.items += step.num_items
        total = self.batches["train"].rows_per_epoch
        if total is None:
            progress.position = step.micros[-1].position
        if step.micros[-1].ends if total is None else progress.rows_in_epoch >= total:
            progress.epoch += 1
            progress.rows_in_epoch, progress.position = 0, None

    def micros(self, split: str, epoch: int = 0, start: int = 0, position: Any = None) -> Iterator[Micro]:
        """Yield the micro-batches of `split` from row `start` on; bad rows that were left out are told."""
        batches = self.batches[split]
        stream = batches.iterate(epoch, start) if position is None else batches.iterate(epoch, start, position)
        return self._heard(stream) if self.plan.hooks["bad_row"].owner != "drivetrain" else stream

    def _heard(self, stream: Iterator[Micro]) -> Iterator[Micro]:
        for micro in stream:
            for reason in micro.bad:
                self.hooks.bad_row(self, reason)
            yield micro

    @property
    def epochs(self) -> float:
        """Epochs done; whole ones only where the data is a stream."""
        rows = self.rows_per_epoch
        return self.progress.epoch + (self.progress.rows_in_epoch / rows if rows else 0)

    def log(self, metrics: dict[str, Any]) -> None:
        """Make `metrics` plain numbers (the only host sync of a log interval) and tell every listener of `log`."""
        numbers = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in metrics.items()}
        self.metrics.update(numbers)
        self.hooks.log(self, numbers)

    def state_dict(self) -> dict[str, Any]:
        """Return all state that exact resume needs: nested dicts of tensors and JSON values, nothing copied.

        The model holds every parameter and buffer, non-persistent ones included (they can move during training).
        """
        model = dict(self.model.state_dict(keep_vars=True))
        model.update({k: v for k, v in self.model.named_buffers() if k not in model})
        optimizer = self.optimizer.state_dict()
        interval = self.interval_loss
        return {
            "model": {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in model.items()},
            "optimizer": {
                "state": {str(k): v for k, v in optimizer["state"].items()},
                "param_groups": optimizer["param_groups"],
            },
            "progress": attrs.asdict(self.progress),
            "interval": {"steps": self.interval_steps, **({} if interval is None else {"loss": interval})},
            "counters": {"skipped_steps": self.skipped_steps},
            "plugins": {n: p.state_dict() for n, p in self.plugins.items() if hasattr(p, "state_dict")},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, into a run assembled from the same plugins.

        Raises:
            ValueError: a parameter, buffer or optimizer entry is missing, extra or of another shape.
        """
        own = dict(self.model.state_dict(keep_vars=True))
        own.update({k: v for k, v in self.model.named_buffers() if k not in own})
        given = state["model"]
        if missing := sorted(own.keys() ^ given.keys()):
            raise ValueError(f"the model and the saved state differ in {missing[:8]} ({len(missing)} names)")
        with torch.no_grad():
            for name, tensor in own.items():
                if tensor.shape != given[name].shape or tensor.dtype != given[name].dtype:
                    raise ValueError(
                        f"{name!r} is {given[name].dtype} {tuple(given[name].shape)} in the saved state, "
                        f"{tensor.dtype} {tuple(tensor.shape)} in the model"
                    )
                tensor.copy_(given[name])
        optimizer = state["optimizer"]
        for now, then in zip(self.optimizer.param_groups, optimizer["param_groups"], strict=True):
            if now.get("param_names") != then.get("param_names"):
                raise ValueError("the optimizer's parameters differ from the saved ones in name or order")
        self.optimizer.load_state_dict(
            {
                "state": {int(k): v for k, v in optimizer["state"].items()},
                "param_groups": optimizer["param_groups"],
            }
        )
        for number, parameter in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            entry = self.optimizer.state.get(parameter, {})
            entry.update({k: _uncast(entry[k], v) for k, v in optimizer["state"].get(str(number), {}).items()})
        self.progress = Progress(**state["progress"])
        self.interval_steps = state["interval"]["steps"]
        self.interval_loss = loss if (loss := state["interval"].get("loss")) is None else loss.to(self.device)
        self.skipped_steps = state["counters"]["skipped_steps"]
        for name, value in state["plugins"].items():
            if name in self.plugins:
                self.plugins[name].load_state_dict(value)
