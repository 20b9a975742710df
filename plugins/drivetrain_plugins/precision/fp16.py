"""float16 autocast with a scaled loss (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from drivetrain import ConfigError, Problem, TrainingError, hookimpl, option, plugin

if TYPE_CHECKING:
    from collections.abc import Generator

    from drivetrain import Micro, Run, Step


@plugin(
    role="precision",
    provides=["precision"],
    conflicts=["precision", "lomo", "adalomo", "optimizer-in-backward", "lbfgs"],
    example={"init_scale": 2.0**18, "growth_interval": 2},
)
class FP16:
    """Run forward and loss under float16 autocast, and scale the loss so that small gradients survive.

    Weights, gradients and optimizer state stay float32. The gradients are unscaled before any other plugin sees them.
    Where one is not finite, the scale was too large: the step is skipped, no schedule moves, and the scale falls. To
    know that, one number is read from the device in each step.
    """

    facts: ClassVar = {"may_skip": True}

    init_scale: float = option(2.0**16, gt=0, lt=float("inf"), help="factor on the loss at the start")
    growth_factor: float = option(2.0, gt=1, help="the scale is multiplied by it after growth_interval good steps")
    backoff_factor: float = option(0.5, gt=0, lt=1, help="the scale is multiplied by it after an overflow")
    growth_interval: int = option(2000, ge=1, help="good steps in a row after which the scale grows")
    limit: int = option(50, ge=1, help="overflows in a row after which training has failed")
    _scaler: Any = option(None, init=False)
    _device: str = option("cpu", init=False)
    _overflows: int = option(0, init=False)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Make the scaler.

        Raises:
            ConfigError: a weight is float16 itself, in which gradients cannot be unscaled.
        """
        half = next((n for n, p in run.model.named_parameters() if p.requires_grad and p.dtype is torch.float16), None)
        if half is not None:
            do = "load the model in float32: autocast makes the products float16"
            raise ConfigError([Problem("fp16: weights must be float32", f"{half!r} is float16", do)])
        self._device, self._overflows = run.device.type, 0
        self._scaler = torch.amp.GradScaler(
            run.device.type,
            init_scale=self.init_scale,
            growth_factor=self.growth_factor,
            backoff_factor=self.backoff_factor,
            growth_interval=self.growth_interval,
        )
        self._scaler.scale(torch.zeros((), device=run.device))  # makes its tensors, on ranks without rows too

    @hookimpl(wrapper=True)
    def forward(self, micro: Micro) -> Generator[None, Any, Any]:  # noqa: ARG002
        """Autocast the model."""
        with torch.autocast(self._device, torch.float16):
            return (yield)

    @hookimpl(wrapper=True)
    def compute_loss(self, micro: Micro) -> Generator[None, Any, Any]:  # noqa: ARG002
        """Autocast the loss; torch keeps the operations that need it in float32."""
        with torch.autocast(self._device, torch.float16):
            return (yield)

    @hookimpl(wrapper=True)
    def backward(self, micro: Micro) -> Generator[None, Any, Any]:
        """Go backward from the scaled loss; what is logged is the loss itself."""
        loss = micro.loss
        micro.loss = self._scaler.scale(loss)
        try:
            return (yield)
        finally:
            micro.loss = loss

    @hookimpl(tryfirst=True)  # everyone else is to see gradients of their true size
    def gradients_ready(self, step: Step) -> None:
        """Unscale, skip the step if a gradient has overflowed on any rank, and move the scale.

        Raises:
            TrainingError: too many steps in a row have overflowed.
        """
        if step.loss is None:  # nobody had target items
            return
        run, scaler = step.run, self._scaler
        scaler.unscale_(run.optimizer)
        found = scaler._found_inf_per_device(run.optimizer)  # noqa: SLF001 - torch's own sharded scaler asks so too
        flag = found.setdefault(run.device, torch.zeros((), device=run.device))
        if run.world_size > 1:  # ranks whose scales part would never agree again
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        overflow = any(one.item() for one in found.values())
        scaler.update()
        self._overflows = self._overflows + 1 if overflow else 0
        if overflow:
            step.skip("overflow")
            if self._overflows >= self.limit:
                raise TrainingError(
                    f"fp16: gradients of step {step.number} and of {self._overflows - 1} before it have overflowed. "
                    "The loss itself diverges: lower the rate, or use bf16. "
                    f"Received: a scale of {scaler.get_scale():g}"
                )

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and what moves it."""
        if self._scaler is None:
            return {}
        state = self._scaler.state_dict()
        return {"scale": state["scale"], "growth": state["_growth_tracker"], "overflows": self._overflows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the scale that was reached; the other options are the run's own."""
        own = self._scaler.state_dict()
        self._scaler.load_state_dict({**own, "scale": state["scale"], "_growth_tracker": state["growth"]})
        self._overflows = state["overflows"]
