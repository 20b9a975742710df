"""Freezing parameters by name, for the whole run or up to a moment of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain.errors import nearest
from drivetrain_plugins.optim import _names
from drivetrain_plugins.optim._moment import Moment

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from drivetrain import Run, Step

log = logging.getLogger("drivetrain")


@attrs.define
class _Stage:
    """What is unfrozen at one moment."""

    pattern: str
    moment: Moment
    names: list[str] = attrs.field(factory=list)
    parameters: list[Any] = attrs.field(factory=list)


def _stage(entry: Any) -> _Stage:
    """Read one entry of `until`."""
    if not isinstance(entry, dict) or not isinstance(entry.get("pattern"), str) or "at" not in entry:
        raise ValueError(f'until is a list of {{pattern = "...", at = "500 steps"}}. Received: {entry!r}')
    if unknown := sorted(entry.keys() - {"pattern", "at"}):
        raise ValueError(f"until has no key {unknown[0]!r}: {nearest(unknown[0], ('pattern', 'at'))}")
    return _Stage(entry["pattern"], Moment.parse(entry["at"]))


def _cannot_join(group: dict[str, Any]) -> bool:
    """Tell whether torch's kernel wants the momentum of all parameters of a group, or of none."""
    return bool(group.get("fused") and group.get("momentum"))


@plugin(role="optim", example={"freeze": ["*embed*"], "until": [{"pattern": "*embed*", "at": "3 steps"}]})
class Freeze:
    """Freeze parameters by name, and unfreeze them at given moments of the run.

    A pattern is a glob on the names that parameters have in the model as it was built, before any other plugin changes
    it; one that matches a module's name stands for all that is in it. Frozen are those that `freeze` matches (all, if
    only `train` is given), without those that `train` matches. A parameter that is unfrozen later is in the optimizer
    from the start, with all its options, and without gradient until then: it neither moves nor decays, and is in no
    gradient norm. One that never is, is not in it. What is frozen is a function of the run's progress, so it is the
    same after resuming. At the end of `fit` the model gets the flags back that it came with.
    """

    freeze: tuple[str, ...] = option((), converter=_names.parse, help=f"what to freeze: {_names.HELP}")
    train: tuple[str, ...] = option((), converter=_names.parse, help="what to train nevertheless, or alone: such globs")
    until: tuple[dict[str, Any], ...] = option(
        (), converter=tuple, help='what to unfreeze, and when: {pattern, at}; at: "500 steps", "1 epoch", 0.1 of all'
    )
    eval_frozen: bool = option(
        False, help="keep modules of which all is frozen in eval mode: their BatchNorm and dropout stand still"
    )
    _stages: list[_Stage] = option(factory=list, init=False)
    _pending: list[_Stage] = option(factory=list, init=False)
    _frozen: list[str] = option(factory=list, init=False)
    _given: dict[str, bool] = option(factory=dict, init=False)  # the flags the model came with
    _held: Any = option(None, init=False)  # the model whose flags they are
    _resting: list[Any] = option(factory=list, init=False)  # modules that are in eval mode because of this plugin

    def __attrs_post_init__(self) -> None:
        """Read the moments, so that what is wrong with one is told before a run."""
        if not self.freeze and not self.train:
            raise ValueError("freeze needs patterns, in freeze or in train. Received: none")
        self._stages = [_stage(entry) for entry in self.until]

    # --- assembly ------------------------------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def build_model(self, run: Run) -> Generator[None, Any, Any]:
        """Freeze for good what is never unfrozen; the rest stays as it is until all is assembled.

        It is done here so that whoever spreads the model over ranks later sees what will have no gradients.
        """
        del run
        model = yield
        if model is self._held:  # it was assembled before, and never fitted
            self._give_back(model)
        parameters = _names.named_parameters(model)
        self._choose(list(parameters), {name for name, p in parameters.items() if p.requires_grad})
        self._held, self._given = model, {name: p.requires_grad for name, p in parameters.items()}
        later = {name for stage in self._stages for name in stage.names}
        for name in self._frozen:
            parameters[name].requires_grad_(name in later)
        return model

    @hookimpl(trylast=True)  # who puts hooks on parameters that are trained has found them by now
    def assembled(self, run: Run) -> None:
        """Freeze what is unfrozen later.

        Raises:
            ConfigError: something of it is not in the optimizer, because another plugin froze it; or the optimizer
                cannot take parameters up later.
        """
        parameters = _names.named_parameters(run.model)
        updated = {id(p) for p in run.parameters}
        for stage in self._stages:
            stage.parameters = [parameters[name] for name in stage.names if name in parameters]
            lost = [name for name in stage.names if name not in parameters or id(parameters[name]) not in updated]
            if lost:
                what = f"freeze: {stage.pattern!r} cannot be unfrozen: another plugin of the run froze or replaced it"
                raise ConfigError([Problem(what, ", ".join(lost[:5]), "take the entry out of until")])
        groups = run.optimizer.param_groups
        if self._stages and isinstance(run.optimizer, torch.optim.SGD) and any(_cannot_join(g) for g in groups):
            what = f"freeze: until cannot be combined with {run.plan.hooks['build_optimizer'].owner!r} as it is set"
            received = "torch's fused SGD with momentum, which fails when parameters get their first gradient later"
            raise ConfigError([Problem(what, received, "set its option fused = false", kind="conflict")])
        self._follow(run)

    @hookimpl
    def loaded(self, run: Run, path: Path) -> None:
        """Freeze what is frozen where the run goes on."""
        del path
        self._follow(run)

    # --- the run -------------------------------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def fit(self, run: Run) -> Generator[None, Any, Any]:
        """Give the flags and modes back at the end."""
        self._rest(run)
        try:
            return (yield)
        finally:
            self._wake()
            self._give_back(run.model)

    @hookimpl
    def step_end(self, step: Step) -> None:
        """Unfreeze what is due."""
        if self._pending:
            self._unfreeze(step.run)

    # --- the parts -----------------------------------------------------------------------------------------------

    def _choose(self, names: list[str], trainable: set[str]) -> None:
        """Find out what is frozen and what each stage unfreezes.

        Raises:
            ConfigError: a pattern matches nothing, or nothing is left to train.
        """
        spared = {name for pattern in self.train for name in _names.select(pattern, names, "freeze")}
        picked = {name for pattern in self.freeze for name in _names.select(pattern, names, "freeze")}
        self._frozen = [name for name in names if (name in picked or not self.freeze) and name not in spared]
        if not trainable - set(self._frozen):
            received = f"freeze={list(self.freeze)}, train={list(self.train)}"
            do = "name fewer in freeze, or what is to be trained in train"
            raise ConfigError([Problem("freeze: no parameter would be trained from the first step on", received, do)])
        taken: set[str] = set()
        for stage in self._stages:
            stage.names = [name for name in _names.select(stage.pattern, self._frozen, "freeze") if name not in taken]
            taken.update(stage.names)
            if not stage.names:
                what = "freeze: an entry of until has nothing left to unfreeze: entries above it have it all"
                raise ConfigError([Problem(what, repr(stage.pattern), "take it out, or put it above them")])

    def _follow(self, run: Run) -> None:
        """Set the flags that belong to where the run stands."""
        self._pending = []
        for stage in self._stages:
            trained = stage.moment.start(run).passed(run)
            self._set(stage, trained=trained)
            if not trained:
                self._pending.append(stage)

    def _unfreeze(self, run: Run) -> None:
        """Train what is due."""
        due = [stage for stage in self._pending if stage.moment.passed(run)]
        for stage in due:
            self._set(stage, trained=True)
            self._pending.remove(stage)
            log.info("freeze: %r is trained from step %d on", stage.pattern, run.progress.step)
        if due:
            self._rest(run)

    @staticmethod
    def _set(stage: _Stage, *, trained: bool) -> None:
        for parameter in stage.parameters:
            parameter.requires_grad_(trained)

    def _give_back(self, model: torch.nn.Module) -> None:
        for name, parameter in _names.named_parameters(model).items():
            if name in self._given:
                parameter.requires_grad_(self._given[name])
        self._held, self._given = None, {}

    def _rest(self, run: Run) -> None:
        """Put modules without anything to train into eval mode, if asked to."""
        self._wake()
        if not self.eval_frozen:
            return
        for module in run.model.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                self._resting += [part for part in module.modules() if part.training]
                module.eval()

    def _wake(self) -> None:
        for module in self._resting:
            module.training = True
        self._resting = []
