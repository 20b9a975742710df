"""A training loop written by hand: what every composition of plugins is compared with, bit for bit.

It shares nothing with drivetrain but `derive_seed`, with which the documented streams are followed: the model is drawn
from ("model"), the order of an epoch from ("order", epoch), and each step's dropout from ("step", number, rank).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from drivetrain.rng import derive_seed


def train(
    *,
    build_model,
    make_batch,
    rows,
    optimizer,
    steps=6,
    seed=7,
    batch_size=8,
    drop_last=False,
    accumulation=1,
    schedule=None,
    clip=None,
    autocast=None,
    shuffle=True,
):
    """Train from scratch and return the parameters by name.

    Args:
        build_model: called without arguments after seeding; returns a module that takes a batch's items by name.
        make_batch: from a list of row numbers to a batch, a dict of tensors (or of lists of strings).
        rows: how many there are.
        optimizer: from (parameters that decay, parameters that do not) to a `torch.optim.Optimizer`.
        steps: optimizer steps.
        seed: the run's.
        batch_size: rows of a micro-batch.
        drop_last: leave out the rows of an epoch that do not fill a micro-batch.
        accumulation: micro-batches of a step; an epoch's last step takes what is left.
        schedule: from steps taken to the factor on the rate.
        clip: largest total norm of the gradients.
        autocast: a dtype for forward and loss.
        shuffle: False takes the rows as they come.
    """
    torch.manual_seed(derive_seed(seed, "model"))
    model = build_model()
    model.train()
    spared = [p for n, p in model.named_parameters() if n.endswith("bias") or "norm" in n.lower()]
    decayed = [p for n, p in model.named_parameters() if not (n.endswith("bias") or "norm" in n.lower())]
    updates = optimizer(decayed, spared)
    rates = None if schedule is None else torch.optim.lr_scheduler.LambdaLR(updates, schedule)
    step, epoch = 0, 0
    while step < steps:
        order = list(range(rows))
        if shuffle:
            generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
            order = torch.randperm(rows, generator=generator).tolist()
        batches = [order[start : start + batch_size] for start in range(0, rows, batch_size)]
        if drop_last and len(batches[-1]) < batch_size:
            batches.pop()
        for first in range(0, len(batches), accumulation):
            if step == steps:
                break
            micro_batches = batches[first : first + accumulation]
            torch.manual_seed(derive_seed(seed, "step", step, 0))
            for numbers in micro_batches:
                with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
                    loss = model(**make_batch(numbers))["loss"]
                share = len(numbers) / sum(map(len, micro_batches))
                (loss if share == 1 else loss * share).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            updates.step()
            updates.zero_grad()
            if rates is not None:
                rates.step()
            step += 1
        epoch += 1
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
