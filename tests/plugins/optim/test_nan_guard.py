"""`nan-guard`: what is not finite is named, skipped or undone."""

from __future__ import annotations

import pytest
import torch
from plugin_helpers import Record, as_rows, assert_same_weights, columns, fit, net

from drivetrain import PlanError, Trainer, TrainingError, hookimpl
from drivetrain.testing.digests import decode, digest, encode
from drivetrain.testing.probes import StopAt
from drivetrain.testing.ranks import run_ranks
from drivetrain_plugins import SGD, AdamW, Checkpoint, NanGuard


class Break:
    """Make the last layer's gradients infinite, or only the loss, in some steps; of one rank only, if one is named."""

    def __init__(self, *steps, loss=False, rank=None):
        self.steps, self.loss, self.rank = steps, loss, rank

    @hookimpl(tryfirst=True)
    def gradients_ready(self, step):
        if step.number in self.steps and self.rank in (None, step.run.rank):
            if self.loss:
                step.loss = step.loss * torch.nan
            else:
                step.run.model.last.bias.grad[1] = -torch.inf


class BreakWeights:
    """Make a weight NaN at the end of a step, so that every gradient from there on is."""

    def __init__(self, after):
        self.after = after

    @hookimpl
    def step_end(self, step):
        if step.number == self.after:
            with torch.no_grad():
                step.run.model.first.weight[0, 0] = torch.nan


@pytest.mark.parametrize(("loss", "told"), [(False, "gradients.*Received: 'last.bias'\n"), (True, "the loss is")])
def test_raising_names_step_and_parameters(loss, told):
    """On a CPU the run ends in the bad step, with its weights as they were before it."""
    model, before = net(), net()
    with pytest.raises(TrainingError, match=f"(?s)step 2: {told}"):
        fit(model, [SGD(), NanGuard(), Break(2, loss=loss)], columns(), steps=5)
    fit(before, [SGD()], columns(), steps=2)
    assert_same_weights(model, before)


def test_raising_at_the_log_interval_names_the_first_bad_step():
    """Where the flag is not read in the step, the log interval after it raises, and names that step's parameters."""
    heard = []

    class Heard:
        @hookimpl
        def step_end(self, step):
            heard.append(step.number)

    trainer = Trainer(
        net(), [SGD(), NanGuard(at_once=False), Break(3, 4), Heard()], steps=9, device="cpu", log_every="3 steps"
    )
    with pytest.raises(TrainingError, match=r"step 3: gradients are not finite.*Received: 'last.bias'\n"):
        trainer.fit(columns(80))
    assert heard == [0, 1, 2, 3, 4, 5]


def test_a_run_that_stops_between_two_logs_tells_as_well():
    """No flag is left unread at the end."""
    plugins = [SGD(), NanGuard(at_once=False), Break(1), StopAt(3)]
    trainer = Trainer(net(), plugins, steps=9, device="cpu", log_every="9 steps")
    with pytest.raises(TrainingError, match="step 1: gradients are not finite"):
        trainer.fit(columns())


def test_the_step_has_no_sync_where_the_flag_is_read_later(monkeypatch):
    """Nothing of a step asks a tensor for its value, so that no device is waited for."""
    trainer = Trainer(net(), [SGD(), NanGuard(at_once=False)], steps=3, device="cpu", log_every="3 steps")
    run = trainer.assemble(columns())
    step = run.hooks.plan_step
    run.stream = run.micros("train")
    made = step(run)
    run.hooks.count_items(made)
    run.hooks.accumulate(made)
    for name in ("item", "tolist", "__bool__", "__float__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    run.hooks.gradients_ready(made)


def test_no_checkpoint_of_bad_weights(tmp_path):
    """A checkpoint that is due before the log interval is not written."""
    trainer = Trainer(
        net(), [SGD(), NanGuard(at_once=False), Break(1), Checkpoint(every="2 steps")],
        steps=9, device="cpu", log_every="9 steps", output=tmp_path,
    )  # fmt: skip
    with pytest.raises(TrainingError, match="step 1: gradients"):
        trainer.fit(columns())
    assert list((tmp_path / "checkpoints").glob("step-*")) == []


def test_skipping_takes_the_steps_out():
    """Bad steps move nothing: the weights are those of a loop that leaves these batches out."""
    data, model, by_hand = columns(), net(), net()
    trainer, record = fit(model, [SGD(lr=0.3, momentum=0.9), NanGuard(policy="skip"), Break(1, 3)], data, steps=5)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.3, momentum=0.9)
    rows = trainer.run.batches["train"].sampler.order(0)
    for step in (0, 2, 4):
        optimizer.zero_grad()
        by_hand(**{name: column[rows[8 * step : 8 * step + 8]] for name, column in data.items()})["loss"].backward()
        optimizer.step()
    for name, weight in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-6, atol=1e-7)
    assert trainer.run.progress.applied == 3
    assert record.of("skipped_steps")[-1] == 2


def test_skipping_has_an_end():
    """So many bad steps in a row raise; a good one between them begins the count anew."""
    fit(net(), [SGD(), NanGuard(policy="skip", limit=3), Break(0, 1, 3, 4)], columns(), steps=6)
    with pytest.raises(TrainingError, match=r"step 4: .* 3 steps in a row"):
        fit(net(), [SGD(), NanGuard(policy="skip", limit=3), Break(0, 2, 3, 4)], columns(), steps=6)


def test_rolled_back_state_is_that_of_the_copy():
    """After the roll-back the run is bit for bit where it was before the copied step, and trains on as from there."""
    data, ours = columns(), net()
    plugins = [AdamW(lr=0.02), NanGuard(policy="roll-back", limit=2, every=2), BreakWeights(4)]
    run = fit(ours, [*plugins, StopAt(7)], data, steps=10)[0].run
    then = fit(net(), [AdamW(lr=0.02)], data, steps=4)[0].run
    assert digest(run, "model") == digest(then, "model")
    states = [r.state_dict()["optimizer"]["state"] for r in (run, then)]
    assert encode(states[0])[0] == encode(states[1])[0]
    assert all(torch.equal(a, b) for a, b in zip(*(encode(state)[1] for state in states), strict=True))
    # The rest of the run by hand: the batches of steps 7 to 9, from the weights of step 4.
    full = net()
    fit(full, plugins, data, steps=10)
    optimizer, rows = then.optimizer, as_rows(data)
    for step in (7, 8, 9):
        epoch, place = divmod(step, 5)
        picked = run.batches["train"].sampler.order(epoch)[8 * place : 8 * place + 8].tolist()
        batch = torch.utils.data.default_collate([rows[row] for row in picked])
        optimizer.zero_grad()
        then.model(**batch)["loss"].backward()
        optimizer.step()
    assert_same_weights(full, then.model)


def test_rates_follow_the_schedule_after_a_roll_back():
    """The loop sets the rates of the groups that the optimizer has after a roll-back."""
    from drivetrain_plugins import Linear

    held = []

    class Hold:
        @hookimpl
        def assembled(self, run):
            held.append(run.progress)

    plugins = [AdamW(lr=1.0), Linear(), NanGuard(policy="roll-back", limit=1, every=1), BreakWeights(2), Hold()]
    run = fit(net(), plugins, columns(80), steps=6)[0].run
    assert run.progress.epoch == 0  # at the next epoch the loop would look again in any case
    assert run.progress is held[0]  # whoever holds the counters still has them
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(1 - 4 / 6)


def test_a_roll_back_that_does_not_help_raises():
    """The same end twice in a row is told."""
    plugins = [SGD(), NanGuard(policy="roll-back", limit=2, every=1), Break(3, 4, 5, 6, 7)]
    with pytest.raises(TrainingError, match=r"step 6: .* a roll-back has not helped"):
        fit(net(), plugins, columns(), steps=9)


@pytest.mark.parametrize("stop", [3, 6, 7])
def test_resume_is_exact_around_a_roll_back(stop):
    """Stopped before, within and after the bad steps, a run ends as if it had not been."""

    def begin(*more):
        plugins = [AdamW(lr=0.02), NanGuard(policy="roll-back", limit=2, every=2), BreakWeights(4), *more]
        return Trainer(net(dropout=0.2), plugins, steps=10, device="cpu").assemble(columns())

    def go_on(run):
        run.model.train()
        run.hooks.fit(run)
        return run

    straight, part, rest = go_on(begin()), go_on(begin(StopAt(stop))), begin()
    rest.load_state_dict(decode(*encode(part.state_dict())))
    assert digest(go_on(rest)) == digest(straight)


def test_large_is_not_infinite():
    """Gradients whose squares overflow are finite, and are let through."""

    class Large:
        @hookimpl
        def gradients_ready(self, step):
            step.run.model.last.bias.grad.fill_(1e30)

    run = fit(net(), [SGD(lr=1e-30), Large(), NanGuard(policy="skip")], columns(), steps=2)[0].run
    assert run.skipped_steps == 0


class Sum:
    """Sum gradients over the ranks."""

    provides = ("data-parallel",)

    @hookimpl
    def gradients_ready(self, step):
        for parameter in step.run.parameters:
            torch.distributed.all_reduce(parameter.grad)


def on_a_rank(policy):
    """Train with a loss that one rank alone finds bad in step 1."""
    record = Record()
    guard = NanGuard(policy="raise", at_once=False) if policy == "later" else NanGuard(policy=policy)
    plugins = [SGD(), guard, Break(1, loss=True, rank=1), ("break:all", Break(2, loss=True)), Sum(), record]
    trainer = Trainer(net(), plugins, steps=3, device="cpu", log_every=3 if policy == "later" else 1)
    try:
        trainer.fit(columns(48))
    except TrainingError as error:
        return str(error)
    return digest(trainer.run, "model", "plugins"), record.of("skipped_steps")


def test_ranks_agree():
    """What one rank finds, all skip, and all raise."""
    first, second = run_ranks(on_a_rank, "skip")
    assert first == second
    assert first[1] == [1, 2]
    told, same = run_ranks(on_a_rank, "raise")
    assert told == same
    assert told.startswith("step 1: the loss is not finite")
    other, own = run_ranks(on_a_rank, "later")
    assert other.startswith("step 1: gradients are not finite")
    assert "on another rank" in other
    assert own.startswith("step 1: the loss is not finite")


def test_lbfgs_cannot_skip():
    """An optimizer that has begun its update when the gradients are there is refused with policies that skip."""
    from drivetrain_plugins import LBFGS

    with pytest.raises(PlanError, match="'nan-guard' and 'lbfgs' cannot be combined"):
        Trainer(net(), [LBFGS(), NanGuard(policy="skip")], steps=1).fit(columns())
