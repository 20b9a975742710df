"""What torch's own optimizers mean for the hand-written loop."""

from __future__ import annotations

import torch


def given(plugin, names):
    """Return these options of a plugin."""
    return {name: getattr(plugin, name) for name in names.split()}


def by_torch(cls, names, **fixed):
    """Return the entry of a class of torch with these options of the plugin."""
    return lambda plugin, folder: {
        "optimizer": lambda groups: cls(
            groups, **{name: paired(v) for name, v in given(plugin, names).items()}, **fixed
        )
    }


def paired(value):
    return tuple(value) if isinstance(value, list) else value


def lbfgs(plugin, folder):
    names = "lr max_iter max_eval history_size tolerance_grad tolerance_change"
    search = {"none": None, "strong-wolfe": "strong_wolfe"}[plugin.line_search]

    def optimizer(groups):
        every = [parameter for group in groups for parameter in group["params"]]
        return torch.optim.LBFGS(every, **given(plugin, names), line_search_fn=search)

    return {"optimizer": optimizer, "update": lambda optimizer, anew: optimizer.step(anew)}


class Both(torch.optim.Optimizer):
    """Two optimizers in one loop."""

    def __init__(self, first, second):
        self.both = first, second
        super().__init__([*first.param_groups, *second.param_groups], {})

    def step(self):
        for one in self.both:
            one.step()


def muon(plugin, folder):
    """Linear layers are matrices here, but for the heads of the kit's models."""
    matrices = set()

    def look(model):
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        for name, module in model.named_modules():
            named = set(plugin.exclude) & set(name.split("."))
            if isinstance(module, torch.nn.Linear) and module is not head and not named:
                matrices.add(module.weight)

    def optimizer(groups):
        filled = [{"weight_decay": plugin.weight_decay, **group} for group in groups]
        first, second = (
            [{**group, "params": [p for p in group["params"] if (p in matrices) is wanted]} for group in filled]
            for wanted in (True, False)
        )
        scaled = {"original": "original", "match-rms-adamw": "match_rms_adamw"}[plugin.adjust_lr]
        return Both(
            torch.optim.Muon(first, **given(plugin, "lr momentum nesterov ns_steps"), adjust_lr_fn=scaled),
            torch.optim.AdamW(
                second, lr=plugin.adamw_lr, betas=paired(plugin.adamw_betas), eps=plugin.adamw_eps, fused=True
            ),
        )

    return {"prepares": [look], "optimizer": optimizer}


ADAM = "lr betas eps weight_decay"
ENTRIES = {
    "adafactor": by_torch(torch.optim.Adafactor, "lr beta2_decay eps d weight_decay"),
    "adagrad": by_torch(torch.optim.Adagrad, "lr lr_decay initial_accumulator_value eps weight_decay", fused=True),
    "adam": by_torch(torch.optim.Adam, f"{ADAM} amsgrad", fused=True),
    "adamax": by_torch(torch.optim.Adamax, ADAM),
    "lbfgs": lbfgs,
    "muon": muon,
    "nadam": by_torch(torch.optim.NAdam, f"{ADAM} momentum_decay decoupled_weight_decay"),
    "radam": by_torch(torch.optim.RAdam, f"{ADAM} decoupled_weight_decay"),
    "rmsprop": by_torch(torch.optim.RMSprop, "lr alpha eps weight_decay momentum centered"),
}
