"""An evaluation before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain.loop import evaluate

if TYPE_CHECKING:
    from collections.abc import Generator

    from drivetrain import Run


@plugin(role="evaluate", effect="observes", requires=["evaluation"])
class EvaluateOnStart:
    """Evaluate before the first step, to find out what fails before hours of training, and to have a number to beat."""

    on_resume: bool = option(False, help="evaluate a run that goes on from a checkpoint, too, before it does")
    _begun: bool = option(False, init=False)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Forget the run before, and refuse to evaluate twice.

        Raises:
            ConfigError: the plugin that evaluates does so at the start already.
        """
        self._begun = False
        twice = [name for name, plugin in run.plugins.items() if getattr(plugin, "at_start", False) is True]
        if twice:
            what = f"evaluate-on-start and {twice[0]} would both evaluate before the first step"
            raise ConfigError([Problem(what, f"{twice[0]}: at_start = true", "take one of the two out")])

    @hookimpl(wrapper=True, trylast=True)  # within `fit`: logs are open, and a failure is told to `failed`
    def epoch(self, run: Run) -> Generator[None, Any, Any]:
        """Evaluate the sets that the run evaluates before its first epoch."""
        first, self._begun = not self._begun, True
        if first and (run.progress.step == 0 or self.on_resume):
            for split in run.evaluated:
                evaluate(run, split)
        return (yield)
