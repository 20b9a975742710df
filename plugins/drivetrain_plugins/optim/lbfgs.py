"""L-BFGS (Liu & Nocedal 1989, https://doi.org/10.1007/BF01589116), by `torch.optim.LBFGS`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain.rng import derive_seed, global_seeder

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from drivetrain import Run, Step

SEARCHES = {"none": None, "strong-wolfe": "strong_wolfe"}


class _Skipped(Exception):  # noqa: N818 - no error: how an evaluation leaves torch's step
    """An evaluation of the loss asked to skip the step."""


@plugin(
    role="optim",
    conflicts=("clip", "lookahead", "neftune", "optimizer-in-backward"),
    example={"lr": 0.5, "max_iter": 2},
)
class LBFGS:
    """Update along quasi-Newton directions, with several evaluations of loss and gradients an update.

    It takes many steps on one batch and remembers how the gradient changed between them, so it is for losses that
    are the same function at each step: all rows in one batch, or nearly. Each evaluation goes through
    `compute_gradients` with the batch and the dropout of the step; the first one is the loop's own, whose loss is the
    one that is logged. An evaluation reads its loss on the host. There is one group of parameters, without decay.

    A step that is skipped in a later evaluation leaves weights and memory as they were before it. What changes
    gradients, weights or the loss between two evaluations (`clip`, `lookahead`, `neftune`) would make the memory
    wrong, and is refused.
    """

    lr: float = option(1.0, gt=0, lt=float("inf"), help="peak learning rate: the first length tried along a direction")
    max_iter: int = option(20, ge=1, help="directions an update takes, at most")
    max_eval: int | None = option(None, ge=1, help="evaluations an update makes, at most; None is 5/4 of max_iter")
    history_size: int = option(100, ge=1, help="how many changes are remembered, each as large as two models")
    tolerance_grad: float = option(1e-7, ge=0, help="an update ends where no gradient is larger than this")
    tolerance_change: float = option(1e-9, ge=0, help="an update ends where loss and weights change less than this")
    line_search: str = option("none", choices=tuple(SEARCHES), help="how far to go along a direction")
    _seed_globals: Callable[[int], object] = option(None, init=False)
    _prepared: bool = option(False, init=False)

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's parameters, in one group."""
        group = self._merged(groups)
        types = sorted({f"{p.dtype} on {p.device}" for _, p in group["params"]})
        limits = run.plan.hooks["clip_gradients"].owner
        problems = []
        if len(types) > 1:
            what = "lbfgs makes one vector of all parameters, so they must be of one type and on one device"
            problems.append(Problem(what, ", ".join(types), "give the model one type, or take another optimizer"))
        if limits not in (None, "drivetrain"):
            what = f"plugins 'lbfgs' and {limits!r} cannot be combined"
            received = "the loss is evaluated several times an update, and only the first gradients would be limited"
            problems.append(Problem(what, received, f"take out {limits!r}", kind="conflict"))
        if problems:
            raise ConfigError(problems)
        return torch.optim.LBFGS(
            [group], lr=self.lr, max_iter=self.max_iter, max_eval=self.max_eval, history_size=self.history_size,
            tolerance_grad=self.tolerance_grad, tolerance_change=self.tolerance_change,
            line_search_fn=SEARCHES[self.line_search],
        )  # fmt: skip

    @staticmethod
    def _merged(groups: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the groups as one; a decay of 0 is what L-BFGS does anyway."""
        options = [
            {k: v for k, v in group.items() if k != "params" and not (k == "weight_decay" and v == 0)}
            for group in groups
        ]
        if not groups:
            raise ConfigError([Problem("lbfgs has nothing to update: no parameter of the model takes gradients")])
        if any(one != options[0] for one in options) or any("weight_decay" in one for one in options):
            shown = "; ".join(str(one) for one in options)
            do = "take out the plugin that makes these groups, or take another optimizer"
            raise ConfigError([Problem("lbfgs has one group of parameters and no weight decay", shown, do)])
        return {**options[0], "params": [one for group in groups for one in group["params"]]}

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Look up what a step needs."""
        self._seed_globals = global_seeder(run.device)
        prepare = run.plan.hooks["prepare"]
        self._prepared = bool(prepare.wrappers) or prepare.owner != "drivetrain"

    @hookimpl(wrapper=True)
    def compute_gradients(self, step: Step) -> Generator[None, Any, Any]:
        """Leave batches as they came, where a plugin changes them in `prepare`: the next evaluation does so again."""
        batches = [micro.batch for micro in step.micros] if self._prepared else []
        result = yield
        for micro, batch in zip(step.micros, batches, strict=False):
            micro.batch = batch
        return result

    @hookimpl
    def optimizer_step(self, step: Step) -> None:
        """Update the weights, evaluating anew where the search asks for it, unless the step is or gets skipped."""
        if step.skipped is not None:
            return
        run, optimizer = step.run, step.run.optimizer
        before = _Before(run.parameters, optimizer)
        first, several = step.loss, run.world_size > 1
        seed = derive_seed(run.settings.seed, "step", run.progress.step, run.rank)
        there = True  # the loop has just computed the gradients of these weights

        def evaluate() -> torch.Tensor:
            nonlocal there
            if there:
                there = False
            else:
                run.hooks.zero_grad(step)
                self._seed_globals(seed)
                run.hooks.compute_gradients(step)
            loss: torch.Tensor = step.loss
            skipped = step.skipped is not None
            if several:  # each rank's loss is its share, and all must go the same way
                both = torch.stack([loss.detach().to(torch.float64), loss.new_tensor(skipped, dtype=torch.float64)])
                torch.distributed.all_reduce(both)
                loss, skipped = both[0], bool(both[1])
            if skipped:
                raise _Skipped
            return loss

        try:
            optimizer.step(evaluate)
        except _Skipped:
            before.restore(optimizer)
            if step.skipped is None:
                step.skip("another rank asked")
        step.loss = first


class _Before:
    """Weights and memory before an update, for one that is taken back."""

    def __init__(self, parameters: tuple[torch.nn.Parameter, ...], optimizer: torch.optim.Optimizer) -> None:
        self._weights = [(p, p.detach().clone()) for p in parameters]
        self._state = {p: {k: _kept(v) for k, v in entry.items()} for p, entry in optimizer.state.items()}

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            for parameter, weights in self._weights:
                parameter.copy_(weights)
        optimizer.state.clear()
        optimizer.state.update(self._state)


def _kept(value: Any) -> Any:
    """Return what stays as it is: L-BFGS writes into its last gradient, and its lists grow and shrink."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return list(value) if isinstance(value, list) else value
