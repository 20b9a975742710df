"""torch's fused AdamW without the host work around its kernel.

`torch.optim.AdamW.step` spends most of a small model's update on grouping tensors and on profiler contexts, each step
anew. Nothing of that changes between steps, so the lists are kept and the kernel is called with them: the same kernel
and the same state, so bit-identical, and `state_dict` is the parent's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.optim import optimizer as torch_optimizer

if TYPE_CHECKING:
    from collections.abc import Callable


class FusedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)` whose steady state is two calls a group."""

    _lists: list[tuple[dict[str, Any], list[torch.Tensor], list[Any], list[Any], list[Any]]] | None = None

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update every parameter from its gradient; anything out of the ordinary goes through the parent."""
        lists = self._lists
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks or hasattr(self, "grad_scale")
        anywhere = torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks  # noqa: SLF001
        if lists is None or closure is not None or hooks or anywhere:
            return self._parent_step(closure)
        gradients = [[p.grad for p in entry[1] if p.grad is not None] for entry in lists]
        if any(len(grads) != len(entry[1]) for grads, entry in zip(gradients, lists, strict=True)):
            return self._parent_step(closure)
        for (group, parameters, means, squares, steps), grads in zip(lists, gradients, strict=True):
            beta1, beta2 = group["betas"]
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                parameters, grads, means, squares, [], steps,
                lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
                amsgrad=False, maximize=False,
            )  # fmt: skip
        return None

    step.hooked = True  # type: ignore[attr-defined]  # or torch wraps it in a profiler context at each step

    def _parent_step(self, closure: Callable[[], float] | None) -> Any:
        """Take torch's own step, which also makes the state, and keep the lists if every parameter has it now."""
        result = super().step(closure)
        complete = all(p in self.state for group in self.param_groups for p in group["params"])
        self._lists = [self._list(group) for group in self.param_groups] if complete else None
        return result

    def _list(self, group: dict[str, Any]) -> Any:
        states = [self.state[p] for p in group["params"]]
        return (group, group["params"], *([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq", "step")))

    def load_state_dict(self, state_dict: Any) -> None:
        """Load as the parent does; the kept lists are of the old tensors."""
        self._lists = None
        super().load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add as the parent does."""
        self._lists = None
        super().add_param_group(param_group)
