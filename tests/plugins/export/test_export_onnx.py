"""`export-onnx`: a file that onnxruntime runs, for any number of rows and any length."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from plugin_helpers import FEATURES, Net, assert_same_weights, columns, fit, net

from drivetrain import ConfigError, MissingDependency, Trainer
from drivetrain_plugins import SGD, ExportONNX, HFModel, Loader, Pad, Tokenize
from drivetrain_plugins.export import export_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

ROWS = [
    {"text": "the red bird sings", "label": 0},
    {"text": "a blue fish", "label": 1},
    {"text": "the green fish swims fast", "label": 1},
    {"text": "slow bird", "label": 2},
]
OTHERS = ["the green bird sings the red fish", "bird", "a slow fish swims"]  # three rows, up to nine tokens


class Open(Net):
    """A `Net` that may be called without labels."""

    def forward(self, features, labels=None):
        if labels is not None:
            return super().forward(features, labels)
        return {"logits": self.last(self.drop(torch.tanh(self.norm(self.first(features)))))}


def opened(dropout=0.0):
    model = Open(dropout)
    model.load_state_dict(net().state_dict())
    return model


def logits(path, batch):
    """Run the file as its users do."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == list(batch)
    assert [each.name for each in session.get_outputs()] == ["logits"]
    return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})[0])


@pytest.mark.slow  # converting a BERT takes some seconds; what follows does the same with a small module
def test_a_classifier_is_run_on_other_rows_and_lengths(bert_folder, tmp_path):
    """Onnxruntime gives the trained model's logits for padded batches of other shapes, one row included."""
    plugins = [HFModel(str(bert_folder), labels=("a", "b", "c")), Tokenize(), Pad(), Loader(2), SGD(lr=0.1)]
    trainer = Trainer(plugins=[*plugins, ExportONNX(check=False)], output=tmp_path, steps=2, device="cpu")
    trainer.fit(ROWS)
    model = trainer.run.model.eval()
    for texts in (OTHERS, OTHERS[:1], OTHERS * 3):
        batch = dict(trainer.run.processor(texts, padding=True, return_tensors="pt"))
        with torch.no_grad():  # sums in another order: some units in the last place of logits below 1
            torch.testing.assert_close(logits(tmp_path / "model.onnx", batch), model(**batch).logits, rtol=0, atol=1e-5)
    content = (tmp_path / "model.onnx").read_bytes()
    assert not any(str(path).encode() in content for path in (bert_folder, tmp_path, torch.__path__[0]))


def test_any_module_is_exported_as_evaluated(tmp_path):
    """Dropout is off in the file; a check before training and the export leave the weights alone; `opset` is obeyed."""
    plugins = [SGD(lr=0.1), ExportONNX(opset=20)]
    trainer, _ = fit(opened(0.3), plugins, columns(), steps=3, output=tmp_path)
    without, _ = fit(opened(0.3), [SGD(lr=0.1)], columns(), steps=3)
    assert_same_weights(trainer.run.model, without.run.model)
    model, path = copy.deepcopy(trainer.run.model).eval(), tmp_path / "model.onnx"
    for rows in (1, 5):
        features = torch.randn(rows, FEATURES)
        torch.testing.assert_close(logits(path, {"features": features}), model(features)["logits"], rtol=0.0, atol=1e-5)
    stored = onnx.load(path)
    onnx.checker.check_model(stored)
    assert {each.version for each in stored.opset_import if not each.domain} == {20}


def test_logits_that_differ_are_refused(tmp_path, monkeypatch):
    """Where onnxruntime gives other numbers, fewer rows, or fails, nothing is written, and the error says by how much."""
    trainer, _ = fit(opened(), [SGD(lr=0.1), ExportONNX(at_end=False)], columns(), steps=1)
    honest = export_onnx._run
    cases = {
        r"logits are not the model's[\s\S]*0\.01": lambda session, batch: honest(session, batch) + 0.01,
        r"logits are not the model's[\s\S]*\(8, 3\) for \(16, 3\)": lambda session, batch: honest(session, batch)[:8],
        r"logits are not the model's[\s\S]*nan": lambda session, batch: honest(session, batch) * float("nan"),
        r"onnxruntime cannot run[\s\S]*ValueError: no kernel": lambda *_: (_ for _ in ()).throw(
            ValueError("no kernel")
        ),
    }
    traced = export_onnx.trace(trainer.run, "export-onnx", dtype=None, inputs=())
    with export_onnx._quiet():
        content = torch.onnx.export(
            traced.program, (), kwargs=traced.inputs, verbose=False, input_names=["features"]
        ).model_proto.SerializeToString()
    exporter = trainer.run.plugins["export-onnx"]
    exporter._verify(content, traced)
    for message, run in cases.items():
        monkeypatch.setattr(export_onnx, "_run", run)
        with pytest.raises(ConfigError, match=rf"export-onnx: .*{message}[\s\S]*verify = false"):
            exporter._verify(content, traced)


def test_what_cannot_be_converted_is_told_before_training(tmp_path, monkeypatch):
    """The error names the plugin, quotes torch, and comes before the first step."""

    def failing(*_, **__):
        raise RuntimeError("no decomposition for aten::odd\nand a long report")

    monkeypatch.setattr(torch.onnx, "export", failing)
    trainer = Trainer(opened(), [SGD(), ExportONNX()], steps=1, output=tmp_path, device="cpu")
    with pytest.raises(ConfigError, match=r"export-onnx: torch.onnx cannot convert[\s\S]*aten::odd[\s\S]*export-torch"):
        trainer.fit(columns())
    assert trainer.run.progress.step == 0


def test_a_model_beyond_two_gib_is_refused_before_training(tmp_path, monkeypatch):
    """One file cannot hold it; half precision counts half."""
    monkeypatch.setattr(export_onnx, "LARGEST", 300)
    plugins = [SGD(), ExportONNX(check=False)]
    with pytest.raises(ConfigError, match=r"holds less than 2 GiB[\s\S]*492 bytes[\s\S]*float16"):
        fit(opened(), plugins, columns(), steps=1, output=tmp_path)
    plugins = [SGD(), ExportONNX(check=False, dtype="float16")]
    Trainer(opened(), plugins, steps=1, output=tmp_path, device="cpu").assemble(columns())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_told_before_training(package, tmp_path, monkeypatch):
    """What is not installed is named, with the extra that brings it."""
    monkeypatch.setitem(sys.modules, package, None)
    trainer = Trainer(opened(), [SGD(), ExportONNX()], steps=1, output=tmp_path, device="cpu")
    with pytest.raises(
        MissingDependency, match=rf"'export-onnx' needs the package '{package}'[\s\S]*drivetrain\[onnx\]"
    ):
        trainer.fit(columns())
