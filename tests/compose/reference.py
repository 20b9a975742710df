"""A training loop written by hand: what every composition of plugins is compared with, bit for bit.

It shares nothing with drivetrain but `derive_seed`, with which the documented streams are followed: the model is drawn
from ("model"), the order of an epoch from ("order", epoch), and each step's dropout from ("step", number, rank).
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import torch

from drivetrain.rng import derive_seed


def keyed(seed, name, *key):
    """Return the generator of a documented stream."""
    return torch.Generator().manual_seed(derive_seed(seed, name, *key))


def train(  # noqa: PLR0912 - one rule after the other, as a hand-written loop has them
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
    scale=None,
    stream=None,
    count=None,
    loss=None,
    summed=None,
    order=None,
    bounds=None,
    groups=None,
    prepares=(),
    gradients=None,
    edits=(),
    update=None,
    afters=(),
):
    """Train from scratch and return the parameters by name.

    Args:
        build_model: called without arguments after seeding; returns a module that takes a batch's items by name.
        make_batch: from a list of row numbers, a generator (or None) and the epoch to a batch, a dict of tensors or of strings.
        rows: how many there are.
        optimizer: from groups (dicts with "params", which may set "weight_decay" or "lr") to a `torch.optim.Optimizer`.
        steps: optimizer steps.
        seed: the run's.
        batch_size: rows of a micro-batch.
        drop_last: leave out the rows of an epoch that do not fill a micro-batch.
        accumulation: micro-batches of a step, or a function from the step; an epoch's last step takes what is left.
        schedule: from steps taken to the factor on the rate, or a list of such, one a group.
        clip: from the model to nothing; limits its gradients.
        autocast: a dtype for forward and loss.
        scale: arguments of `torch.amp.GradScaler`, which scales losses; a step whose gradients overflow is skipped.
        stream: the name under which a batch's generator is seeded, with the epoch and the position of its first row.
        count: from a batch to the number of its target items; rows, if None.
        loss: from (model, batch) to the mean loss; the model's own, if None.
        summed: from (model, batch) to the sum of item losses, instead of `loss`.
        order: from an epoch to the numbers of its rows; a permutation from ("order", epoch), if None.
        bounds: from an epoch to the places in its order where micro-batches begin and end, instead of `batch_size`.
        groups: from the model to the groups that `optimizer` takes, instead of weights, and biases and norms undecayed.
        prepares: each is called with the fresh model, before the optimizer is made; one may return another
            model, of which only what requires gradients is given to the optimizer.
        gradients: from (model, a function that adds the gradients of the step) to nothing, instead of calling it.
        edits: each is called with (model, step) when the gradients are there, before they are limited; True skips the step.
        update: from (optimizer, a function that makes the gradients anew and returns the loss) to nothing.
        afters: each is called with (model, step, optimizer) after an update.
    """
    count = count or (lambda batch: None)
    loss = loss or (lambda model, batch: model(**batch)["loss"])
    torch.default_generator.manual_seed(derive_seed(seed, "model"))
    model = build_model()
    model.train()
    learned = list(model.parameters())
    for prepare in prepares:
        adapted = prepare(model)
        if adapted is not None:
            model, learned = adapted, [p for p in adapted.parameters() if p.requires_grad]
    biases = {n for n, _ in model.named_parameters() if n.rpartition(".")[2] == "bias" or "norm" in n.lower()}
    kept = {id(p) for p in learned}
    spared = [p for n, p in model.named_parameters() if n in biases and id(p) in kept]
    decayed = [p for n, p in model.named_parameters() if n not in biases and id(p) in kept]
    split = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    updates = optimizer(groups(model) if groups else [group for group in split if group["params"]])
    taken = accumulation if callable(accumulation) else lambda step: accumulation
    scaler = None if scale is None else torch.amp.GradScaler("cpu", **scale)
    rates = None if schedule is None else torch.optim.lr_scheduler.LambdaLR(updates, schedule)
    step, epoch = 0, 0
    while step < steps:
        if order is None:
            numbers = torch.randperm(rows, generator=keyed(seed, "order", epoch)).tolist()
        else:
            numbers = list(order(epoch))
        edges = bounds(epoch) if bounds else [*range(0, len(numbers), batch_size), len(numbers)]
        cuts = list(itertools.pairwise(edges))
        if drop_last and bounds is None and cuts[-1][1] - cuts[-1][0] < batch_size:
            cuts.pop()
        first = 0
        while first < len(cuts) and step < steps:
            window, micro_batches, skips = cuts[first : first + taken(step)], [], []
            for start, end in window:
                draws = None if stream is None else keyed(seed, stream, epoch, start)
                micro_batches.append(make_batch(numbers[start:end], draws, epoch))
            items = [count(batch) for batch in micro_batches]
            items = [end - start if n is None else n for n, (start, end) in zip(items, window, strict=True)]
            first += len(window)

            def accumulate(micro_batches=micro_batches, items=items, skips=skips):
                total = 0.0
                for batch, number in zip(micro_batches, items, strict=True):
                    if number == 0:
                        continue
                    with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
                        value = (summed or loss)(model, batch)
                        share = number / sum(items)
                        factor = share / number if summed else share
                        value = value if factor == 1 else value * factor
                    (value if scaler is None else scaler.scale(value)).backward()
                    total = total + value.detach()
                return total

            def anew(accumulate=accumulate, step=step, skips=skips):
                torch.default_generator.manual_seed(derive_seed(seed, "step", step, 0))
                updates.zero_grad()
                total = accumulate() if gradients is None else gradients(model, accumulate)
                if scaler is not None:
                    scaler.unscale_(updates)
                    grads = [p.grad for p in model.parameters() if p.grad is not None]
                    skips.append(not all(bool(grad.isfinite().all()) for grad in grads))
                    scaler.update()
                skips += [edit(model, step) for edit in edits]
                if clip is not None:
                    clip(model)
                return total

            if update is not None:
                update(updates, anew)
            else:
                anew()
                if not any(skips):
                    updates.step()
            if not any(skips):
                for after in afters:
                    after(model, step, updates)
                if rates is not None:
                    rates.step()
            updates.zero_grad()
            step += 1
        epoch += 1
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
