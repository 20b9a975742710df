"""bfloat16 autocast: float32 weights, bfloat16 matrix products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import hookimpl, option, plugin

if TYPE_CHECKING:
    from collections.abc import Generator

    from drivetrain import Micro, Run


@plugin(role="precision", provides=["precision"], conflicts=["precision"])
class BF16:
    """Run forward and loss under bfloat16 autocast; weights, gradients and optimizer state stay float32."""

    _device: str = option("cpu", init=False)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Remember the device type."""
        self._device = run.device.type

    @hookimpl(wrapper=True)
    def forward(self, micro: Micro) -> Generator[None, Any, Any]:  # noqa: ARG002
        """Autocast the model."""
        with torch.autocast(self._device, torch.bfloat16):
            return (yield)

    @hookimpl(wrapper=True)
    def compute_loss(self, micro: Micro) -> Generator[None, Any, Any]:  # noqa: ARG002
        """Autocast the loss; torch keeps the operations that need it in float32."""
        with torch.autocast(self._device, torch.bfloat16):
            return (yield)
