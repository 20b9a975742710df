"""Lookahead (Zhang, Lucas, Hinton & Ba 2019, https://arxiv.org/abs/1907.08610)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._averages import Averages

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from drivetrain import Run, Step


@plugin(
    role="optim",
    example={"k": 2, "alpha": 0.5},
)
class Lookahead:
    """Let the optimizer run ahead, and every k updates move slow weights towards where it came.

    After each k-th update that was applied: slow += alpha (fast - slow), and fast = slow. The optimizer's own state
    (momentum) goes on. Slow weights of half-precision parameters are kept in float32. They start as the run's first
    weights, and belong to its state.
    """

    k: int = option(5, ge=1, help="updates between two moves of the slow weights")
    alpha: float = option(0.5, gt=0, le=1, help="how far the slow weights move towards the fast ones")
    _slow: Averages = option(None, init=False)
    _updates: int = option(0, init=False)
    _restored: bool = option(False, init=False)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Start from the run's weights."""
        self._slow, self._updates, self._restored = Averages.of_parameters(run), 0, False

    @hookimpl
    def loaded(self, run: Run, path: Path) -> None:
        """Start from the weights that were loaded, where no slow ones were: the run had no lookahead then."""
        del path
        if not self._restored:
            self._slow, self._updates = Averages.of_parameters(run), 0

    @hookimpl(wrapper=True)
    def optimizer_step(self, step: Step) -> Generator[None, Any, Any]:
        """Move the slow weights after every k-th update."""
        result = yield
        if step.skipped is None:
            self._updates += 1
            if self._updates % self.k == 0:
                self._slow.lerp(self.alpha)
                self._slow.write()
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the slow weights and the number of updates."""
        return {"updates": self._updates, "slow": self._slow.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._updates, self._restored = int(state["updates"]), True
        self._slow.load_state_dict(state["slow"])
