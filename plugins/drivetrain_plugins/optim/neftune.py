"""NEFTune: noisy embeddings (Jain et al. 2023, https://arxiv.org/abs/2310.05914)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain_plugins.shared.causal import unwrapped

if TYPE_CHECKING:
    from collections.abc import Generator

    from drivetrain import Run


@plugin(
    role="optim",
    example={"alpha": 5.0},
    rows="tokens",
    companions={"hf-model": {"path": "{kit}/model", "labels": ["a", "b", "c"]}},
)
class Neftune:
    """Add uniform noise of at most alpha / sqrt(L d) to the embeddings (B, L, d) of the input, in training only.

    The noise is drawn on the device from a stream of its own, for the step and the rank; the micro-batches of a step
    go on drawing from it.
    """

    alpha: float = option(5.0, gt=0, lt=float("inf"), help="size of the noise")
    module: str | None = option(None, help="dotted name of the embedding; None asks the model for it")
    _module: Any = option(None, init=False)
    _run: Any = option(None, init=False)
    _draws: Any = option(None, init=False)
    _step: int = option(-1, init=False)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Find the embedding.

        Raises:
            ConfigError: the model has none, or none of that name.
        """
        self._run, self._draws, self._step = run, torch.Generator(run.device), -1
        self._module = self._found(unwrapped(run.model))

    def _found(self, model: Any) -> torch.nn.Module:
        do = 'name the module whose output is to be noisy: module = "model.embed_tokens"'
        if self.module is not None:
            try:
                named: torch.nn.Module = model.get_submodule(self.module)
            except AttributeError as error:
                raise ConfigError([Problem("neftune: the model has no such module", self.module, do)]) from error
            return named
        try:
            asked = model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            asked = None
        if not isinstance(asked, torch.nn.Module):
            what = "neftune: the model does not say which module embeds its input"
            raise ConfigError([Problem(what, f"{type(model).__name__} without get_input_embeddings()", do)])
        return asked

    @hookimpl(wrapper=True)
    def fit(self) -> Generator[None, Any, Any]:
        """Hang the noise on the embedding while the run lasts."""
        handle = self._module.register_forward_hook(self._noisy)
        try:
            return (yield)
        finally:
            handle.remove()

    def _noisy(self, module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        step, draws = self._run.progress.step, self._draws
        if step != self._step:
            self._step = step
            draws.manual_seed(self._run.seed_for("neftune", step, self._run.rank))
        bound = self.alpha / math.sqrt(output.shape[-2] * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-bound, bound, generator=draws)
