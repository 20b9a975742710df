"""What all exporters share: places, ranks, failures of one of them, and copies of models."""

from __future__ import annotations

import contextlib

import pytest
import torch
from plugin_helpers import assert_same_weights, columns, cpu_run, fit, net
from safetensors.torch import load_file

from drivetrain import ConfigError, Trainer, hookimpl
from drivetrain_plugins import SGD, ExportONNX, ExportSafetensors, ExportTorch
from drivetrain_plugins.export._paths import replace_whole
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


@pytest.mark.parametrize("place", ["run", "."])
def test_the_runs_folder_is_no_place_for_an_export(place, tmp_path, monkeypatch):
    """An export in place of the run's own folder, or of one above it, is refused before step 0; nothing is lost."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    trainer = Trainer(net(), [SGD(), ExportSafetensors(to=place)], output=tmp_path / "run")
    with pytest.raises(ConfigError, match="replace the run's own folder"):
        trainer.fit(columns(), steps=1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_of_other_files_is_not_replaced(tmp_path):
    """An export never takes the place of a folder that is none: before training, and when it is asked for later."""
    other = tmp_path / "models"
    (other / "another").mkdir(parents=True)
    (other / "another" / "weights.bin").write_text("mine")
    trainer = Trainer(net(), [SGD(), ExportSafetensors(to=str(other))], output=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"no earlier export(.|\n)*it holds another"):
        trainer.fit(columns(), steps=1)
    trainer = Trainer(net(), [SGD(), ExportSafetensors()], output=tmp_path / "run")
    trainer.fit(columns(), steps=1)
    with pytest.raises(ConfigError, match="no earlier export"):
        trainer.export("safetensors", other)
    assert (other / "another" / "weights.bin").read_text() == "mine"


@pytest.mark.parametrize(
    ("inside", "kept"), [("config.json", False), ("config.json sub/file", True), ("notes.txt", True)]
)
def test_what_a_folder_of_a_model_may_replace(inside, kept, tmp_path):
    """A model's folder replaces one of a model without folders in it, and nothing else."""
    for name in inside.split():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text("old")

    def write(folder):
        folder.mkdir()
        (folder / "config.json").write_text("new")

    with pytest.raises(ConfigError, match="no earlier export") if kept else contextlib.nullcontext():
        replace_whole(tmp_path / "model", write)
    assert all((tmp_path / "model" / name).read_text() == ("old" if kept else "new") for name in inside.split())
