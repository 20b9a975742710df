"""Gradient noise that fades (Neelakantan et al. 2015, https://arxiv.org/abs/1511.06807)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from drivetrain import hookimpl, option, plugin

if TYPE_CHECKING:
    from drivetrain import Run, Step


@plugin(role="optim", conflicts=["lomo", "adalomo", "optimizer-in-backward"], example={"eta": 0.01})
class GradientNoise:
    """Add Gaussian noise of variance eta / (1 + t)^gamma to the gradients; t counts updates.

    The noise is drawn on the device from a stream of its own, for the step and in the parameters' order: it is the same
    on all ranks, and the same when a step's gradients are computed twice.
    """

    eta: float = option(0.01, gt=0, lt=float("inf"), help="variance of the first step's noise")
    gamma: float = option(0.55, ge=0, lt=float("inf"), help="how fast the variance falls")
    _draws: Any = option(None, init=False)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Make the generator."""
        self._draws = torch.Generator(run.device)

    @hookimpl
    def gradients_ready(self, step: Step) -> None:
        """Add the noise."""
        if step.skipped is not None:
            return
        run, draws = step.run, self._draws
        draws.manual_seed(run.seed_for("gradient-noise", step.number))
        deviation = math.sqrt(self.eta / (1 + run.progress.applied) ** self.gamma)
        gradients = [p.grad for p in run.parameters if p.grad is not None]
        noise = [torch.randn(g.shape, generator=draws, dtype=g.dtype, device=g.device) for g in gradients]
        torch._foreach_add_(gradients, noise, alpha=deviation)
