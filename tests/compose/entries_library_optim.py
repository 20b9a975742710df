"""What optimizers of other libraries mean for the hand-written loop: the libraries themselves."""

from __future__ import annotations

import warnings

import torch


def given(plugin, names):
    """Return these options of a plugin, with lists as the tuples that libraries take."""
    found = {name: getattr(plugin, name) for name in names.split()}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


class Several(torch.optim.Optimizer):
    """Optimizers in one loop, whose rates a schedule sets as if they were one."""

    def __init__(self, *made):
        self.made = made
        super().__init__([group for one in made for group in one.param_groups], {})
        # torch has copied the groups: the optimizers take the copies that schedules write to.
        for one in made:
            own = {id(p) for group in one.param_groups for p in group["params"]}
            one.param_groups = [g for g in self.param_groups if g["params"] and id(g["params"][0]) in own]

    def step(self):
        for one in self.made:
            one.step()


class Eager(torch.optim.Optimizer):
    """One whose rates are tensors, and whose updates would be compiled."""

    def __init__(self, made, rates):
        self.made = made
        super().__init__([{**group, "lr": lr} for group, lr in zip(made.param_groups, rates, strict=True)], {})

    def step(self):
        for mine, theirs in zip(self.param_groups, self.made.param_groups, strict=True):
            theirs["lr"].fill_(mine["lr"])
        with torch.compiler.set_stance("force_eager"):
            self.made.step()


def decayed(groups, plugin):
    """Return the groups with the plugin's decay where they have none of their own."""
    return [{"weight_decay": plugin.weight_decay, **group} for group in groups]


def lion(plugin, folder):
    def optimizer(groups):
        from lion_pytorch import Lion

        return Lion(decayed(groups, plugin), **given(plugin, "lr betas"))

    return {"optimizer": optimizer}


def pytorch_optimizer(name, options, **renamed):
    def entry(plugin, folder):
        def optimizer(groups):
            import pytorch_optimizer as library

            found = {theirs: getattr(plugin, ours) for theirs, ours in renamed.items()}
            decoupled = {} if name == "SOAP" else {"weight_decouple": True}
            return getattr(library, name)(decayed(groups, plugin), **given(plugin, options), **found, **decoupled)

        return {"optimizer": optimizer}

    return entry


def torchao(bits):
    def entry(plugin, folder):
        def optimizer(groups):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from torchao import optim

            rates = [group.get("lr", plugin.lr) for group in groups]
            options = given(plugin, "lr betas eps block_size bf16_stochastic_round")
            return Eager(getattr(optim, f"AdamW{bits}bit")(decayed(groups, plugin), **options), rates)

        return {"optimizer": optimizer}

    return entry


def bitsandbytes(name, options, **renamed):
    """An optimizer of its own has the embeddings, in 32 bits."""

    def entry(plugin, folder):
        tables = set()

        def look(model):
            tables.update(m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding))

        def optimizer(groups):
            from bitsandbytes import optim

            found = {theirs: getattr(plugin, ours) for theirs, ours in renamed.items()}
            made = []
            for bits, wanted in ((plugin.bits, False), (plugin.embedding_bits, True)):
                mine = [
                    {**group, "params": [p for p in group["params"] if (p in tables) is wanted]}
                    for group in decayed(groups, plugin)
                ]
                if mine := [group for group in mine if group["params"]]:
                    few = given(plugin, options)
                    made.append(getattr(optim, name)(mine, optim_bits=bits, **few, **found))
            return Several(*made)

        return {"optimizer": optimizer, "prepares": [look]}

    return entry


def stable(plugin, folder):
    def optimizer(groups):
        from optimi import StableAdamW

        return StableAdamW(
            decayed(groups, plugin), **given(plugin, "lr betas eps decouple_lr kahan_sum triton"), weight_decay=0.0
        )

    return {"optimizer": optimizer}


class Quiet(Several):
    """One that warns in each step."""

    def step(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().step()


def grokadamw(plugin, folder):
    def optimizer(groups):
        from grokadamw import GrokAdamW

        options = "lr betas eps alpha_init lamb gamma gradient_clipping grokking_signal_decay_rate"
        return Quiet(GrokAdamW(decayed(groups, plugin), **given(plugin, options)))

    return {"optimizer": optimizer}


class Kahan(torch.optim.Optimizer):
    """AdamW, parameter by parameter, whose sums keep what they lose."""

    def __init__(self, groups, plugin):
        super().__init__(groups, {"lr": plugin.lr})
        self.plugin, self.taken = plugin, 0

    @torch.no_grad()
    def step(self):
        plugin, self.taken = self.plugin, self.taken + 1
        (beta1, beta2), kinds = plugin.betas, (plugin.momentum_dtype, plugin.variance_dtype, plugin.compensation_dtype)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                for name, kind in zip(("mean", "square", "lost"), kinds, strict=True):
                    state.setdefault(name, torch.zeros_like(p, dtype=getattr(torch, kind)))
                state["taken"] = state.get("taken", 0) + 1
                state["mean"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
                state["square"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                root = state["square"].sqrt() / (1 - beta2 ** state["taken"]) ** 0.5 + plugin.eps
                rate, decay = -group["lr"] / (1 - beta1 ** state["taken"]), group["lr"] * group["weight_decay"]
                if not plugin.use_kahan_summation:
                    p.mul_(1 - decay).addcdiv_(state["mean"], root, value=rate)
                    continue
                state["lost"].add_(p, alpha=-decay).addcdiv_(state["mean"], root, value=rate)
                before = p.clone()
                p.add_(state["lost"])
                state["lost"].add_(before.sub_(p))


ENTRIES = {
    "adamw-4bit": torchao(4),
    "adamw-8bit": torchao(8),
    "adamw-anyprecision": lambda plugin, folder: {"optimizer": lambda groups: Kahan(decayed(groups, plugin), plugin)},
    "ademamix": pytorch_optimizer("AdEMAMix", "lr betas alpha eps foreach", t_alpha_beta3="warmup_steps"),
    "bnb-adamw": bitsandbytes("AdamW", "lr betas eps min_8bit_size"),
    "bnb-ademamix": bitsandbytes(
        "AdEMAMix", "lr betas eps alpha min_8bit_size", t_alpha="warmup_steps", t_beta3="warmup_steps"
    ),
    "bnb-lion": bitsandbytes("Lion", "lr betas min_8bit_size"),
    "bnb-rmsprop": bitsandbytes("RMSprop", "lr alpha eps min_8bit_size"),
    "grokadamw": grokadamw,
    "lion": lion,
    "shampoo": pytorch_optimizer(
        "Shampoo", "lr momentum matrix_eps", preconditioning_compute_steps="precondition_frequency"
    ),
    "soap": pytorch_optimizer(
        "SOAP",
        "lr betas shampoo_beta eps precondition_frequency max_precondition_dim precondition_1d correct_bias "
        "normalize_gradient",
    ),
    "stable-adamw": stable,
}
