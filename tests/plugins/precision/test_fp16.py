"""`fp16` is `torch.autocast` and `torch.amp.GradScaler`; a step that overflows moves nothing but the scale."""

from __future__ import annotations

import copy

import pytest
import torch
from plugin_helpers import BATCH, Record, assert_same_weights, columns, fit, net

from drivetrain import ConfigError, PlanError, Shuffled, Trainer, TrainingError, hookimpl
from drivetrain.rng import derive_seed
from drivetrain.testing.digests import decode, digest, encode
from drivetrain.testing.probes import StopAt
from drivetrain.testing.ranks import run_ranks
from drivetrain_plugins import BF16, FP16, SGD, AdamW, Clip, Evaluate, Linear

HUGE = 2.0**24  # a scale at which the products of the backward pass overflow


class Seen:
    """A plugin that keeps what each step came to."""

    def __init__(self):
        self.skipped, self.rates, self.largest = [], [], []

    @hookimpl
    def gradients_ready(self, step):
        self.largest.append(max(p.grad.abs().max().item() for p in step.run.parameters))

    @hookimpl
    def step_end(self, step):
        self.skipped.append(step.skipped)
        self.rates.append(step.learning_rate)


def by_hand(model, data, steps, **scale):
    """Train as torch's documentation of mixed precision does; return how many updates there were."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (steps - step) / steps)
    scaler, rows, updates = torch.amp.GradScaler("cpu", **scale), len(data["labels"]), 0
    for step in range(steps):
        epoch, batch = divmod(step, -(-rows // BATCH))
        picked = Shuffled(rows, 0).order(epoch)[batch * BATCH : (batch + 1) * BATCH]
        torch.manual_seed(derive_seed(0, "step", step, 0))
        with torch.autocast("cpu", torch.float16):
            loss = model(**{name: column[picked] for name, column in data.items()})["loss"]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= before:
            schedule.step()
            updates += 1
        optimizer.zero_grad()
    return updates


def test_run_equals_torch_by_hand():
    """Overflows, growth, clipping, dropout and a schedule included, the weights are those of a loop by hand."""
    data, ours, theirs, seen = columns(), net(dropout=0.2), net(dropout=0.2), Seen()
    plugins = [FP16(init_scale=HUGE, growth_interval=3), AdamW(lr=0.02), Clip(0.5), Linear(), seen]
    fit(ours, plugins, data, steps=14)
    updates = by_hand(theirs, data, 14, init_scale=HUGE, growth_interval=3)
    assert_same_weights(ours, theirs)
    assert 2 < seen.skipped.count("overflow") == 14 - updates < 10


def test_skip_accounting():
    """Five steps with one overflow apply four updates, and the schedule ends where four updates end."""

    class Overflow:
        @hookimpl
        def forward(self, micro):
            loss = micro.run.model(**micro.batch)["loss"]
            return {"loss": loss * torch.inf if micro.step.number == 2 else loss}

    seen, model = Seen(), net()
    trainer, record = fit(model, [FP16(), SGD(lr=1.0), Linear(), Overflow(), seen], columns(), steps=5)
    progress = trainer.run.progress
    assert (progress.step, progress.applied, trainer.run.skipped_steps) == (5, 4, 1)
    assert seen.skipped == [None, None, "overflow", None, None]
    assert seen.rates == pytest.approx([1.0, 0.8, 0.6, 0.6, 0.4])
    assert trainer.run.schedule(progress.applied) == pytest.approx(0.2)
    assert record.of("skipped_steps") == [1, 1, 1]
    assert all(p.isfinite().all() for p in model.parameters())


def test_others_see_true_gradients_and_losses():
    """Whoever hears of the gradients, even in front of the list, finds them unscaled; losses are logged unscaled."""
    data, seen, plain = columns(), Seen(), Seen()
    _, record = fit(net(), [seen, SGD(), FP16()], data, steps=1)
    _, exact = fit(net(), [plain, SGD()], data, steps=1)
    assert seen.largest == pytest.approx(plain.largest, rel=1e-2)
    assert record.of("loss") == pytest.approx(exact.of("loss"), rel=1e-3)


def test_the_scale_saves_small_gradients():
    """Gradients below float16's smallest number arrive, where a loop without a scale loses them."""

    class Small:
        @hookimpl
        def compute_loss(self, micro):
            logits = micro.outputs["logits"]
            return torch.nn.functional.cross_entropy(logits, micro.batch["labels"]) * 1e-7 * micro.scale

    gone, kept = Seen(), Seen()
    model = net()
    fit(model, [FP16(init_scale=1.0), SGD(), Small(), gone], columns(), steps=1)
    fit(net(), [FP16(), SGD(), Small(), kept], columns(), steps=1)
    exact = Seen()
    fit(net(), [SGD(), Small(), exact], columns(), steps=1)
    assert kept.largest == pytest.approx(exact.largest, rel=1e-2)
    assert abs(gone.largest[0] - exact.largest[0]) > 0.05 * exact.largest[0]


def test_evaluations_are_autocast_and_not_scaled():
    """The loss of an evaluation is that of autocast by hand."""
    data, held, model = columns(), columns(8, seed=9), net()
    trainer, _ = fit(model, [FP16(), AdamW(lr=0.02), Evaluate()], data, held, steps=2)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        expected = model(**held)["loss"].item()
    assert trainer.run.metrics["evaluate/loss"] == expected


@pytest.mark.parametrize(("stop", "growth"), [(2, 0), (8, 1)])
def test_resume_is_exact(stop, growth):
    """Gone on with from a state as a checkpoint writes it, weights and scale are those of a run without a stop."""

    def begin(*more):
        plugins = [FP16(init_scale=HUGE, growth_interval=2), AdamW(lr=0.02), *more]
        trainer = Trainer(net(dropout=0.2), plugins, steps=12, device="cpu")
        return trainer.assemble(columns())

    def go_on(run):
        run.model.train()
        run.hooks.fit(run)
        return run

    straight, part, rest = go_on(begin()), go_on(begin(StopAt(stop))), begin()
    text, tensors = encode(copy.deepcopy(part.state_dict()))
    rest.load_state_dict(decode(text, tensors))
    restored = rest.plugins["fp16"].state_dict()
    assert restored["scale"] < HUGE
    assert restored["growth"] == growth
    assert digest(go_on(rest)) == digest(straight)


def test_overflows_without_end_are_told():
    """A run that overflows whatever the scale fails with the step's number, instead of skipping for ever."""

    class Broken:
        @hookimpl
        def forward(self, micro):
            return {"loss": micro.run.model(**micro.batch)["loss"] * torch.nan}

    with pytest.raises(TrainingError, match="fp16: gradients of step 3 and of 3 before it have overflowed"):
        fit(net(), [FP16(limit=4), SGD(), Broken()], columns(), steps=9)


def test_refusals():
    """Weights in float16, and a second precision, are refused before step 0."""
    with pytest.raises(ConfigError, match=r"'first\.weight' is float16"):
        Trainer(net().half(), [FP16(), SGD()], steps=1, device="cpu").fit(columns())
    with pytest.raises(PlanError, match="cannot be combined"):
        Trainer(net(), [FP16(), BF16(), SGD()], steps=1).fit(columns())


class Reduce:
    """Sum gradients over the ranks."""

    provides = ("data-parallel",)

    @hookimpl
    def gradients_ready(self, step):
        for parameter in step.run.parameters:
            if parameter.grad is None:  # this rank had no rows
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)


class OnRankOne:
    """Let the gradients of one rank overflow once."""

    @hookimpl
    def forward(self, micro):
        loss = micro.run.model(**micro.batch)["loss"]
        return {"loss": loss * torch.inf if micro.step.number == 1 and micro.run.rank == 1 else loss}


def on_a_rank():
    torch.manual_seed(0)
    trainer = Trainer(net(), [FP16(), SGD(lr=0.1), Reduce(), OnRankOne(), record := Record()], steps=3, device="cpu")
    trainer.fit(columns())
    state = trainer.plugins["fp16"].state_dict()
    return digest(trainer.run, "model"), state["scale"], trainer.run.progress.applied, record.of("skipped_steps")


def test_ranks_agree_on_an_overflow():
    """An overflow on one rank skips the step and lowers the scale on both."""
    first, second = run_ranks(on_a_rank)
    assert first == second
    assert first[1:] == (2.0**15, 2, [1])
