"""Updating each parameter as soon as its gradient is there, so that no two gradients are alive at once.

A parameter's own optimizer is a twin of the run's: an object of the same class with the same options and the very same
state, whose one group holds that parameter. So the run's optimizer has all of the state, to be saved and resumed as
ever, and the rates that the loop writes into its groups are those of the updates.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from drivetrain import ConfigError, Problem, Step, hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from drivetrain import Run

# What needs all gradients of a step at once, more than one backward for an update, or an update that can be left out.
# Plugins that are not named here are found by what they act on (`refuse_whole_gradients`).
CONFLICTS = (
    "accumulation", "data-parallel", "clip", "sam", "gradient-noise", "nan-guard", "spike-skip", "fp16", "grad-scaler",
    "lbfgs", "lomo", "adalomo",
)  # fmt: skip
WHOLE = ("clip_gradients", "grad_norm", "gradients_ready", "compute_gradients", "accumulate")


class OneBackward:
    """The hooks of a plugin whose backward passes update; a base class of it. It owns the rest of a step."""

    @hookimpl
    def plan_step(self, run: Run) -> Step | None:
        """Take one micro-batch: each backward pass updates, so accumulation would have nothing to add to."""
        micro = next(run.stream, None) if run.stream is not None else None
        return None if micro is None else Step(run, run.progress.step, [micro])

    @hookimpl
    def optimizer_step(self, step: Step) -> None:
        """Do nothing: the backward pass has updated."""

    @hookimpl
    def zero_grad(self, step: Step) -> None:
        """Do nothing: each gradient was freed after its update."""


class Layerwise:
    """The hooks of a plugin with the option `layerwise`, by which its backward passes update; a base class of it."""

    NAME: ClassVar[str]
    layerwise: bool
    _updates: InBackward | None = None

    @property
    def conflicts(self) -> tuple[str, ...]:
        """Layer-wise, gradients are never there all at once."""
        return (*CONFLICTS, "optimizer-in-backward") if self.layerwise else ()

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Refuse, layer-wise, what needs all gradients at once."""
        self._updates = InBackward(run, self.NAME) if self.layerwise else None

    @hookimpl(wrapper=True)
    def fit(self, run: Run) -> Generator[None, Any, Any]:  # noqa: ARG002 - the hook's argument
        """Update in the backward pass, if asked to; then the optimizer finds no gradient and does nothing."""
        with contextlib.nullcontext() if self._updates is None else self._updates.acting():
            return (yield)


class InBackward:
    """A run's optimizer, taken apart to be stepped a parameter at a time.

    Args:
        run: assembled.
        plugin: whose name an error has.

    Raises:
        ConfigError: a plugin of the run needs all gradients at once, or the optimizer does: of each group, copies of
            the smallest parameter are updated, alone and beside another, and must come out the same.
    """

    def __init__(self, run: Run, plugin: str) -> None:
        """Refuse what cannot be right."""
        refuse_whole_gradients(run, plugin)
        self._run = run
        owner = run.plan.hooks["build_optimizer"].owner
        self._counts = [
            [_counts(plugin, owner, inner, group) for group in inner.param_groups] for inner in _parts(run.optimizer)
        ]
        self._counting: list[list[_Update]] = []

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """Let backward passes update, as long as the context lasts; no state may be loaded in it."""
        with contextlib.ExitStack() as hooks:
            hooks.callback(self._counting.clear)
            for inner, counts in zip(_parts(self._run.optimizer), self._counts, strict=True):
                for group, counted in zip(inner.param_groups, counts, strict=True):
                    updates = [_Update(inner, group, p) for p in group["params"]]
                    for update in updates:
                        hooks.callback(hooked(update.p, update.p.register_post_accumulate_grad_hook, update).remove)
                    if counted:
                        self._counting.append(updates)
            yield

    def count(self) -> None:
        """Move what groups count, when all of their parameters are updated."""
        for updates in self._counting:
            taken = next((update for update in updates if update.taken), updates[0])
            if not taken.taken:  # no parameter of the group had a gradient
                taken.take()
            taken.group.update({name: value for name, value in taken.own.items() if name != "params"})
            for update in updates:
                update.taken = False


class _Update:
    """The update of one parameter, by a twin of the optimizer that has the parameter alone."""

    def __init__(self, optimizer: torch.optim.Optimizer, group: dict[str, Any], p: torch.Tensor) -> None:
        self.group, self.p, self.taken = group, p, False
        self._alone = [p]
        self.own = {**group, "params": self._alone}
        self._step = _twin(optimizer, self.own).step

    def __call__(self, p: torch.Tensor) -> None:
        self.take()
        p.grad = None

    def take(self) -> None:
        own, group = self.own, self.group
        own.update(group)  # the step's rate, and whatever else may be scheduled
        own["params"] = self._alone
        for name, value in group.items():  # each parameter counts from where the group stands
            if isinstance(value, torch.Tensor):
                own[name] = value.clone()
        self._step()
        self.taken = True


def hooked(p: torch.Tensor, register: Callable[[Any], Any], hook: Callable[..., Any]) -> Any:
    """Return the handle of a hook of `p`, which may be frozen now and trained later."""
    trained = p.requires_grad
    p.requires_grad_(True)
    handle = register(hook)
    p.requires_grad_(trained)
    return handle


def _parts(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, ...]:
    """Return the optimizers of a composite, or the one."""
    parts: tuple[torch.optim.Optimizer, ...] = getattr(optimizer, "optimizers", (optimizer,))
    return parts


def _twin(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> torch.optim.Optimizer:
    """Return an optimizer that has all of `optimizer` but its groups."""
    twin = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer))
    twin.param_groups = [group]
    return twin


def _counts(plugin: str, owner: str | None, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Tell whether a step moves something in its group, beside the state of parameters.

    Raises:
        ConfigError: updates of one parameter alone and beside another are not the same.
    """
    name = type(optimizer).__name__
    try:
        with torch.random.fork_rng(devices=[]):
            alone, moved, numbered = _tried(optimizer, group, beside=False)
            among, _, _ = _tried(optimizer, group, beside=True)
    except Exception as error:
        raise _refused(plugin, owner, f"{name}.step raised {type(error).__name__}: {error}") from error
    if numbered:
        raise _refused(plugin, owner, f"a step of {name} changes {numbered} for all parameters")
    if any(_differ(alone.get(key), among.get(key)) for key in alone.keys() | among.keys()):
        raise _refused(plugin, owner, f"what {name} does to a parameter depends on the parameters beside it")
    return moved


def _tried(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], *, beside: bool
) -> tuple[dict[str, Any], bool, list[str]]:
    """Take some steps with a copy of the group's smallest parameter, alone or beside one of other gradients.

    Returns:
        The copy and the group's options afterwards; whether those options moved; the optimizer's own numbers that did.
    """
    p = min(group["params"], key=torch.Tensor.numel)
    copies = [torch.nn.Parameter(p.detach().clone()) for _ in range(1 + beside)]
    own = {**group, "params": copies}
    own.update({name: value.clone() for name, value in group.items() if isinstance(value, torch.Tensor)})
    twin, before = _twin(optimizer, own), copy.deepcopy({k: v for k, v in own.items() if k != "params"})
    twin.state = defaultdict(dict, {made: copy.deepcopy(optimizer.state.get(p, {})) for made in copies})
    numbers, moved = _numbers(twin), False
    gradient = torch.linspace(-1, 2, p.numel(), device=p.device).to(p.dtype).reshape(p.shape)
    for factor in (1.0, -0.5, 2.0, 1.5, -1.0, 0.1, -0.2, 0.3):
        for place, made in enumerate(reversed(copies)):
            made.grad = (gradient * factor).cos() * 3 if place else gradient * factor
        twin.step()
        moved |= any(_differ(own.get(k), before.get(k)) for k in own.keys() | before.keys() if k != "params")
    numbered = [k for k, value in _numbers(twin).items() if numbers.get(k) != value]
    return {**own, "params": copies[-1].detach()}, moved, numbered


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return not torch.equal(one.nan_to_num(), other.nan_to_num())
    return bool(one != other)


def _numbers(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {k: v for k, v in vars(optimizer).items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def _refused(plugin: str, owner: str | None, received: str) -> ConfigError:
    what = f"{plugin!r} updates each parameter by itself, which {owner!r} cannot"
    return ConfigError([Problem(what, received, f"take out {plugin!r}, or choose another optimizer", kind="conflict")])


def refuse_whole_gradients(run: Run, plugin: str) -> None:
    """Refuse plugins that need what layer-wise updates do not have: all gradients at once, or a step to be skipped.

    Raises:
        ConfigError: some do; all of them are named.
    """
    found: dict[str, str] = {}
    for hook in WHOLE:
        acting = run.plan.hooks[hook]
        for name in (acting.owner, *acting.wrappers, *acting.listeners):
            if name in run.plugins and (name == acting.owner or getattr(run.plugins[name], "effect", "") == "changes"):
                found.setdefault(name, f"{name!r} acts on {hook!r}")
    for name, other in run.plugins.items():
        facts = getattr(other, "facts", {})
        if facts.get("may_skip", False):
            found[name] = f"{name!r} may skip an update, which has been made when it decides"
        if facts.get("accumulation", 1) > 1:
            found[name] = f"{name!r} makes a step of {facts['accumulation']} backward passes"
    found.pop(plugin, None)
    if run.world_size > 1:
        raise ConfigError([Problem(f"{plugin!r} updates before gradients are reduced", f"{run.world_size} ranks")])
    if found:
        what = f"{plugin!r} updates each parameter in the backward pass and frees its gradient"
        problems = [
            Problem(
                f"{what}, so it cannot be combined with {name!r}",
                reason,
                f"take out {plugin!r} or {name!r}",
                kind="conflict",
            )
            for name, reason in found.items()
        ]
        raise ConfigError(problems)
