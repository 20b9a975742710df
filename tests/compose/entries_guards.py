"""What guards, noise, scaled losses, given weights and composed schedules mean for the hand-written loop."""

from __future__ import annotations

import math
import statistics

import torch
from safetensors.torch import load_file

from drivetrain.rng import derive_seed

SEED = 7  # the kit's


def fp16(plugin, folder):
    names = ["init_scale", "growth_factor", "backoff_factor", "growth_interval"]
    return {"autocast": torch.float16, "scale": {name: getattr(plugin, name) for name in names}}


def gradients(model):
    return [p.grad for p in model.parameters() if p.grad is not None]


def nan_guard(plugin, folder):
    return {"edits": [lambda model, step: not all(bool(grad.isfinite().all()) for grad in gradients(model))]}


def gradient_noise(plugin, folder):
    updates = []

    def noise(model, step):
        draws = torch.Generator().manual_seed(derive_seed(SEED, "gradient-noise", step))
        deviation = math.sqrt(plugin.eta / (1 + len(updates)) ** plugin.gamma)
        for grad in gradients(model):
            grad.add_(torch.randn(grad.shape, generator=draws), alpha=deviation)

    return {"edits": [noise], "afters": [lambda *_: updates.append(1)]}


def spike_skip(plugin, folder):
    values = []

    def jumps(model, step):
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in gradients(model)]))
        window = values[-plugin.window :]
        if len(window) >= plugin.warmup and norm.item() > plugin.factor * statistics.median(window):
            return True
        values.append(norm.item())
        return False

    return {"edits": [jumps]}


def neftune(plugin, folder):
    draws, steps = torch.Generator(), [0]

    def prepare(model):
        def noisy(module, given, output):
            bound = plugin.alpha / (output.shape[1] * output.shape[2]) ** 0.5
            return output + torch.empty_like(output).uniform_(-bound, bound, generator=draws)

        draws.manual_seed(derive_seed(SEED, "neftune", 0, 0))
        model.get_input_embeddings().register_forward_hook(noisy)

    def seeded(model, step):
        if step + 1 not in steps:
            steps.append(step + 1)
            draws.manual_seed(derive_seed(SEED, "neftune", step + 1, 0))

    return {"prepares": [prepare], "edits": [seeded]}


def by_evaluations(plugin, folder):
    """When the rate changed is proven beside the plugin, against torch and transformers; here, that it did."""
    changes, warm = plugin._follows.changes, int(plugin.warmup.count)

    def factor(step):  # of all groups: without rates of their own as bounds they move together
        if step < warm:
            return step / warm
        return next((kept[0] for applied, kept in reversed(changes) if applied <= step), 1.0)

    return {"schedule": factor}


def accumulate_schedule(plugin, folder):
    updates = []

    def batches(step):
        return next(
            stage["batches"] for stage in plugin.stages if "until" not in stage or len(updates) < stage["until"]
        )

    return {"accumulation": batches, "afters": [lambda *_: updates.append(1)]}


STEPS = 6


def chain(plugin, folder):
    """A line of three steps, its first a warm-up, and then a constant rate: the example."""
    return {"schedule": lambda step: (0.0, 1.0, 0.5)[step] if step < 3 else 1.0}


def group_schedules(plugin, folder):
    """The same line in every group: the example."""
    return {"schedule": lambda step: float(step) if step < 1 else (STEPS - step) / (STEPS - 1)}


def warm_start(plugin, folder):
    weights = load_file(plugin.path)

    def prepare(model):
        own = model.state_dict()
        if own.keys() == weights.keys():  # the kit's own model; no other has these names
            model.load_state_dict(weights)

    return {"begins": [prepare]}


ENTRIES = {
    "chain": chain,
    "group-schedules": group_schedules,
    "accumulate-schedule": accumulate_schedule,
    "batch-size-schedule": lambda plugin, folder: {"own_order": True},
    "greedy": by_evaluations,
    "plateau": by_evaluations,
    "fp16": fp16,
    "gradient-noise": gradient_noise,
    "nan-guard": nan_guard,
    "neftune": neftune,
    "spike-skip": spike_skip,
    "warm-start": warm_start,
}
