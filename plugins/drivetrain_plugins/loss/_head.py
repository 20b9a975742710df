"""The output embeddings of a model: where they are, what enters them, and what is done to the logits behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import ConfigError, Problem
from drivetrain_plugins.shared.causal import unwrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@attrs.frozen
class Scaled:
    """Logits times a factor (Cohere, Granite)."""

    factor: float

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return them."""
        return logits if self.factor == 1.0 else logits * self.factor


@attrs.frozen
class SoftCapped:
    """Logits kept within a cap by a tanh (Gemma 2)."""

    cap: float

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return them."""
        return torch.tanh(logits / self.cap) * self.cap


def find_head(model: Any, name: str | None) -> Any:
    """Return the module that makes logits (..., V) of hidden states (..., D).

    Raises:
        ConfigError: the model has none.
    """
    inner = unwrapped(model)
    if name is not None:
        found = dict(inner.named_modules()).get(name)
    else:
        found = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if isinstance(getattr(found, "weight", None), torch.Tensor):
        return found
    what = f"chunked-cross-entropy: the model has no output embeddings{'' if name is None else f' {name!r}'}"
    do = "name the layer that makes the logits with head=..., e.g. 'lm_head', or take `cross-entropy`"
    raise ConfigError([Problem(what, type(inner).__name__, do)])


def behind_head(model: Any, head: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what the model does to the logits that leave `head`, found by giving it known ones in their place.

    The model runs once on its own dummy inputs; a model that has none is taken to leave the logits as they are.

    Raises:
        ConfigError: the model changes its logits in a way that is not known here, or does not call `head` once.
    """
    inner = unwrapped(model)
    if not hasattr(inner, "dummy_inputs"):
        return Scaled(1.0)
    known: list[torch.Tensor] = []

    def before(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0][..., :1, :], *inputs[1:])

    def after(_module: Any, _inputs: Any, made: torch.Tensor) -> torch.Tensor:
        known.append(torch.linspace(-100, 100, made.shape[-1]).to(made).expand(made.shape))
        return known[-1]

    training = [m for m in inner.modules() if m.training]
    inner.eval()
    try:
        with torch.no_grad(), head.register_forward_pre_hook(before), head.register_forward_hook(after):
            got = inner(**_dummy(inner, head.weight.device))["logits"]
    except Exception as error:
        what = "chunked-cross-entropy: the model cannot be tried on its dummy inputs"
        do = "take `cross-entropy`"
        raise ConfigError([Problem(what, f"{type(error).__name__}: {error}", do)]) from error
    finally:
        for module in training:
            module.training = True
    if len(known) == 1 and known[0].shape == got.shape:
        for change in _changes(inner.config):
            if torch.allclose(change(known[0]).to(got), got, rtol=1e-5 if got.dtype == torch.float64 else 1e-2):
                return change
    what = "chunked-cross-entropy: the model does something to its logits that is not known here"
    received = f"{type(inner).__name__}, which called its output embeddings {len(known)} time(s)"
    raise ConfigError([Problem(what, received, "take `cross-entropy`, which uses the model's own logits")])


def _dummy(model: Any, device: torch.device) -> dict[str, torch.Tensor]:
    words = model.config.get_text_config().vocab_size
    return {
        name: (value % words if name.endswith("input_ids") else value).to(device)
        for name, value in model.dummy_inputs.items()
    }


def _changes(config: Any) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Yield what transformers models do to logits, by what their configuration says."""
    yield Scaled(1.0)
    text = config.get_text_config()
    for name, power in (("logit_scale", 1), ("logits_scaling", -1)):
        if factor := getattr(text, name, None):
            yield Scaled(float(factor) ** power)
    if cap := getattr(text, "final_logit_softcapping", None):
        yield SoftCapped(float(cap))
