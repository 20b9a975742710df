"""What the plugins around an optimizer mean for the hand-written loop; averages observe, and need no entry."""

from __future__ import annotations

import torch


def freeze(plugin, folder):
    """The example: embeddings stand still for three steps."""

    def prepare(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("embed" not in name)

    def edit(model, step):
        if step == 2:
            model.requires_grad_(True)

    return {"prepares": [prepare], "edits": [edit]}


def parameter_groups(plugin, folder):
    """The example: norms have a rate and a decay of their own; biases do not decay."""

    def groups(model):
        named = list(model.named_parameters())
        norms = [p for n, p in named if "norm" in n.lower()]
        biases = [p for n, p in named if n.rpartition(".")[2] == "bias" and "norm" not in n.lower()]
        rest = [p for n, p in named if n.rpartition(".")[2] != "bias" and "norm" not in n.lower()]
        return [
            {"params": rest},
            {"params": biases, "weight_decay": 0.0},
            {"params": norms, "lr": 0.02, "weight_decay": 0.1},
        ]

    return {"groups": groups}


def lookahead(plugin, folder):
    slow, taken = {}, []

    def prepare(model):
        slow.update({name: p.detach().clone() for name, p in model.named_parameters()})
        taken.clear()

    def after(model, step, optimizer):
        taken.append(step)
        if len(taken) % plugin.k == 0:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    slow[name].lerp_(parameter, plugin.alpha)
                    parameter.copy_(slow[name])

    return {"prepares": [prepare], "afters": [after]}


def sam(plugin, folder):
    def gradients(model, accumulate):
        seen = torch.get_rng_state()
        total = accumulate()
        parameters = [p for p in model.parameters() if p.grad is not None]
        before = [p.detach().clone() for p in parameters]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(parameter.grad * (plugin.rho / (norm + 1e-12)))
                parameter.grad = None
        torch.set_rng_state(seen)
        accumulate()
        with torch.no_grad():
            for parameter, weights in zip(parameters, before, strict=True):
                parameter.copy_(weights)
        return total

    return {"gradients": gradients}


ENTRIES = {"freeze": freeze, "lookahead": lookahead, "parameter-groups": parameter_groups, "sam": sam}
