"""What all exporters share: places, ranks, failures of one of them, and copies of models."""

from __future__ import annotations

import pytest
import torch
from plugin_helpers import assert_same_weights, columns, cpu_run, fit, net
from safetensors.torch import load_file

from drivetrain import ConfigError, Trainer, hookimpl
from drivetrain_plugins import SGD, ExportONNX, ExportSafetensors, ExportTorch
from drivetrain_plugins.shared.exports import remade


def test_a_place_that_cannot_be_written_is_refused_before_training(tmp_path):
    """Below a file there is no folder: that is told before the first step, with the plugin's name."""
    (tmp_path / "file").touch()
    plugins = [SGD(), ExportSafetensors(to=str(tmp_path / "file" / "deep" / "model.safetensors"))]
    trainer = Trainer(net(), plugins, steps=1, device="cpu")
    with pytest.raises(ConfigError, match=r"export-safetensors: the export .* cannot be written[\s\S]*choose another"):
        trainer.fit(columns())
    assert trainer.run.progress.step == 0


def test_two_exporters_with_one_place_are_refused(tmp_path):
    """The later would replace what the earlier wrote."""
    pair = [
        ("export-safetensors:a", ExportSafetensors()),
        ("export-safetensors:b", ExportSafetensors(dtype="bfloat16")),
    ]
    with pytest.raises(ConfigError, match=r"another exporter, 'export-safetensors:b', writes to the same place"):
        fit(net(), [SGD(), *pair], columns(), steps=1, output=tmp_path)
    pair[1] = ("export-safetensors:b", ExportSafetensors(dtype="bfloat16", to=str(tmp_path / "b.safetensors")))
    fit(net(), [SGD(), *pair], columns(), steps=1, output=tmp_path)
    kinds = [{t.dtype for t in load_file(tmp_path / name).values()} for name in ("model.safetensors", "b.safetensors")]
    assert kinds == [{torch.float32}, {torch.bfloat16}]


@pytest.mark.parametrize("exporter", [ExportSafetensors, ExportTorch, ExportONNX])
def test_only_the_first_rank_writes(exporter, tmp_path):
    """On other ranks the wrapper around `fit` passes the result on, and neither checks nor writes."""
    run = cpu_run(model=net(), rank=1, world_size=2)
    wrapper = exporter(to=str(tmp_path / "here")).fit(run)
    next(wrapper)
    with pytest.raises(StopIteration) as stopped:
        wrapper.send("result")
    assert stopped.value.value == "result"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exporter", [ExportSafetensors, ExportTorch, ExportONNX])
def test_nothing_is_written_at_the_end_unless_asked_to(exporter, tmp_path):
    """With `at_end=False` a run needs no place, and its end writes nothing."""
    fit(net(), [SGD(), exporter(at_end=False)], columns(), steps=1, output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    fit(net(), [SGD(), exporter(at_end=False)], columns(), steps=1)


class Unlucky(ExportTorch):
    """An exporter whose library fails with an error of its own."""

    def rehearse(self, run):
        pass

    def write(self, run, path):
        raise RuntimeError("no such operator\nmore\nand more\nand the rest")


@pytest.mark.parametrize("first", [True, False])
def test_a_failure_at_the_end_keeps_the_other_exports(first, tmp_path):
    """The trained model is exported by the others, whichever comes first, and the error says that the run is complete."""
    pair = [Unlucky(), ExportSafetensors()]
    trainer = Trainer(net(), [SGD(lr=0.1), *(pair if first else pair[::-1])], steps=2, output=tmp_path, device="cpu")
    with pytest.raises(ConfigError, match=r"export-torch: the trained model cannot[\s\S]*no such operator") as raised:
        trainer.fit(columns())
    assert "the rest" not in str(raised.value)
    assert trainer.run.progress.step == 2
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in trainer.run.model.state_dict().items())


def test_a_copy_shares_what_is_not_changed():
    """A copy's tensors are the model's own where nothing is changed, ties stay ties, and hooks' owners are not copied."""

    class Watcher:
        seen = 0

        def hear(self, module, inputs, output):
            self.seen += 1

        @hookimpl
        def assembled(self, run):
            run.model.last.register_forward_hook(self.hear)

    model, watcher = net(), Watcher()
    model.again = model.first
    trainer = Trainer(model, [SGD(), watcher], steps=1, device="cpu")
    run = trainer.assemble(columns())
    shared, cast = remade(run, model, lambda t: t), remade(run, model, lambda t: t.to(torch.float64))
    assert shared.first.weight.data_ptr() == model.first.weight.data_ptr()
    assert cast.first.weight.dtype == torch.float64
    assert cast.again is cast.first
    assert_same_weights(shared, model)
    shared(**columns(2))
    assert watcher.seen == 1
