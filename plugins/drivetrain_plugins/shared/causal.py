"""What a model does with the order of tokens: whether it attends back only, and whether its loss shifts labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drivetrain import Run


def unwrapped(model: Any) -> Any:
    """Return the model inside the wrappers of peft, torch.compile and parallel training."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # noqa: SLF001 - where torch.compile keeps it
        elif type(model).__name__.endswith("DataParallel"):
            model = model.module
        else:
            return model


def attends_back(model: Any) -> bool:
    """Tell whether tokens see only those before them: transformers' attention modules say so themselves."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def shifts_labels(run: Run) -> bool:
    """Tell whether the run's loss predicts `labels[..., 1:]`.

    A loss plugin says so with the fact "shifted_labels"; else it is what the model plugin found, or what a
    transformers model says of its own loss (one without a named loss takes the causal one where it generates).
    """
    if "shifted_labels" in run.facts:
        return bool(run.facts["shifted_labels"])
    if run.shifted_labels:
        return True
    model = unwrapped(run.model)
    if not hasattr(model, "loss_type"):
        return False
    named: str | None = model.loss_type
    return named == "ForCausalLM" or (named is None and model.can_generate() and attends_back(model))
