"""`ema` keeps an exponential moving average, which is evaluated and exported, and leaves training alone."""

from __future__ import annotations

import pytest
import torch
from around_helpers import SaveAt, Skip, Snapshots, go_on, same, weights_of
from plugin_helpers import assert_same_weights, columns, fit, net
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from drivetrain import Trainer, hookimpl
from drivetrain_plugins import EMA, SGD, AdamW, Evaluate, ExportSafetensors


def average(plugin):
    return dict(plugin.state_dict()["average"])


def by_hand(weights, decays):
    """Average snapshots, the first of which is the start."""
    found = {name: value.clone() for name, value in weights[0].items()}
    for snapshot, decay in zip(weights[1:], decays, strict=True):
        for name, value in found.items():
            value.lerp_(snapshot[name], 1 - decay)
    return found


@pytest.mark.parametrize("every", [1, 3])
def test_average_equals_torch(every):
    """Without warm-up it is what torch's AveragedModel makes of the same snapshots, bit for bit."""
    ema, seen, reference = EMA(decay=0.9, warmup=False, every=every), Snapshots(), AveragedModel(
        net(), multi_avg_fn=get_ema_multi_avg_fn(0.9)
    )  # fmt: skip
    fit(net(), [SGD(lr=0.2), ema, seen], columns(), steps=11)
    source = net()
    for weights in [seen.weights[0], *seen.weights[every::every]]:
        source.load_state_dict(weights, strict=True)
        reference.update_parameters(source)
    assert same(average(ema), weights_of(reference.module))
    assert not torch.equal(average(ema)["first.weight"], seen.weights[-1]["first.weight"])


def test_warm_up_keeps_less_at_first():
    """The decay of the n-th update is min(decay, (1 + n) / (10 + n)), which is the closed form of the averages."""
    ema, seen = EMA(decay=0.3), Snapshots()
    fit(net(), [SGD(lr=0.2), ema, seen], columns(), steps=6)
    decays = [min(0.3, (1 + n) / (10 + n)) for n in range(6)]
    assert decays[0] == 0.1
    assert decays[-1] == 0.3
    assert same(average(ema), by_hand(seen.weights, decays))


def test_skipped_steps_move_nothing():
    """A step that is not applied is no update: the average and its count are those of the other steps."""
    ema, seen = EMA(decay=0.9), Snapshots()
    fit(net(), [SGD(lr=0.2), Skip(1, 4), ema, seen], columns(), steps=6)
    applied = [seen.weights[number] for number in (0, 1, 3, 4, 6)]
    assert same(average(ema), by_hand(applied, [(1 + n) / (10 + n) for n in range(4)]))
    assert ema.state_dict()["updates"] == 4


def test_evaluation_sees_the_average_and_training_does_not():
    """The evaluation loss is that of the average, and the weights end bit for bit as without the plugin."""
    data, dev, ema, ours, plain = columns(), columns(16, seed=9), EMA(decay=0.5, warmup=False), net(0.1), net(0.1)
    _, record = fit(ours, [SGD(lr=0.5), Evaluate(every="2 steps"), ema], data, dev, steps=6)
    fit(plain, [SGD(lr=0.5)], data, steps=6)
    assert_same_weights(ours, plain)
    averaged = net().eval()
    averaged.load_state_dict(average(ema))
    with torch.no_grad():
        expected, trained = averaged(**dev)["loss"].item(), ours.eval()(**dev)["loss"].item()
    assert record.of("evaluate/loss")[-1] == pytest.approx(expected, rel=1e-6)
    assert abs(expected - trained) > 1e-3


@pytest.mark.parametrize("in_exports", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_exports_hold_the_average(tmp_path, first, in_exports):
    """Files written at the end of the run and later hold the average, wherever it stands in the list; the model does not."""
    ema, model, plain = EMA(decay=0.5, in_exports=in_exports), net(), net()
    plugins = [ema, ExportSafetensors()] if first else [ExportSafetensors(), ema]
    trainer, _ = fit(model, [SGD(lr=0.5), *plugins], columns(), steps=5, output=tmp_path)
    trainer.export("safetensors", tmp_path / "later.safetensors")
    fit(plain, [SGD(lr=0.5)], columns(), steps=5)
    assert_same_weights(model, plain)
    expected = average(ema) if in_exports else weights_of(plain)
    assert same(load_file(tmp_path / "model.safetensors"), expected)
    assert same(load_file(tmp_path / "later.safetensors"), expected)


def test_model_can_be_left_with_the_average(tmp_path):
    """With in_model the model, and an evaluation after the run, have the average once fit has ended."""
    ema, model, dev = EMA(decay=0.5, in_model=True), net(), columns(16, seed=9)
    trainer, record = fit(
        model, [SGD(lr=0.5), ema, ExportSafetensors(), Evaluate()], columns(), dev, steps=5, output=tmp_path
    )
    assert same(weights_of(model), average(ema))
    assert same(load_file(tmp_path / "model.safetensors"), average(ema))
    assert trainer.evaluate()["loss"] == record.of("evaluate/loss")[0]


def test_failed_evaluation_gives_the_weights_back():
    """Whatever is raised within an evaluation, the trained weights are in the model afterwards."""

    class Fails:
        @hookimpl
        def metrics(self, run, split):
            raise RuntimeError("a test")

    model, seen = net(), Snapshots()
    with pytest.raises(RuntimeError, match="a test"):
        fit(
            model,
            [SGD(lr=0.5), EMA(decay=0.5), seen, Evaluate(every="3 steps"), Fails()],
            columns(),
            columns(8),
            steps=5,
        )
    assert same(weights_of(model), seen.weights[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_average_goes_on_bit_for_bit(dtype):
    """Saved in the middle, it ends as if nothing had been; half-precision weights have an average in float32."""
    data, save = {**columns(), "features": columns()["features"].to(dtype)}, SaveAt(3)
    whole, resumed = EMA(decay=0.95, every=2), EMA(decay=0.95, every=2)
    ours = net().to(dtype)
    fit(ours, [AdamW(lr=0.05, fused=False), whole, save], data, steps=9)
    run = go_on(net().to(dtype), [AdamW(lr=0.05, fused=False), resumed], data, save.state, steps=9)
    assert same(weights_of(ours), weights_of(run.model))
    assert same(average(whole), average(resumed))
    assert {value.dtype for value in average(whole).values()} == {torch.float32}
    assert whole.state_dict()["updates"] == resumed.state_dict()["updates"] == 4


def test_half_precision_weights_are_evaluated_rounded():
    """What an evaluation has of a float32 average of bfloat16 weights is the average in bfloat16."""
    ema, model = EMA(decay=0.9), net().bfloat16()
    data = {**columns(), "features": columns()["features"].bfloat16()}
    trainer, _ = fit(model, [SGD(lr=0.5), ema], data, steps=3)
    before = weights_of(model)
    with ema.averaged(trainer.run):
        assert same(weights_of(model), {name: value.bfloat16() for name, value in average(ema).items()})
    assert same(weights_of(model), before)


def test_average_begins_where_it_is_added():
    """A run that had none, and goes on with one, averages from the weights that were loaded."""
    save, ema, seen = SaveAt(4), EMA(decay=0.9), Snapshots()
    fit(net(), [SGD(lr=0.5), save], columns(), steps=8)
    go_on(net(), [SGD(lr=0.5), ema, seen], columns(), save.state, steps=8)
    loaded = weights_of(net())
    trainer = Trainer(net(), [SGD(lr=0.5)], device="cpu", steps=4)
    trainer.fit(columns())
    loaded = weights_of(trainer.run.model)
    assert same(average(ema), by_hand([loaded, *seen.weights[1:]], [(1 + n) / (10 + n) for n in range(4)]))


@pytest.mark.parametrize("buffers", [True, False])
def test_buffers_are_averaged_if_asked_to(buffers):
    """BatchNorm's statistics are the newest in an evaluation, or averages like the weights; the count stays."""
    model, statistics = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.BatchNorm1d(3)), []

    class Watch:
        @hookimpl
        def step_end(self, step):
            statistics.append({n: b.clone() for n, b in step.run.model.named_buffers()})

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, features, labels):
            return {"loss": torch.nn.functional.cross_entropy(self.body(features), labels)}

    ema = EMA(decay=0.5, warmup=False, buffers=buffers)
    trainer, _ = fit(Model(), [SGD(lr=0.5), ema, Watch()], columns(), steps=3)
    expected = torch.zeros(3)
    for snapshot in statistics:
        expected.lerp_(snapshot["body.1.running_mean"], 0.5)
    with ema.averaged(trainer.run):
        shown = {n: b.clone() for n, b in trainer.run.model.named_buffers()}
    assert torch.equal(shown["body.1.running_mean"], expected if buffers else statistics[-1]["body.1.running_mean"])
    assert shown["body.1.num_batches_tracked"] == 3


def test_other_averages_are_refused():
    """Two averages cannot both be what is evaluated."""
    plan = Trainer(net(), [SGD(), EMA(), "swa"], steps=2).plan(given=["train"])
    assert any("'ema'" in str(p) and "'swa'" in str(p) for p in plan.problems)
