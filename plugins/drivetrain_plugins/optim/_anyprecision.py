"""AdamW with a type of its own for each part of the state, and Kahan summation of the weights.

Half precision cannot hold a weight that moves by less than its last digit: 1 plus 0.001 is 1 in bfloat16. Kahan's
summation (Kahan 1965, "Further remarks on reducing truncation errors") keeps what a sum has lost beside it and adds it
the next time, so that small updates arrive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class AnyPrecision(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) by operations over lists of tensors.

    Args:
        groups: with "params" and any of lr, betas, eps and weight_decay.
        lr: of groups without one.
        betas: decay of the running mean and square.
        eps: added to the root of the mean square.
        weight_decay: of groups without one.
        momentum_dtype: of the running mean.
        variance_dtype: of the running mean of squares.
        compensation_dtype: of what the weights' sums have lost; None sums plainly.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        momentum_dtype: torch.dtype,
        variance_dtype: torch.dtype,
        compensation_dtype: torch.dtype | None,
    ) -> None:
        """Take over the groups."""
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._dtypes = {"exp_avg": momentum_dtype, "exp_avg_sq": variance_dtype}
        if compensation_dtype is not None:
            self._dtypes["compensation"] = compensation_dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(group, parameters, [p.grad for p in parameters])
        return loss

    def _update(self, group: dict[str, Any], parameters: list[Any], gradients: list[Any]) -> None:
        states = [self._state_of(p) for p in parameters]
        for state in states:
            state["step"] += 1
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_mul_(means, beta1)
        torch._foreach_add_(means, gradients, alpha=1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        roots = torch._foreach_sqrt(squares)  # noqa: SLF001 - torch has no public form
        torch._foreach_div_(roots, [(1 - beta2 ** state["step"]) ** 0.5 for state in states])
        torch._foreach_add_(roots, group["eps"])
        rates = [-lr / (1 - beta1 ** state["step"]) for state in states]
        if "compensation" not in self._dtypes:
            if decay:
                torch._foreach_mul_(parameters, 1 - lr * decay)
            torch._foreach_addcdiv_(parameters, means, roots, rates)
            return
        # Everything a weight is to move by, the decay too, joins what earlier sums have lost. What the weight then
        # moves by is measured, and the rest is kept.
        lost = [state["compensation"] for state in states]
        if decay:
            torch._foreach_add_(lost, parameters, alpha=-lr * decay)
        torch._foreach_addcdiv_(lost, means, roots, rates)
        before = torch._foreach_clone(parameters)  # noqa: SLF001
        torch._foreach_add_(parameters, lost)
        torch._foreach_sub_(before, parameters)
        torch._foreach_add_(lost, before)

    def _state_of(self, p: torch.Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            state["step"] = 0
            for name, dtype in self._dtypes.items():
                state[name] = torch.zeros_like(p, dtype=dtype)
        return state

    def load_state_dict(self, state_dict: Any) -> None:
        """Load as torch does, but for its cast of the state to the parameter's type."""
        super().load_state_dict(state_dict)
        for number, p in enumerate(p for group in self.param_groups for p in group["params"]):
            for name in self._dtypes.keys() & state_dict["state"].get(number, {}).keys():
                given = state_dict["state"][number][name]
                self.state[p][name] = given.detach().to(device=p.device, dtype=self._dtypes[name], copy=True)
