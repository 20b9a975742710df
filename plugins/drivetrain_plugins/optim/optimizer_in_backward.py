"""Layer-wise updates: the optimizer runs inside the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._in_backward import CONFLICTS, InBackward, OneBackward

if TYPE_CHECKING:
    from collections.abc import Generator

    from drivetrain import Run, Step


@plugin(role="optim", conflicts=CONFLICTS)
class OptimizerInBackward(OneBackward):
    """Update each parameter as soon as its gradient is there and free it, so that one gradient is alive at a time.

    The weights are those of the same optimizer without this plugin, bit for bit, and so is the saved state. It works
    with every optimizer whose update of a parameter needs that parameter's gradient and state alone, which is tried on
    copies of parameters; others are refused when the run is assembled. A step is one micro-batch.
    """

    _updates: Any = option(None, init=False)

    @hookimpl(trylast=True)  # the optimizer has its last options by now
    def assembled(self, run: Run) -> None:
        """Refuse who needs all gradients at once, and an optimizer that cannot update one parameter alone.

        Raises:
            ConfigError: naming all of them.
        """
        self._updates = InBackward(run, "optimizer-in-backward")

    @hookimpl(wrapper=True)
    def fit(self, run: Run) -> Generator[None, Any, Any]:  # noqa: ARG002 - the hook's argument
        """Register the hooks of the parameters, and remove them when the run ends or fails."""
        with self._updates.acting():
            return (yield)

    @hookimpl
    def optimizer_step(self, step: Step) -> None:
        """Let the optimizer count the step, where it counts by group: the backward pass has updated."""
        if step.skipped is None:
            self._updates.count()
