"""The contract: every hook, when it fires, what it may change, and where the chain stops.

The loop, with its hooks in place (O operation, E event, C collect; see `kinds` below):

    assemble:  build_model, build_dataset, build_collator, build_count, batch_checks, build_sampler, build_batches,
               transforms (by stage),
               parameter_groups, build_optimizer, count_steps, build_schedule, assembled  [load, loaded on resume]
    fit:                                                  # wrap this one for a whole run's resources
        while not run.finished:
            epoch:
                while step := plan_step(run):             # the micro-batches of one optimizer step
                    train_step:
                        count_items
                        compute_gradients:
                            accumulate:
                                for micro in step.micros: prepare, forward, compute_loss, backward
                            gradients_ready
                        clip_gradients                    # grad_norm inside, where a plugin clips
                        (ranks agree on step.skipped)     # where the fact "may_skip" says that a plugin skips
                        optimizer_step                    # not applied if step.skipped
                        zero_grad
                    step_end                              # counters already advanced
                    log, if due; agree, if anything was asked for; then evaluate, evaluated, save, saved
        failed, if something raised

Kinds:
    operation  one owner at most (the kernel's default where nobody owns it), any number of wrappers
    event      everyone hears it; returns nothing; no wrappers
    collect    cold; each returns records, which the kernel checks and sorts

The first plugin of a run's list is called first and is the outermost wrapper. A plugin is any object with methods
marked `@hookimpl`; subclassing `Hooks` is optional and lets type checkers see the signatures:

    class PrintLoss:
        @hookimpl
        def log(self, run, metrics):
            print(run.progress.step, metrics["loss"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from drivetrain.state import Micro, Run, Step

    F = TypeVar("F", bound=Callable[..., Any])

hookimpl = pluggy.HookimplMarker("drivetrain")
_spec = pluggy.HookspecMarker("drivetrain")

# What the kernel's default of an operation calls. The plan uses it: who owns an operation and does not say that it
# still calls these (class attribute `calls = {"accumulate": ("forward", ...)}`) makes them unreachable.
DEFAULT_CALLS: dict[str, tuple[str, ...]] = {
    "fit": ("epoch", "failed"),
    "epoch": ("plan_step", "train_step", "step_end", "log", "agree", "evaluate", "save"),
    "train_step": ("count_items", "compute_gradients", "clip_gradients", "optimizer_step", "zero_grad"),
    "compute_gradients": ("accumulate", "gradients_ready"),
    "accumulate": ("prepare", "forward", "compute_loss", "backward"),
}


def operation(hot: bool = False) -> Callable[[F], F]:
    """Declare a hook with one owner; `hot` ones take one carrier and are frozen when the run starts."""

    def mark(function: F) -> F:
        function.drivetrain_kind, function.drivetrain_hot = "operation", hot  # type: ignore[attr-defined]
        return _spec(function, firstresult=True)

    return mark


def event(hot: bool = False) -> Callable[[F], F]:
    """Declare a hook that everyone hears."""

    def mark(function: F) -> F:
        function.drivetrain_kind, function.drivetrain_hot = "event", hot  # type: ignore[attr-defined]
        return _spec(function)

    return mark


def collect(function: F) -> F:
    """Declare a cold hook that gathers records from everyone."""
    function.drivetrain_kind, function.drivetrain_hot = "collect", False  # type: ignore[attr-defined]
    return _spec(function)


class Hooks:
    """All hooks of the kernel. Every rank fires all of them unless the docstring says otherwise."""

    # --- assembly ------------------------------------------------------------------------------------------------

    @collect
    def add_hooks(self, manager: pluggy.PluginManager) -> None:
        """Bring hooks of your own, before anyone is registered: `manager.add_hookspecs(MySpecs)`.

        `MySpecs` is a class whose methods are declared with `operation()`, `event()` or `collect`; the kernel then
        checks and freezes their implementations like its own. Call them as `run.hooks.NAME(...)`. Several plugins may
        bring the same class: who fires its hooks and who listens to them.
        """

    @operation()
    def build_model(self, run: Run) -> Any:
        """Return the model (a `torch.nn.Module`); may set `run.processor` and `run.shifted_labels`.

        Default: the model given to `Trainer`. Global generators are seeded from stream "model" just before.
        """

    @collect
    def transforms(self, run: Run) -> Any:
        """Return a list of `Transform(stage, apply)`; the kernel applies all of them in stage order.

        Example: `return [Transform(Stage.COMPILE, torch.compile)]`.
        """

    @operation()
    def build_dataset(self, run: Run, split: str) -> Any:
        """Return the dataset of `split` ("train", "evaluate" or "evaluate/NAME"), or None if there is none.

        A dataset has `__len__` and `__getitem__`, better `__getitems__`, or is a stream: `open(epoch, position)` (see
        `streams.py`), or any iterable. Default: what `fit` was given. Wrap it to map rows:
        `rows = yield; return None if rows is None else Tokenized(rows)`.
        """

    @operation()
    def bad_row(self, run: Run, reason: str) -> Any:
        """Say what becomes of a row that cannot be used; `reason` names source, row and field. Default: DataError.

        Where a plugin owns it and returns, the row is left out. Fired at assembly by what reads rows, and in the
        loop when the step takes the batch that lacks the row.
        """

    @operation()
    def build_collator(self, run: Run, split: str) -> Any:
        """Return a picklable callable from a list of rows to a batch. Default: `stack`.

        One that draws random numbers sets `stream = "its-name"` and is then called with `generator=`, a generator
        keyed by seed, epoch and position.
        """

    @operation()
    def build_count(self, run: Run, split: str) -> Any:
        """Return a picklable callable from a batch to the number of its target items, or None to count rows.

        The loss plugin owns it: the mean loss of a micro-batch is weighed by this number. Default: labels that are
        not -100, without the first of each row where the model's own loss shifts them.
        """

    @collect
    def batch_checks(self, run: Run, split: str) -> Any:
        """Return a list of picklable callables that raise DataError for a batch the run cannot use.

        They see every collated batch before it leaves the loader; the row to blame is found and named.
        """

    @operation()
    def build_sampler(self, run: Run, split: str) -> Any:
        """Return an `Order`: `order(epoch)` gives row numbers, and `bounds(epoch)`, if it has it, where batches end.

        Default: shuffled for "train", else as they come. Not called for a stream, which has its own order.
        """

    @operation()
    def build_batches(self, run: Run, split: str, fetch: Any, sampler: Any) -> Any:
        """Return `Batches` for `split`: calls `fetch(indices, epoch, position)` in the order of `sampler`.

        Default: batches of 8 made in the loop's process. `sampler` is None for a stream (`Streamed` makes its batches).
        """

    @operation()
    def parameter_groups(self, run: Run) -> Any:
        """Return optimizer groups: dicts with "params", a list of (name, parameter), and any option.

        Default: two groups; the second holds biases and norms and sets `weight_decay` to 0.
        """

    @operation()
    def build_optimizer(self, run: Run, groups: Any) -> Any:
        """Return a `torch.optim.Optimizer` over `groups`, after all transforms. No default: name an optimizer."""

    @operation()
    def count_steps(self, run: Run) -> Any:
        """Return how many optimizer steps the run has. Default: [run] steps, or what its epochs make of the data.

        Who owns `plan_step` and takes other numbers of micro-batches than the fact "accumulation" owns this too.
        """

    @operation()
    def build_schedule(self, run: Run) -> Any:
        """Return a function from applied steps to the factor on each group's initial rate. Default: constant 1.

        Or a list of such functions, one a group. A pure function needs no state and cannot be advanced twice;
        `run.total_steps` is known.
        """

    @event()
    def assembled(self, run: Run) -> None:
        """Hear that everything is built, before resuming and step 0. Reset what the plugin keeps for a run here."""

    # --- the loop ------------------------------------------------------------------------------------------------

    @operation()
    def fit(self, run: Run) -> Any:
        """Run to the end. Wrap it to hold a resource: `with open(...) as self._file: return (yield)`."""

    @operation()
    def epoch(self, run: Run) -> Any:
        """Take steps until the epoch ends, the run is finished or a stop was agreed."""

    @operation(hot=True)
    def plan_step(self, run: Run) -> Any:
        """Return the next `Step` with its micro-batches from `run.stream`, or None at the end of the epoch.

        Default: as many as the fact "accumulation" says; the epoch's last step takes what is left.
        """

    @operation(hot=True)
    def train_step(self, step: Step) -> Any:
        """Do one optimizer step. The global generators were seeded from (seed, "step", number, rank)."""

    @operation(hot=True)
    def count_items(self, step: Step) -> Any:
        """Set `step.num_items` and `step.num_rows` (over all ranks) and each `micro.scale`.

        `micro.scale` times a micro-batch's mean loss, summed, is the step's loss: the sum over items divided by
        their number. Default: from the `num_items` the loader counted.
        """

    @operation(hot=True)
    def compute_gradients(self, step: Step) -> Any:
        """Leave the step's gradients in `.grad` and set `step.loss`; called again by what evaluates a step anew."""

    @operation(hot=True)
    def accumulate(self, step: Step) -> Any:
        """Run every micro-batch forward and backward. A micro-batch without target items is passed over.

        Wrapped by what needs gradients twice before anyone hears of them (SAM).
        """

    @operation(hot=True)
    def prepare(self, micro: Micro) -> Any:
        """Put `micro.batch` where the model is. Default: to `run.device`, without blocking. Also in evaluations."""

    @operation(hot=True)
    def forward(self, micro: Micro) -> Any:
        """Return the model's outputs for `micro.batch`; the loop stores them in `micro.outputs`.

        Default: `model(**batch)` for mappings, `model(*batch)` for tuples, else `model(batch)`. Also in evaluations.
        """

    @operation(hot=True)
    def compute_loss(self, micro: Micro) -> Any:
        """Return the 0-dim mean loss of `micro.outputs` times `micro.scale`. Default: the model's own loss.

        Also fired in evaluations, where the scale is 1.
        """

    @operation(hot=True)
    def backward(self, micro: Micro) -> Any:
        """Add the gradients of `micro.loss` to `.grad`. Default: `micro.loss.backward()`."""

    @event(hot=True)
    def gradients_ready(self, step: Step) -> None:
        """Hear that `.grad` is complete: the place to unscale, to reduce over ranks, to `step.skip(reason)`."""

    @operation(hot=True)
    def grad_norm(self, step: Step) -> Any:
        """Return the 2-norm of all gradients, 0-dim on the device. Only called where a plugin wants it."""

    @operation(hot=True)
    def clip_gradients(self, step: Step) -> Any:
        """Limit the gradients in place. Default: nothing, and no norm is measured."""

    @operation(hot=True)
    def optimizer_step(self, step: Step) -> Any:
        """Update the weights unless `step.skipped`. Default: `run.optimizer.step()`."""

    @operation(hot=True)
    def zero_grad(self, step: Step) -> Any:
        """Drop the gradients. Default: set them to None."""

    @event(hot=True)
    def step_end(self, step: Step) -> None:
        """Hear that a step is over; `run.progress` has moved. Ask here: `run.request_save("why")`."""

    # --- at a step boundary, in this order -----------------------------------------------------------------------

    @event()
    def log(self, run: Run, metrics: dict[str, float]) -> None:
        """Hear plain numbers at the log interval and after an evaluation (names start with the split)."""

    @operation()
    def agree(self, run: Run, votes: int) -> Any:
        """Return the votes (bits STOP, SAVE, EVALUATE) that all ranks act on. Default: the union over ranks."""

    @operation()
    def evaluate(self, run: Run, split: str) -> Any:
        """Return the metrics of `split` and leave model, gradients and streams as they were. No default."""

    @collect
    def metrics(self, run: Run, split: str) -> Any:
        """Return a list of `Metric`, fresh for this evaluation."""

    @event()
    def evaluated(self, run: Run, split: str, metrics: dict[str, float]) -> None:
        """Hear the metrics of an evaluation; before a save of the same step."""

    @operation()
    def save(self, run: Run, path: Path) -> Any:
        """Write a complete checkpoint at `path` or nothing, then fire `saved`. No default.

        What it writes is the state at the call; who writes in the background fires `saved` at a later step boundary.
        """

    @event()
    def saved(self, run: Run, path: Path | str) -> None:
        """Hear that the files at `path` (the URL as text, where it is a store's) are complete and valid."""

    @operation()
    def load(self, run: Run, path: Path | str | None) -> Any:
        """Restore the checkpoint at `path`, or the newest valid one of the run if None; return its path or None.

        No default. The kernel fires `loaded` afterwards, unless None was returned.
        """

    @event()
    def loaded(self, run: Run, path: Path | str) -> None:
        """Hear that the state at `path` has been restored."""

    @collect
    def export(self, run: Run) -> Any:
        """Return a list of `Exporter(format, write)`. Which formats there are depends on the run's plugins."""

    @event()
    def failed(self, run: Run, error: BaseException) -> None:
        """Hear that the run is ending with `error`, before the wrappers of `fit` unwind. Use no collective here."""
