"""What adapters mean for the hand-written loop: peft's own model is trained by it; merging is for exports alone."""

from __future__ import annotations

import warnings

import torch

from drivetrain.rng import derive_seed

SEED = 7  # the kit's


def lora(plugin, folder):
    def prepare(model):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(derive_seed(SEED, "lora"))
        task = "SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else None
        config = LoraConfig(
            task_type=task, r=plugin.rank, lora_alpha=plugin.alpha, target_modules="all-linear",
            modules_to_save=["classifier"] if hasattr(model, "classifier") else None,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft's own
            return get_peft_model(model, config).train()

    return {"adapts": [prepare]}


ENTRIES = {"lora": lora}
