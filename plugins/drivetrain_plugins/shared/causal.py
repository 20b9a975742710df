"""What a model does with the order of tokens: whether it attends back only, and whether its loss shifts labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain_plugins.shared.exports import bare

if TYPE_CHECKING:
    from drivetrain import Run


def unwrapped(model: Any) -> Any:
    """Return the model inside the wrappers of peft, torch.compile and parallel training."""
    while hasattr(model := bare(model), "get_base_model"):
        model = model.get_base_model()
    return model


def attends_back(model: Any) -> bool:
    """Tell whether tokens see only those before them: transformers' attention modules say so themselves."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def shifts_labels(run: Run) -> bool:
    """Tell whether the run's loss predicts `labels[..., 1:]`: a loss plugin says so, else it is the model's own."""
    return bool(run.facts.get("shifted_labels", run.shifted_labels))
