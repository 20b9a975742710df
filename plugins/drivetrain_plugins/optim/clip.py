"""Gradient clipping (Pascanu et al. 2013, arXiv:1211.5063), and its adaptive form (Brock et al. 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim import _names

if TYPE_CHECKING:
    from drivetrain import Run, Step

MODES = ("norm", "value", "per-parameter", "adaptive")
FACTOR, EPS = 0.01, 1e-3  # of adaptive clipping, as in the paper
SMALL = 1e-6  # added to norms before they divide, as in torch


@plugin(role="optim", example={"norm": 0.1})
class Clip:
    """Limit the gradients, by default their total norm, and log that norm as it was before.

    The modes are: "norm" scales all gradients so that their total norm is at most `norm`; "value" cuts each element to
    [-value, value]; "per-parameter" limits each tensor's own norm to `norm`; "adaptive" (AGC,
    https://arxiv.org/abs/2102.06171) limits the norm of each unit's gradient (of a row of a matrix, of a filter; of a
    whole vector) to `factor` times that of its weights, taken as at least `eps`. What is logged is the total norm of
    `norm_type`, before anything was limited. Norms that are not finite are left to a guard.
    """

    norm: float = option(1.0, gt=0, help="largest norm; larger gradients are scaled to it")
    norm_type: float = option(
        2.0, gt=0, help="which norm: 2, 1, inf (of the largest element) or any p; not in adaptive"
    )
    mode: str = option("norm", choices=MODES, help="what is limited; see above")
    value: float | None = option(None, gt=0, help="value: largest size of an element")
    factor: float | None = option(None, gt=0, help="adaptive: largest norm relative to the weights'; None takes 0.01")
    eps: float = option(EPS, gt=0, help="adaptive: smallest norm that weights are taken to have")
    exclude: tuple[str, ...] = option((), converter=_names.parse, help=f"adaptive: not these, as heads; {_names.HELP}")
    _limit: Any = option(None, init=False)
    _units: list[tuple[torch.nn.Parameter, tuple[int, ...] | None]] = option(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        """Refuse options that the mode does not read."""
        for name, mode in (("value", "value"), ("factor", "adaptive"), ("exclude", "adaptive")):
            if getattr(self, name) and self.mode != mode:
                raise ValueError(f"{name} is read by mode {mode!r} only. Received: mode={self.mode!r}")
        if self.mode == "value" and self.value is None:
            raise ValueError("mode 'value' needs a value. Received: value=None")
        if self.mode == "adaptive" and self.norm_type != 2:  # noqa: PLR2004
            raise ValueError(f"mode 'adaptive' takes 2-norms. Received: norm_type={self.norm_type}")
        limits = {"norm": self._total, "value": self._elements, "per-parameter": self._each, "adaptive": self._unitwise}
        self._limit = limits[self.mode]

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Find the units whose gradients are measured by themselves."""
        self._units = []
        if self.mode == "adaptive":
            names = _names.named_parameters(run.model)
            spared = {name for pattern in self.exclude for name in _names.select(pattern, names, "clip")}
            updated = {id(p) for p in run.parameters}
            for name, parameter in names.items():
                if name not in spared and id(parameter) in updated:
                    dims = tuple(range(1, parameter.ndim)) if parameter.squeeze().ndim > 1 else None
                    self._units.append((parameter, dims))

    @hookimpl
    def clip_gradients(self, step: Step) -> None:
        """Measure, then limit, all on the device."""
        if step.skipped is None:
            self._limit(step)

    def _total(self, step: Step) -> None:
        """Scale by min(1, norm / (total + 1e-6)), as `torch.nn.utils.clip_grad_norm_` does."""
        step.grad_norm = total = self._measure(step)
        factor = torch.clamp(self.norm / (total + SMALL), max=1.0)
        torch._foreach_mul_([p.grad for p in step.run.parameters if p.grad is not None], factor)

    def _elements(self, step: Step) -> None:
        """Cut each element, as `torch.nn.utils.clip_grad_value_` does."""
        step.grad_norm = self._measure(step)
        gradients: list[Any] = [p.grad for p in step.run.parameters if p.grad is not None]
        assert self.value is not None
        torch._foreach_clamp_min_(gradients, -self.value)
        torch._foreach_clamp_max_(gradients, self.value)

    def _each(self, step: Step) -> None:
        """Scale each gradient by min(1, norm / (its norm + 1e-6))."""
        gradients: list[Any] = [p.grad for p in step.run.parameters if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients, self.norm_type))  # noqa: SLF001
        step.grad_norm = torch.linalg.vector_norm(norms, self.norm_type)
        factors = torch.clamp(self.norm / (norms + SMALL), max=1.0)
        torch._foreach_mul_(gradients, list(factors.unbind()))

    @torch.no_grad()
    def _unitwise(self, step: Step) -> None:
        """Scale each unit's gradient by min(1, factor max(|w|, eps) / |g|)."""
        step.grad_norm = self._measure(step)
        share = FACTOR if self.factor is None else self.factor
        for parameter, dims in self._units:
            gradient = parameter.grad
            if gradient is not None:
                weights = torch.linalg.vector_norm(parameter, dim=dims, keepdim=dims is not None)
                norms = torch.linalg.vector_norm(gradient, dim=dims, keepdim=dims is not None)
                largest = weights.clamp_(min=self.eps).mul_(share)
                gradient.mul_((largest / norms.clamp(min=SMALL)).clamp_(max=1.0))

    def _measure(self, step: Step) -> torch.Tensor:
        """Return the total norm of all gradients."""
        if self.norm_type == 2:  # noqa: PLR2004 - the kernel's, or that of whoever spreads parameters over ranks
            measured: torch.Tensor = step.run.hooks.grad_norm(step)
            return measured
        gradients: list[Any] = [p.grad for p in step.run.parameters if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients, self.norm_type))  # noqa: SLF001
        total: torch.Tensor = torch.linalg.vector_norm(norms, self.norm_type)
        return total
