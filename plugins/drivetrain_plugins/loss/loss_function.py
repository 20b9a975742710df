"""A loss that the user wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import ConfigError, Problem, TrainingError, hookimpl, import_object, option, plugin
from drivetrain.data import count_labels, count_shifted_labels
from drivetrain_plugins.loss._labels import withheld
from drivetrain_plugins.shared.causal import shifts_labels

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from drivetrain import Micro, Run


@attrs.frozen
class Counted:
    """Call the user's count."""

    count: Callable[[Any], Any]

    def __call__(self, batch: Any) -> int:
        """Return the number of items.

        Raises:
            TrainingError: it is no whole number.
        """
        number = self.count(batch)
        number = number.item() if isinstance(number, torch.Tensor) else number
        if not isinstance(number, int) or number < 0:
            raise TrainingError(f"loss-function: count must return a whole number of items. Received: {number!r}")
        return number


@plugin(role="loss", example={"function": "kit_module:loss"}, rows="tokens")
class LossFunction:
    """Call a function of the model's outputs and the batch that returns the mean loss over the batch's items.

    What the items are says `count`; without it they are the labels that are not -100 (without the first of each row
    where the model's own loss shifts them), or the rows where labels are no integers or there are none.
    """

    function: Any = option(help='f(outputs, batch) -> 0-dim mean loss, as "package.module:name" or the function itself')
    count: Any = option(None, help="f(batch) -> number of items the mean is over, given like the function")
    withhold: tuple[str, ...] = option(("labels",), help="fields that are kept from the model; the function gets them")
    _function: Any = option(None, init=False)

    @hookimpl
    def build_count(self, run: Run) -> Callable[[Any], int | None]:
        """Take the user's count, or count labels."""
        self._function = self._callable(self.function, "function")
        if self.count is not None:
            return Counted(self._callable(self.count, "count"))
        return count_shifted_labels if shifts_labels(run) else count_labels

    @staticmethod
    def _callable(given: Any, name: str) -> Callable[..., Any]:
        found: Any = import_object(given, plugin="loss-function") if isinstance(given, str) else given
        if not callable(found):
            do = 'give a function, or "package.module:name" of one'
            raise ConfigError([Problem(f"loss-function: {name} must be callable", repr(found)[:200], do)])
        return found  # type: ignore[no-any-return]

    @hookimpl(wrapper=True)
    def forward(self, micro: Micro) -> Generator[None, Any, Any]:
        """Keep from the model what is the function's."""
        return (yield from withheld(micro, *self.withhold))

    @hookimpl
    def compute_loss(self, micro: Micro) -> torch.Tensor:
        """Weigh the function's mean."""
        loss = self._function(micro.outputs, micro.batch)
        if not isinstance(loss, torch.Tensor) or loss.ndim:
            received = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise TrainingError(f"loss-function: the function must return a 0-dim tensor, a mean. Received: {received}")
        weighed: torch.Tensor = loss * micro.scale
        return weighed
