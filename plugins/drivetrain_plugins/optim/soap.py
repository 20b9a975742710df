"""SOAP (Vyas et al. 2024, https://arxiv.org/abs/2409.11321), by `pytorch_optimizer`."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._groups import with_decay
from drivetrain_plugins.optim._library import library, refuse_unfit, several

if TYPE_CHECKING:
    from drivetrain import Run

NAME = "soap"


class _Plain(torch.optim.Optimizer):
    """What stands before the library's class: a state that keeps its bits when it is written and read.

    The eigenbases come from LAPACK with their columns one after the other, and a product with a matrix in the other
    order may sum in another order. So they are saved as their transposes, and are transposes again after loading.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch does, with the bases as they lie in memory."""
        made = super().state_dict()
        for number, state in made["state"].items():
            made["state"][number] = {**state, "Q": [_lying(basis) for basis in state["Q"]]}
        return made

    def load_state_dict(self, state_dict: Any) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["Q"] = [basis["columns"].t() if isinstance(basis, dict) else basis for basis in state["Q"]]


def _lying(basis: Any) -> Any:
    columns = isinstance(basis, torch.Tensor) and not basis.is_contiguous() and basis.t().is_contiguous()
    return {"columns": basis.t()} if columns else basis


@cache
def _class_of(base: type) -> Any:
    return type("PlainSOAP", (_Plain, base), {})


@plugin(role="optim", example={"lr": 0.01, "weight_decay": 0.1, "precondition_frequency": 2})
class SOAP:
    """Update with SOAP: AdamW in the eigenbasis of Shampoo's statistics.

    A matrix of m rows and n columns keeps, besides AdamW's two tensors, four of m x m and n x n elements. The first
    step fills the statistics and leaves the weights as they are (it counts as applied). Statistics have the type of the
    parameters: weights in half precision train badly. Sharded parameters are refused, as the library cannot.
    """

    lr: float = option(3e-3, gt=0, lt=float("inf"), help="peak learning rate")
    betas: tuple[float, float] = option((0.95, 0.95), ge=0, lt=1, help="decay of the running mean and square")
    shampoo_beta: float | None = option(None, ge=0, lt=1, help="decay of the statistics; None takes the second beta")
    eps: float = option(1e-8, gt=0, lt=float("inf"), help="added to the root of the mean square")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="decoupled decay; biases and norms are spared")
    precondition_frequency: int = option(10, ge=1, lt=2**53, help="steps between updates of the eigenbases")
    max_precondition_dim: int = option(10000, ge=1, lt=2**31, help="sides longer than this keep no statistics")
    precondition_1d: bool = option(False, help="keep statistics for vectors too")
    correct_bias: bool = option(True, help="correct the means for their start at 0, as Adam does")
    normalize_gradient: bool = option(False, help="give each parameter's update the root mean square 1")

    def __attrs_post_init__(self) -> None:
        """Refuse betas of another length."""
        several("betas", self.betas, 2)

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        optimizers = library("pytorch_optimizer", NAME)
        refuse_unfit(NAME, run, groups, sharded=False, coarse=(torch.float16,))
        names = (
            "lr", "shampoo_beta", "eps", "precondition_frequency", "max_precondition_dim",
            "precondition_1d", "correct_bias", "normalize_gradient",
        )  # fmt: skip
        made: torch.optim.Optimizer = _class_of(optimizers.SOAP)(
            with_decay(groups, self.weight_decay),
            betas=several("betas", self.betas, 2),
            **{name: getattr(self, name) for name in names},
        )
        return made
