"""Gradient clipping by global norm (Pascanu et al. 2013, https://arxiv.org/abs/1211.5063)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from drivetrain import hookimpl, option, plugin

if TYPE_CHECKING:
    from drivetrain import Step


@plugin(role="optim", example={"norm": 0.1})
class Clip:
    """Scale the gradients down to a total 2-norm, and log that norm."""

    norm: float = option(1.0, gt=0, help="largest total norm; larger gradients are scaled to it")

    @hookimpl
    def clip_gradients(self, step: Step) -> None:
        """Scale by min(1, norm / (total + 1e-6)) on the device, as `torch.nn.utils.clip_grad_norm_` does."""
        if step.skipped is not None:
            return
        step.grad_norm = total = step.run.hooks.grad_norm(step)
        factor = torch.clamp(self.norm / (total + 1e-6), max=1.0)
        torch._foreach_mul_([p.grad for p in step.run.parameters if p.grad is not None], factor)
