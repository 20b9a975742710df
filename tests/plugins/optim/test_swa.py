"""`swa` is the mean of snapshots of the weights, with BatchNorm statistics made for it."""

from __future__ import annotations

import pytest
import torch
from around_helpers import SaveAt, Skip, Snapshots, go_on, same, weights_of
from plugin_helpers import CLASSES, FEATURES, assert_same_weights, columns, fit, net
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn, update_bn

from drivetrain import ConfigError
from drivetrain_plugins import SGD, SWA, Evaluate, ExportSafetensors, Loader, Sequential


def mean(plugin):
    return dict(plugin.state_dict()["mean"])


def closed_form(snapshots):
    return {name: torch.stack([s[name].double() for s in snapshots]).mean(0) for name in snapshots[0]}


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"start": "3 steps", "every": "1 step"}, range(3, 13)),
        ({"start": 0.5, "every": "2 steps"}, (6, 8, 10, 12)),
        ({"start": 0, "every": 5}, (5, 10)),
        ({"start": "1 epoch"}, (5, 10)),  # 40 rows in micro-batches of 8
    ],
)
def test_mean_of_the_snapshots(options, taken):
    """It equals the mean of the weights after the steps that are due, and torch's AveragedModel bit for bit."""
    swa, seen, reference = SWA(**options), Snapshots(), AveragedModel(net(), multi_avg_fn=get_swa_multi_avg_fn())
    fit(net(), [SGD(lr=0.2), swa, seen], columns(), steps=12)
    source = net()
    for number in taken:
        source.load_state_dict(seen.weights[number])
        reference.update_parameters(source)
    assert same(mean(swa), weights_of(reference.module))
    for name, expected in closed_form([seen.weights[number] for number in taken]).items():
        torch.testing.assert_close(mean(swa)[name].double(), expected, rtol=1e-6, atol=1e-6)


def test_skipped_step_owes_its_snapshot():
    """A snapshot due at a step that is skipped is taken after the next one that is applied."""
    swa, seen = SWA(start=0, every="3 steps"), Snapshots()
    fit(
        net(), [SGD(lr=0.2), Skip(2, 3), swa, seen], columns(), steps=8
    )  # due after steps 3 and 6; number 2 is the third
    for name, expected in closed_form([seen.weights[5], seen.weights[6]]).items():
        torch.testing.assert_close(mean(swa)[name].double(), expected, rtol=1e-6, atol=1e-6)
    assert swa.state_dict()["snapshots"] == 2


@pytest.mark.parametrize("at", [4, 7])
def test_resumed_mean_goes_on_bit_for_bit(at):
    """Saved before or after the start, also while a snapshot is owed, it ends as if nothing had been."""
    save, whole, resumed = SaveAt(at), SWA(start=0.5, every="2 steps"), SWA(start=0.5, every="2 steps")
    fit(net(0.2), [SGD(lr=0.2), Skip(5, 6), whole, save], columns(), steps=10)
    go_on(net(0.2), [SGD(lr=0.2), Skip(5, 6), resumed], columns(), save.state, steps=10)
    assert same(mean(whole), mean(resumed))
    assert whole.state_dict()["snapshots"] == resumed.state_dict()["snapshots"] == 2  # after 8 and 10


class Normed(torch.nn.Module):
    """A model with BatchNorm and dropout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.first, self.norm = torch.nn.Linear(FEATURES, 12), torch.nn.BatchNorm1d(12)
        self.drop, self.last = torch.nn.Dropout(0.3), torch.nn.Linear(12, CLASSES)

    def forward(self, features, labels=None):
        logits = self.last(self.drop(torch.tanh(self.norm(self.first(features)))))
        return {"logits": logits, "loss": torch.nn.functional.cross_entropy(logits, labels)}


@pytest.mark.parametrize("batches", [None, 2])
@pytest.mark.parametrize("workers", [0, 1])
def test_batch_norm_is_made_for_the_mean(tmp_path, workers, batches):
    """Exported statistics equal those of torch's update_bn, and the training ends with its own, bit for bit."""
    data, swa = columns(), SWA(start=0.3, every="2 steps", batch_norm_batches=batches)
    ours, plain, dev = Normed(), Normed(), columns(16, seed=9)
    common = [SGD(lr=0.3), Sequential(), Loader(batch_size=8, workers=workers)]
    fit(ours, [*common, swa, ExportSafetensors(), Evaluate(every="3 steps")], data, dev, steps=8, output=tmp_path)
    fit(plain, [SGD(lr=0.3), Sequential()], data, steps=8)
    assert_same_weights(ours, plain)
    reference = Normed()
    reference.load_state_dict({**reference.state_dict(), **mean(swa)})
    reference.drop.p = 0.0
    passes = [data["features"][start : start + 8] for start in range(0, 40, 8)][:batches]
    reference.forward = lambda features: Normed.forward(reference, features, torch.zeros(8, dtype=torch.long))
    update_bn(passes, reference)
    exported = load_file(tmp_path / "model.safetensors")
    assert not torch.equal(exported["norm.running_mean"], ours.norm.running_mean)
    for name, expected in reference.state_dict().items():
        torch.testing.assert_close(exported[name], expected, rtol=1e-6, atol=1e-6, msg=name)


def test_batch_norm_can_be_left(tmp_path):
    """Without update_batch_norm the statistics are those of training."""
    ours = Normed()
    swa = SWA(start=0.3, every="2 steps", update_batch_norm=False)
    fit(ours, [SGD(lr=0.3), swa, ExportSafetensors()], columns(), steps=8, output=tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["norm.running_mean"], ours.norm.running_mean)


def test_model_can_be_left_with_the_mean_and_its_statistics(tmp_path):
    """With in_model the model has weights and statistics of the mean once fit has ended, as the export has."""
    ours, swa = Normed(), SWA(start=0.3, every="2 steps", in_model=True)
    fit(ours, [SGD(lr=0.3), swa, ExportSafetensors()], columns(), steps=8, output=tmp_path)
    assert same(weights_of(ours), mean(swa))
    assert same(load_file(tmp_path / "model.safetensors"), {n: t.detach() for n, t in ours.state_dict().items()})


def test_before_the_first_snapshot_the_weights_are_evaluated():
    """An evaluation before the start is that of the trained weights."""
    dev, model = columns(16, seed=9), net()
    _, record = fit(model, [SGD(lr=0.5), SWA(start=0.9, every=5), Evaluate(every="2 steps")], columns(), dev, steps=4)
    with torch.no_grad():
        assert record.of("evaluate/loss")[-1] == pytest.approx(model.eval()(**dev)["loss"].item(), rel=1e-6)


def test_run_without_a_snapshot_says_so(caplog):
    """A cadence that never comes is told at the end."""
    fit(net(), [SGD(lr=0.5), SWA(start=0.5, every="90 steps")], columns(), steps=4)
    assert "swa: the run has ended without a snapshot" in caplog.text


def test_start_behind_the_end_is_refused():
    """An average that would never begin is refused when the run is assembled."""
    with pytest.raises(ConfigError, match="swa: it would start when the run has ended"):
        fit(net(), [SGD(lr=0.5), SWA(start="11 steps")], columns(), steps=10)


@pytest.mark.parametrize("options", [{"every": "1 minute"}, {"start": "2 hours"}, {"start": -1}, {"start": 2.5}])
def test_moments_that_are_no_function_of_progress_are_refused(options):
    """Wall-clock cadences, negative and broken numbers of steps are refused with the value."""
    with pytest.raises(ValueError, match="Received"):
        SWA(**options)
