"""Adafactor (Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235), by `torch.optim.Adafactor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._groups import with_decay
from drivetrain_plugins.optim._torch import implementation

if TYPE_CHECKING:
    from drivetrain import Run


@plugin(role="optim", example={"lr": 0.05, "weight_decay": 0.1})
class Adafactor:
    """Update with squared gradients kept as one mean a row and one a column: little memory.

    This is torch's Adafactor, not that of `transformers`, and its `lr` means something else. An update is scaled by
    the root mean square of its parameter (at least the second eps), as with `scale_parameter=True` there, and the rate
    of update t is at most 1 / sqrt(t), as with `relative_step=True`; neither can be turned off. So `lr` is a share of
    a parameter's size, and the 1e-3 that goes with `scale_parameter=False` is not its counterpart. The first eps
    bounds the estimate instead of being added to squared gradients, and there is no first moment.

    Each update reads norms on the host, several a parameter: on a GPU it waits for them.
    """

    lr: float = option(0.01, gt=0, lt=float("inf"), help="peak learning rate, relative to a parameter's size")
    beta2_decay: float = option(-0.8, le=0, gt=float("-inf"), help="update t counts t ** beta2_decay in the means")
    eps: tuple[float | None, float] = option(
        (None, 1e-3), ge=0, lt=float("inf"), help="bounds from below of the estimate (None: by type) and the size"
    )
    d: float = option(1.0, ge=1, lt=float("inf"), help="largest root mean square of an update before the rate")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="decoupled decay; biases and norms are spared")
    foreach: bool | None = option(None, help="one call an operation for all parameters; None leaves it to the device")

    def __attrs_post_init__(self) -> None:
        """Refuse bounds of another number."""
        if len(self.eps) != 2 or self.eps[1] is None:  # noqa: PLR2004
            raise ValueError(f"eps must be a number or None, and a number. Received: {self.eps!r}")

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        groups = with_decay(groups, self.weight_decay)
        chosen = implementation("adafactor", run, groups, foreach=self.foreach)
        eps = (self.eps[0], self.eps[1])
        return torch.optim.Adafactor(groups, lr=self.lr, beta2_decay=self.beta2_decay, eps=eps, d=self.d, **chosen)
