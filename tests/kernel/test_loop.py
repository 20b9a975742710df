"""The loop against a hand-written one, and the laws of numbers."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from drivetrain import ConfigError, Micro, Stage, Step, Trainer, TrainingError, Transform, hookimpl
from drivetrain.data import Sequential
from drivetrain.rng import derive_seed
from drivetrain.testing import BaseOptimizer, Recorder, StopAt, digest, make_run, make_step
from drivetrain.testing.carriers import tiny_module
from drivetrain.testing.kinds import tensor_rows
from drivetrain.testing.probes import Ragged
from drivetrain_plugins import Accumulate, Linear, Loader

VOCABULARY = 11


class Tagger(torch.nn.Module):
    """Class scores of each token, and the mean loss over those whose label is not -100."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, 8)
        self.head = torch.nn.Linear(8, VOCABULARY)

    def forward(self, tokens, labels):
        logits = self.head(torch.tanh(self.embed(tokens)))
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def tagger(dtype):
    torch.manual_seed(3)
    return Tagger().to(dtype)


def sentences(count=12, length=9):
    """Return token rows of which each has another number of labels; one has none."""
    draws = torch.Generator().manual_seed(8)
    tokens = torch.randint(0, VOCABULARY, (count, length), generator=draws)
    labels = torch.randint(0, VOCABULARY, (count, length), generator=draws)
    for row in range(count):
        labels[row, : row * 7 % (length + 1)] = -100
    labels[4] = -100
    return {"tokens": tokens, "labels": labels}


class InOrder:
    """Take the rows as they come."""

    @hookimpl
    def build_sampler(self, run, split):
        return Sequential(len(run.datasets[split]))


def gradients(model, sizes, rows):
    run = make_run(Ragged(sizes), InOrder(), model=model, train=rows, steps=1)
    step = make_step(run, micros=len(sizes), gradients=True)
    return [p.grad.clone() for p in model.parameters()], step


def test_a_run_equals_a_hand_written_loop():
    """Two epochs with dropout, a schedule and ragged accumulation give the bits of a loop written out here."""
    run = make_run(
        BaseOptimizer(), Linear(warmup=0.3), Loader(batch_size=7), Accumulate(4), model=tiny_module(), epochs=2
    )
    run.hooks.fit(run)

    rows, model = tensor_rows(40), tiny_module()
    norms = [p for n, p in model.named_parameters() if "bias" in n or "norm" in n]
    others = [p for n, p in model.named_parameters() if not ("bias" in n or "norm" in n)]
    optimizer = torch.optim.SGD([{"params": others}, {"params": norms}], lr=0.1, momentum=0.9)
    step = 0
    for epoch in range(2):
        generator = torch.Generator().manual_seed(derive_seed(7, "order", epoch))
        batches = torch.randperm(40, generator=generator).split(7)
        for micros in (batches[:4], batches[4:]):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (step / 2 if step < 2 else (4 - step) / 2)
            torch.manual_seed(derive_seed(7, "step", step, 0))
            for numbers in micros:
                loss = model(rows["x"][numbers], rows["labels"][numbers])["loss"]
                (loss * (len(numbers) / sum(map(len, micros)))).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    assert run.progress.step == step == 4
    for (name, ours), theirs in zip(run.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_ragged_accumulation_is_one_big_batch(dtype, tolerance):
    """Law of the loss: micro-batches of 1, 5, 2 and 4 rows with other numbers of labels give the big batch's gradient."""
    rows = sentences()
    wanted = tagger(dtype)
    loss = wanted(**rows)["loss"]
    loss.backward()
    found, step = gradients(tagger(dtype), (1, 5, 2, 4), rows)
    for ours, theirs in zip(found, wanted.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(step.loss, loss.detach(), rtol=tolerance, atol=tolerance)
    assert step.num_items == int((rows["labels"] != -100).sum())
    assert step.num_rows == 12


def test_a_mean_of_means_would_be_another_gradient():
    """The check above can tell: weighing micro-batches equally misses the big batch by far more than rounding."""
    rows, wanted, wrong = sentences(), tagger(torch.float64), tagger(torch.float64)
    wanted(**rows)["loss"].backward()
    for part in ((0, 3), (3, 12)):
        (wrong(rows["tokens"][slice(*part)], rows["labels"][slice(*part)])["loss"] / 2).backward()
    assert (wrong.head.weight.grad - wanted.head.weight.grad).abs().max() > 1e-3


def test_a_micro_batch_without_labels_is_passed_over():
    """One whose labels are all -100 has a mean of 0/0; it adds nothing, and no NaN."""
    rows, wanted = sentences(), tagger(torch.float64)
    wanted(**rows)["loss"].backward()
    found, step = gradients(tagger(torch.float64), (4, 1, 7), rows)  # row 4 has no labels
    assert step.micros[1].num_items == 0
    for ours, theirs in zip(found, wanted.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-12, atol=1e-12)


def test_a_step_without_labels_is_skipped():
    """With no target at all there is nothing to learn: the step counts as attempted, and changes nothing."""
    rows = sentences()
    rows["labels"][:] = -100
    model = tagger(torch.float32)
    before = [p.clone() for p in model.parameters()]
    run = make_run(Linear(), model=model, train=rows, steps=3)
    run.hooks.fit(run)
    assert (run.progress.step, run.progress.applied, run.skipped_steps) == (3, 0, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert run.metrics["learning_rate"] == 0.1
    assert run.metrics["skipped_steps"] == 3


class SkipSome:
    """Skip steps 1 and 2, as a guard against overflow would, and keep the rates of all steps."""

    def __init__(self, skip=(1, 2)):
        self.skip, self.rates = skip, []

    @hookimpl
    def gradients_ready(self, step):
        if step.number in self.skip:
            step.skip("the test says so")

    @hookimpl
    def step_end(self, step):
        self.rates.append(step.learning_rate)


def test_skipped_is_skipped():
    """A skipped step moves no weight, no momentum, no schedule and no count of applied steps; data and steps go on."""
    guard = SkipSome()
    run = make_run(Linear(), guard, steps=6)
    run.hooks.fit(run)
    assert guard.rates == pytest.approx([0.1 * (6 - applied) / 6 for applied in (0, 1, 1, 1, 2, 3)])
    assert (run.progress.step, run.progress.applied, run.skipped_steps) == (6, 4, 2)
    assert run.progress.rows == 48
    only_skipped = make_run(SkipSome(range(6)), steps=6)
    before = digest(only_skipped, "model")
    for parameter, fresh in zip(only_skipped.model.parameters(), tiny_module().parameters(), strict=True):
        assert torch.equal(parameter, fresh)
    only_skipped.hooks.fit(only_skipped)
    assert only_skipped.optimizer.state == {}
    assert digest(only_skipped, "model") != before  # its row counter moved; the weights did not:
    assert all(
        torch.equal(p, q) for p, q in zip(only_skipped.model.parameters(), tiny_module().parameters(), strict=True)
    )


def test_the_last_window_of_an_epoch_steps_once():
    """Five micro-batches in windows of two make three steps an epoch; the last has one micro-batch of full weight."""
    recorder = Recorder()
    run = make_run(Accumulate(2), recorder, epochs=2)
    assert run.total_steps == 6
    run.hooks.fit(run)
    assert [recorder.at(step).count("backward") for step in range(6)] == [2, 2, 1, 2, 2, 1]
    assert run.progress.epoch == 2
    assert run.progress.rows == 80


def test_the_order_depends_on_neither_batch_size_nor_plugins():
    """Law of order: the rows come in one order per (seed, epoch), whatever cuts them into batches."""

    def order(*plugins, **settings):
        run = make_run(*plugins, **settings)
        rows = run.datasets["train"].columns["x"]
        seen = torch.cat([micro.batch["x"] for micro in run.batches["train"].iterate(1)])
        return [int((rows == x).all(1).nonzero()) for x in seen]

    first = order(Loader(batch_size=8))
    assert sorted(first) == list(range(40))
    assert order(Loader(batch_size=3)) == first
    assert order(Loader(batch_size=64), Accumulate(2), Recorder()) == first
    assert order(seed=8) != first


def test_a_position_is_reached_without_what_comes_before():
    """Starting an epoch at row 24 gives the batches that the whole epoch gives from there on."""
    run = make_run(Loader(batch_size=8))
    whole = [m.batch["x"] for m in run.batches["train"].iterate(2)]
    later = [m.batch["x"] for m in run.batches["train"].iterate(2, 24)]
    assert len(later) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], later, strict=True))


class Draws:
    """A plugin with a stream of its own, that also draws from every global generator when a step is over."""

    def __init__(self, name="draws"):
        self.name, self.drawn = name, []

    @hookimpl
    def step_end(self, step):
        self.drawn.append(step.run.generator(self.name, step.number).initial_seed())
        torch.rand(3), random.random(), np.random.random()  # noqa: NPY002


def test_streams_are_independent_of_other_plugins():
    """Adding a plugin that draws changes neither dropout nor another plugin's stream, even if it draws globally."""
    alone = Draws("one")
    run = make_run(alone)
    run.hooks.fit(run)
    both = Draws("one")
    other = make_run(("more", Draws("two")), ("one", both), ("again", Draws("three")))
    other.hooks.fit(other)
    assert both.drawn == alone.drawn
    assert len(set(alone.drawn)) == 6
    assert digest(other, "model", "optimizer") == digest(run, "model", "optimizer")


def test_votes_are_acted_on_at_the_boundary():
    """A stop asked for in a step ends the run after it, with the reason that was given first."""
    run = make_run(StopAt(2))
    run.hooks.fit(run)
    assert run.progress.step == 2
    assert run.stopped == "the test asked for it"


def test_the_log_averages_over_its_interval():
    """The loss that is logged is the mean over the steps since the last log, made a number once."""
    heard, losses = [], []

    class Listens:
        @hookimpl
        def step_end(self, step):
            losses.append(step.loss.item())

        @hookimpl
        def log(self, metrics):
            heard.append(metrics)

    run = make_run(Listens(), log_every=4, steps=6)
    run.hooks.fit(run)
    assert [m["loss"] for m in heard] == pytest.approx([math.fsum(losses[:4]) / 4, math.fsum(losses[4:]) / 2])
    assert [m["epoch"] for m in heard] == pytest.approx([0.8, 1.2])


def test_transforms_apply_in_the_order_of_stages():
    """Whatever the list says, a model is adapted before it is compiled, and compiled before it is sharded."""
    done = []

    def wants(stage):
        class Wants:
            @hookimpl
            def transforms(self):
                return [Transform(stage, lambda model: done.append(stage) or model)]

        return Wants()

    make_run(*[(stage.name, wants(stage)) for stage in (Stage.SHARD, Stage.ADAPT, Stage.COMPILE, Stage.PARTITION)])
    assert done == [Stage.ADAPT, Stage.PARTITION, Stage.COMPILE, Stage.SHARD]


def test_a_model_without_a_loss_is_told_what_to_return():
    """The error says what came out of the model, and what to do."""
    run = make_run(model=torch.nn.Linear(8, 3), train=[(row,) for row in tensor_rows(8)["x"]])
    with pytest.raises(TrainingError, match=r"returned no scalar loss.*Received: Tensor"):
        make_step(run, gradients=True)


def test_the_parts_of_a_step_can_be_called_by_themselves():
    """`make_step` fires the hooks up to the gradients, and the rest can be fired one by one."""
    run = make_run()
    step = make_step(run, micros=2, gradients=True)
    assert isinstance(step.micros[0], Micro)
    assert [m.scale for m in step.micros] == [0.5, 0.5]
    norm = run.hooks.grad_norm(step)
    wanted = torch.nn.utils.get_total_norm([p.grad for p in run.parameters])
    assert torch.equal(norm, wanted)
    before = run.model.head.weight.clone()
    run.hooks.optimizer_step(step)
    run.hooks.zero_grad(step)
    assert not torch.equal(before, run.model.head.weight)
    assert all(p.grad is None for p in run.parameters)


def test_a_step_without_target_items_is_left_out_of_the_logged_mean():
    """The mean over an interval is that of the steps that had a loss; a step of ignored labels is none of them."""

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, labels):
            return self.weight * 3.0

    logged = []

    class Listener:
        @hookimpl
        def log(self, metrics):
            logged.append(metrics["loss"])

        @hookimpl
        def build_sampler(self):
            return self

        def order(self, epoch):
            return torch.arange(32)

        @hookimpl
        def build_optimizer(self, groups):
            return torch.optim.SGD(groups, lr=1e-12)

    labels = torch.cat([torch.zeros(8), torch.full((16,), -100), torch.zeros(8)]).long()
    Trainer(Loss(), [Listener()], steps=4, log_every=4, device="cpu").fit({"labels": labels})
    assert logged == [pytest.approx(3.0)]


def test_outputs_without_a_loss_are_named():
    """A model that returns a tuple, as some do, is told what is expected of it."""

    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            return (self.weight * x.sum(), x)

    class Optimizer:
        @hookimpl
        def build_optimizer(self, groups):
            return torch.optim.SGD(groups, lr=0.1)

    with pytest.raises(TrainingError, match=r"no scalar loss.*tuple"):
        Trainer(Pair(), [Optimizer()], steps=1, device="cpu").fit({"x": torch.ones(8, 2)})


def test_a_run_inside_a_checkpoint_is_refused(tmp_path):
    """An output folder below a checkpoint would be an unlisted file in it; it is refused before anything is made."""
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="lies inside the checkpoint"):
        Trainer(tiny_module(), [BaseOptimizer()], steps=1, output=tmp_path / "run").fit(tensor_rows(8))
    assert not (tmp_path / "run").exists()


class TwoRates:
    """Two groups with rates of their own."""

    def __init__(self, schedules):
        self.schedules, self.rates = schedules, []

    @hookimpl
    def build_optimizer(self, run, groups):
        return torch.optim.SGD([dict(g, lr=lr) for g, lr in zip(groups, (0.1, 0.4), strict=True)])

    @hookimpl
    def build_schedule(self, run):
        return self.schedules

    @hookimpl
    def gradients_ready(self, step):
        self.rates.append([group["lr"] for group in step.run.optimizer.param_groups])


def test_a_schedule_is_one_function_or_one_a_group():
    """A function moves all groups together; a list gives each its own, and must fit."""
    halves, constant = (lambda step: 0.5**step), (lambda step: 1.0)
    for schedules, wanted in (
        (halves, [[0.1, 0.4], [0.05, 0.2], [0.025, 0.1]]),
        ([halves, constant], [[0.1, 0.4], [0.05, 0.4], [0.025, 0.4]]),
    ):
        plugin = TwoRates(schedules)
        run = make_run(plugin, steps=3)
        run.hooks.fit(run)
        assert plugin.rates == [pytest.approx(rates) for rates in wanted]
    run = make_run(TwoRates([halves]), steps=3)
    with pytest.raises(ConfigError, match="1 functions for 2 groups"):
        run.hooks.fit(run)


class Twice:
    """Take one, then two micro-batches, and say how many steps that makes."""

    reads = ("accumulation",)

    @hookimpl
    def plan_step(self, run):
        micros = [m for _, m in zip(range(1 + run.progress.step % 2), run.stream, strict=False)]
        return Step(run, run.progress.step, micros) if micros else None

    @hookimpl
    def count_steps(self, run):
        return 4


def test_who_plans_the_steps_counts_them():
    """`count_steps` is asked before the schedule is built, and ends the run."""
    run = make_run(Twice(), epochs=1)
    assert run.total_steps == 4
    run.hooks.fit(run)
    assert run.progress.step == 4
    assert run.progress.epoch == 1, "5 micro-batches: 1, 2, 1, 1"
