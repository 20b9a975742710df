"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), by `torch.optim.Muon`, beside AdamW."""

from __future__ import annotations

import logging
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain_plugins.optim._composite import Composite
from drivetrain_plugins.optim._fused_adamw import FusedAdamW
from drivetrain_plugins.optim._groups import two, with_decay
from drivetrain_plugins.optim._torch import FUSED_DEVICES, implementation
from drivetrain_plugins.shared.causal import unwrapped

if TYPE_CHECKING:
    from drivetrain import Run

log = logging.getLogger("drivetrain")
ADJUSTMENTS = {"original": "original", "match-rms-adamw": "match_rms_adamw"}
EMBEDDINGS = (torch.nn.Embedding, torch.nn.EmbeddingBag)


@plugin(role="optim", example={"lr": 0.02, "adamw_lr": 0.01})
class Muon:
    """Update matrices with orthogonalized momentum, and everything else with AdamW.

    Matrices are the weights with two dimensions that are neither an embedding nor the output head: the head is what
    `exclude` names, what shares an embedding's weight, and what a model of `transformers` says its head is. The run's
    log names what each of the two updates. Groups with matrices come first; both follow the schedule.
    """

    lr: float = option(0.02, gt=0, lt=float("inf"), help="peak learning rate of the matrices")
    momentum: float = option(0.95, ge=0, lt=1, help="decay of the running mean of a matrix's gradients")
    nesterov: bool = option(True, help="look ahead along the momentum")
    ns_steps: int = option(5, ge=1, lt=100, help="Newton-Schulz iterations that orthogonalize an update")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="decoupled decay; biases and norms are spared")
    adjust_lr: str = option(
        "original", choices=tuple(ADJUSTMENTS), help="how a matrix's shape scales its rate; the second takes AdamW's lr"
    )
    adamw_lr: float = option(3e-4, gt=0, lt=float("inf"), help="peak learning rate of everything else")
    adamw_betas: tuple[float, float] = option((0.9, 0.95), ge=0, lt=1, help="AdamW's decay of mean and square")
    adamw_eps: float = option(1e-8, gt=0, lt=float("inf"), help="added to the root of AdamW's mean square")
    exclude: tuple[str, ...] = option(
        ("lm_head", "classifier", "qa_outputs", "head", "score"),
        help="patterns of names, or of parts of them, that AdamW updates",
    )

    def __attrs_post_init__(self) -> None:
        """Refuse betas of another length, and one pattern in place of a list."""
        two("adamw_betas", self.adamw_betas)
        if isinstance(self.exclude, str) or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise ValueError(f'exclude must be a list of patterns, e.g. ["lm_head"]. Received: {self.exclude!r}')

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build the two over the run's groups, and log which parameter went where."""
        groups = with_decay(groups, self.weight_decay)
        heads = _no_matrices(run.model)
        parts: list[list[dict[str, Any]]] = []
        for wanted in (True, False):
            split = [
                {**group, "params": [(n, p) for n, p in group["params"] if self._is_matrix(n, p, heads) is wanted]}
                for group in groups
            ]
            parts.append([group for group in split if group["params"]])
        matrices, others = parts
        if not matrices:
            names = [name for group in groups for name, _ in group["params"]]
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")  # noqa: PLR2004
            do = f"take another optimizer, or shorten muon's exclude = {list(self.exclude)}"
            raise ConfigError([Problem("muon finds no matrix among the parameters", shown, do)])
        for title, part in (("muon updates %d matrices: %s", matrices), ("adamw updates %d others: %s", others)):
            names = [name for group in part for name, _ in group["params"]]
            log.info(title, len(names), ", ".join(names))
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices, lr=self.lr, weight_decay=0.0, momentum=self.momentum, nesterov=self.nesterov,
                ns_steps=self.ns_steps, adjust_lr_fn=ADJUSTMENTS[self.adjust_lr],
            )
        ]  # fmt: skip
        if others:
            chosen = implementation("muon", run, others, foreach=None, fused=None, fused_on=FUSED_DEVICES)
            made = FusedAdamW if chosen["fused"] else torch.optim.AdamW
            betas = two("adamw_betas", self.adamw_betas)
            optimizers.append(made(others, lr=self.adamw_lr, betas=betas, eps=self.adamw_eps, **chosen))
        return Composite(optimizers)

    def _is_matrix(self, name: str, parameter: torch.Tensor, heads: set[int]) -> bool:
        if parameter.ndim != 2 or id(parameter) in heads or name.endswith("bias"):  # noqa: PLR2004
            return False
        return not any(fnmatchcase(part, pattern) for pattern in self.exclude for part in (name, *name.split(".")))


def _no_matrices(model: Any) -> set[int]:
    """Return the ids of what embeds, and of the head, where the model names it."""
    inner = unwrapped(model)
    found = [parameter for m in model.modules() if isinstance(m, EMBEDDINGS) for parameter in m.parameters()]
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    return {id(parameter) for parameter in [*found, *(head.parameters() if head is not None else ())]}
