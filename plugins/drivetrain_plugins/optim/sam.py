"""Sharpness-aware minimisation (Foret et al. 2021, arXiv:2010.01412), and its adaptive form (Kwon et al. 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import hookimpl, option, plugin
from drivetrain.rng import derive_seed, global_seeder

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from drivetrain import Run, Step

TINY = 1e-12  # keeps the perturbation finite where all gradients are zero


@plugin(
    role="optim",
    # They update weights during the backward pass, or call it several times for one step.
    conflicts=["sam", "lomo", "adalomo", "optimizer-in-backward", "lbfgs"],
    example={"rho": 0.5},
)
class SAM:
    """Take the gradients where the loss is highest near the weights (SAM): two passes for each step.

    The weights w are moved to w + rho g / |g|, g being the gradient of the whole step and |g| its total norm; the
    gradient there is the step's, and w is put back from a copy, bit for bit. With `adaptive`, it is
    w + rho T² g / |T g| with T = |w| + eta, element by element (ASAM, https://arxiv.org/abs/2102.11600), which
    rescaling the weights does not change; rho is then larger, 0.5 to 2.

    Both passes are all micro-batches of the step, whose gradients are added up before weights move, so accumulation,
    clipping, loss scaling and guards see one gradient, the second; the first one may carry any loss scale, as the
    perturbation does not depend on it. Both see the same batches and, because the global generators are seeded again,
    the same dropout. `step.loss` is the loss at w, and buffers (BatchNorm's statistics) are left as the first pass
    left them. All hooks inside `accumulate` are fired twice for each step. Where ranks reduce gradients
    within the backward pass, the perturbation is that of the global gradient, else each rank's own (the paper's
    m-sharpness).
    """

    rho: float = option(0.05, gt=0, lt=float("inf"), help="radius of the neighbourhood")
    adaptive: bool = option(False, help="measure the radius relative to each weight's size (ASAM)")
    eta: float = option(0.01, ge=0, lt=float("inf"), help="adaptive: added to each weight's size")
    _inside: bool = option(False, init=False)  # the second pass is on
    _weights: list[torch.Tensor] = option(factory=list, init=False)
    _buffers: list[torch.Tensor] = option(factory=list, init=False)
    _seed: Callable[[int], object] = option(None, init=False)
    _prepared: bool = option(False, init=False)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Find what a step needs."""
        self._inside, self._seed = False, global_seeder(run.device)
        self._weights = [torch.empty_like(p, requires_grad=False) for p in run.parameters]
        self._buffers = list(run.model.buffers())
        prepare = run.plan.hooks["prepare"]
        self._prepared = bool(prepare.wrappers) or prepare.owner != "drivetrain"

    @hookimpl(wrapper=True)
    def accumulate(self, step: Step) -> Generator[None, Any, Any]:
        """Compute the gradients twice, at the weights and at the perturbed ones."""
        if self._inside:
            return (yield)
        # Whoever changes batches in `prepare` is given them as they came again; moved ones need not move twice.
        batches = [micro.batch for micro in step.micros] if self._prepared else []
        result = yield
        if step.skipped is None and any(p.grad is not None for p in step.run.parameters):
            for micro, batch in zip(step.micros, batches, strict=False):
                micro.batch = batch
            self._second_pass(step)
        return result

    def _second_pass(self, step: Step) -> None:
        run, loss = step.run, step.loss
        losses = [micro.loss for micro in step.micros]
        parameters: list[torch.Tensor] = list(run.parameters)
        buffers = [buffer.clone() for buffer in self._buffers]
        self._inside = True
        with torch.no_grad():
            torch._foreach_copy_(self._weights, parameters)
        try:
            self._perturb(step)
            for parameter in parameters:
                parameter.grad = None
            self._seed(derive_seed(run.settings.seed, "step", step.number, run.rank))
            run.hooks.accumulate(step)
        finally:
            self._inside = False
            with torch.no_grad():
                torch._foreach_copy_(parameters, self._weights)
                for buffer, before in zip(self._buffers, buffers, strict=True):
                    buffer.copy_(before)
        step.loss = loss
        for micro, first in zip(step.micros, losses, strict=True):
            micro.loss = first

    @torch.no_grad()
    def _perturb(self, step: Step) -> None:
        """Move the weights; the gradients are used up."""
        moved: list[torch.Tensor] = [p for p in step.run.parameters if p.grad is not None]
        gradients: list[Any] = [p.grad for p in moved]
        sizes: list[torch.Tensor] = []
        if self.adaptive:
            sizes = list(torch._foreach_add(torch._foreach_abs(moved), self.eta))  # noqa: SLF001
            torch._foreach_mul_(gradients, sizes)
        # Whoever spreads parameters over ranks owns `grad_norm`, and knows the norm over all of them.
        factor = self.rho / (step.run.hooks.grad_norm(step) + TINY)
        torch._foreach_mul_(gradients, factor)
        if self.adaptive:
            torch._foreach_mul_(gradients, sizes)
        torch._foreach_add_(moved, gradients)
