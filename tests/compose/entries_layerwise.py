"""What schedule-free optimizers, layer-wise updates, low-rank projections and LOMO mean for the hand-written loop."""

from __future__ import annotations

import math

import torch

from drivetrain.rng import derive_seed

STEPS, SEED = 6, 7


def given(plugin, names):
    """Return these options of a plugin."""
    return {name: getattr(plugin, name) for name in names.split()}


def decayed(groups, plugin):
    """Return the groups with the plugin's decay where they have none of their own."""
    return [{"weight_decay": plugin.weight_decay, **group} for group in groups]


# --- schedule-free: trained at y, handed on as x ----------------------------------------------------------------------


def schedule_free(kind, options):
    def entry(plugin, folder):
        import schedulefree

        reached = []

        class Ending(getattr(schedulefree, kind)):
            """Switch to the average when the last step is over, be it taken or skipped."""

            def zero_grad(self, set_to_none=True):
                super().zero_grad(set_to_none)
                if reached and reached[-1] == STEPS - 1:
                    self.eval()

        def optimizer(groups):
            chosen = given(plugin, f"lr {options} r weight_lr_power foreach weight_decay")
            if hasattr(plugin, "warmup"):
                share = plugin.warmup < 1
                chosen["warmup_steps"] = math.ceil(plugin.warmup * STEPS) if share else int(plugin.warmup)
            made = Ending(groups, **chosen)
            made.train()
            return made

        return {"optimizer": optimizer, "edits": [lambda model, step: reached.append(step)]}

    return entry


# --- low-rank projections ---------------------------------------------------------------------------------------------


def projected(make):
    """Return the entry of an optimizer whose groups are split by what is projected; `make` gets the model, too."""

    def entry(plugin, folder):
        kept = {}

        def optimizer(groups):
            model = kept["model"]
            embeddings = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
            linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
            if hasattr(model, "get_output_embeddings"):
                linear = [m for m in linear if m is not model.get_output_embeddings()]
            chosen = {id(m.weight) for m in linear if min(m.weight.shape) > plugin.rank}
            chosen -= {id(weight) for weight in embeddings}
            split = []
            for group in decayed(groups, plugin):
                matrices = [p for p in group["params"] if id(p) in chosen]
                others = [p for p in group["params"] if id(p) not in chosen]
                split += [{**group, "params": others}] if others else []
                split += [{**group, "params": matrices, **given(plugin, options)}] if matrices else []
            return make(plugin, split, model)

        return {"optimizer": optimizer, "prepares": [lambda model: kept.update(model=model)]}

    options = "rank update_proj_gap scale proj_type" + (" proj scale_type" if make is apollo else "")
    return entry


def galore(plugin, groups, model):
    import galore_torch

    return galore_torch.GaLoreAdamW(groups, **given(plugin, "lr betas eps"), no_deprecation_warning=True)


def apollo(plugin, groups, model):
    import apollo_torch

    made = apollo_torch.APOLLOAdamW(groups, **given(plugin, "lr betas eps"))
    for number, p in enumerate(model.parameters()):
        made.state[p]["seed"] = derive_seed(SEED, "apollo", number)
    return made


# --- LOMO: what its updates in the backward pass come to --------------------------------------------------------------


class Descent(torch.optim.SGD):
    """Gradient descent with decoupled decay."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(p.grad, alpha=-group["lr"])


class Factored(torch.optim.SGD):
    """AdaLomo (https://arxiv.org/abs/2310.10195, algorithm 1) with the options of the library."""

    def __init__(self, groups, plugin):
        super().__init__(groups, lr=plugin.lr, weight_decay=plugin.weight_decay)
        self.plugin, self.taken = plugin, 0

    @torch.no_grad()
    def step(self, closure=None):
        options, self.taken = self.plugin, self.taken + 1
        share = 1.0 - math.pow(self.taken, options.decay_rate)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                square, means = p.grad**2 + options.eps[0], self.state[p]
                axes = [None] if p.ndim == 1 else [-1, -2]
                for axis in axes:
                    seen = square if axis is None else square.mean(dim=axis)
                    means.setdefault(axis, torch.zeros_like(seen)).mul_(share).add_(seen, alpha=1.0 - share)
                if p.ndim == 1:
                    update = means[None].rsqrt().mul_(p.grad)
                else:
                    rows = (means[-1] / means[-1].mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
                    update = torch.mul(rows, means[-2].unsqueeze(-2).rsqrt()).mul_(p.grad)
                update.div_((update.norm(2) / update.numel() ** 0.5 / options.clip_threshold).clamp_(min=1.0))
                lr = group["lr"] * max(options.eps[1], torch.norm(p, 2.0) / math.sqrt(p.numel()))
                p.mul_(1.0 - lr * group["weight_decay"]).add_(update, alpha=-lr)


def lomo(plugin, folder):
    return {"optimizer": lambda groups: Descent(groups, **given(plugin, "lr weight_decay"))}


def adalomo(plugin, folder):
    return {"optimizer": lambda groups: Factored(groups, plugin)}


ENTRIES = {
    "adalomo": adalomo,
    "apollo": projected(apollo),
    "galore": projected(galore),
    "lomo": lomo,
    "optimizer-in-backward": lambda plugin, folder: {},
    "schedule-free-adamw": schedule_free("AdamWScheduleFree", "betas eps"),
    "schedule-free-radam": schedule_free("RAdamScheduleFree", "betas eps silent_sgd_phase"),
    "schedule-free-sgd": schedule_free("SGDScheduleFree", "momentum"),
}
