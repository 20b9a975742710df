"""`export-safetensors`: one file with the weights of any module."""

from __future__ import annotations

import pytest
import torch
from plugin_helpers import CLASSES, Crash, assert_same_weights, columns, fit, net
from safetensors import safe_open
from safetensors.torch import load_file, load_model

from drivetrain import ConfigError, Trainer
from drivetrain_plugins import SGD, ExportSafetensors


class Tied(torch.nn.Module):
    """An embedding whose weights are the output layer's too, and a buffer."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(CLASSES, 5)
        self.scale = torch.nn.BatchNorm1d(5)
        self.head = torch.nn.Linear(5, CLASSES, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, features, labels):
        return torch.nn.functional.cross_entropy(
            self.head(self.scale(self.embed(features.long().abs() % CLASSES).mean(1))), labels
        )


def written(model, path, **options):
    """Export a model as it is, and return it as the run has it."""
    trainer = Trainer(model, [SGD(), ExportSafetensors(at_end=False, **options)], steps=1, device="cpu")
    trainer.assemble(columns())
    trainer.export("safetensors", path)
    return trainer.run.model


def test_file_holds_the_module_s_state(tmp_path):
    """Every parameter and buffer, bit for bit, under its own name; the header says what wrote it."""
    model = written(net(), tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(model.state_dict())
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_cast_and_the_run_s_are_not(dtype, tmp_path):
    """With `dtype` the file holds what torch's own cast gives; counters stay integers, tied weights stay one."""
    trainer, _ = fit(Tied(), [SGD(lr=0.1), ExportSafetensors(dtype=dtype)], columns(), steps=2, output=tmp_path)
    assert {p.dtype for p in trainer.run.model.parameters()} == {torch.float32}
    fresh = Tied().to(getattr(torch, dtype))
    assert load_model(fresh, tmp_path / "model.safetensors") == (set(), [])
    assert_same_weights(fresh, trainer.run.model.to(getattr(torch, dtype)))
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["scale.num_batches_tracked"].dtype == torch.int64
    assert len(stored.keys() & {"embed.weight", "head.weight"}) == 1


def test_weights_that_lie_otherwise_in_memory_are_stored(tmp_path):
    """A transposed weight, as some models have, is written as what it is."""
    model = net()
    with torch.no_grad():
        model.last.weight = torch.nn.Parameter(torch.randn(10, CLASSES).t())
    written(model, tmp_path / "model.safetensors")
    assert torch.equal(load_file(tmp_path / "model.safetensors")["last.weight"], model.last.weight)


def test_run_ends_with_the_file_and_tied_weights_come_back_tied(tmp_path):
    """At the end of a run, tied weights are stored once, and `load_model` gives a module with them tied."""
    trainer, _ = fit(Tied(), [SGD(lr=0.1), ExportSafetensors()], columns(), steps=3, output=tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert len(names & {"embed.weight", "head.weight"}) == 1
    fresh = Tied()
    assert load_model(fresh, tmp_path / "model.safetensors") == (set(), [])
    assert fresh.head.weight is fresh.embed.weight
    assert_same_weights(fresh, trainer.run.model)


def test_export_on_request(tmp_path):
    """`Trainer.export` writes the same bytes anywhere, making the folders above it."""
    trainer, _ = fit(net(), [SGD(lr=0.1), ExportSafetensors()], columns(), steps=2, output=tmp_path)
    trainer.export("safetensors", tmp_path / "deep" / "model.st")
    assert (tmp_path / "deep/model.st").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("folder", [False, True])
def test_what_stands_at_the_target_is_replaced(folder, tmp_path):
    """An older file or an empty folder makes way, and nothing is left beside the new one."""
    target = tmp_path / "here" / "weights.safetensors"
    target.parent.mkdir()
    if folder:
        target.mkdir()
    else:
        target.write_text("old")
    trainer, _ = fit(net(), [SGD(lr=0.1), ExportSafetensors(to=str(target))], columns(), steps=2)
    assert [path.name for path in target.parent.iterdir()] == ["weights.safetensors"]
    fresh = net()
    load_model(fresh, target)
    assert_same_weights(fresh, trainer.run.model)


def test_an_older_file_stays_when_writing_fails(tmp_path, monkeypatch):
    """A write that fails half-way leaves the older file as it was."""
    import safetensors.torch

    trainer, _ = fit(net(), [SGD(lr=0.1), ExportSafetensors()], columns(), steps=2, output=tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(model, path, **_):
        with open(path, "w") as file:  # noqa: PTH123
            file.write("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_model", full)
    with pytest.raises(ConfigError, match="No space left"):
        trainer.export("safetensors", tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_target_below_a_file_is_refused(tmp_path):
    """A place where nothing can be written is drivetrain's error, with what to do."""
    (tmp_path / "file").touch()
    trainer, _ = fit(net(), [SGD(), ExportSafetensors()], columns(), steps=1, output=tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be written[\s\S]*choose another place"):
        trainer.export("safetensors", tmp_path / "file" / "model.safetensors")


def test_a_run_that_fails_exports_nothing(tmp_path):
    """Only a run that ended well leaves an export."""
    with pytest.raises(KeyboardInterrupt):
        fit(net(), [SGD(), ExportSafetensors(), Crash(2)], columns(), steps=3, output=tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_it_only_observes(tmp_path):
    """Weights with and without it are bit-identical."""
    with_it, without = net(dropout=0.2), net(dropout=0.2)
    fit(with_it, [SGD(lr=0.1), ExportSafetensors()], columns(), steps=4, output=tmp_path)
    fit(without, [SGD(lr=0.1)], columns(), steps=4)
    assert_same_weights(with_it, without)


def test_a_run_without_a_place_is_refused_before_training():
    """Without `to` and without a run's folder there is no place, and that is said before the first step."""
    with pytest.raises(ConfigError, match="export-safetensors needs a place: give it `to`"):
        fit(net(), [SGD(), ExportSafetensors()], columns(), steps=1)
