"""`export-torch`: a program that runs without the model's code, for any number of rows and any length."""

from __future__ import annotations

import copy
import logging
import zipfile
from pathlib import Path

import pytest
import torch
from plugin_helpers import FEATURES, Net, as_rows, assert_same_weights, columns, fit, net

from drivetrain import ConfigError, Trainer
from drivetrain.testing.files import ensure
from drivetrain_plugins import EMA, SGD, Evaluate, ExportTorch, HFModel, Loader, Pad, Tokenize
from drivetrain_plugins.export._examples import batch_of, inputs_of

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


def program(path):
    return torch.export.load(path).module()


def test_a_classifier_is_run_on_other_rows_and_lengths(bert_folder, tmp_path):
    """The file gives the trained model's logits for padded batches of other shapes, one row included."""
    plugins = [HFModel(str(bert_folder), labels=("a", "b", "c")), Tokenize(), Pad(), Loader(2), SGD(lr=0.1), Evaluate()]
    trainer = Trainer(plugins=[*plugins, ExportTorch(check=False)], output=tmp_path, steps=2, device="cpu")
    trainer.fit(ROWS, evaluate=ROWS)
    made, model = program(tmp_path / "model.pt2"), trainer.run.model.eval()
    for texts in (OTHERS, OTHERS[:1], OTHERS * 3):
        batch = trainer.run.processor(texts, padding=True, return_tensors="pt")
        with torch.no_grad():  # the same operations: a fused one may sum in another order
            torch.testing.assert_close(made(**batch), model(**batch).logits, rtol=0.0, atol=1e-6)
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    for path in (bert_folder, tmp_path, Path.home(), Path(torch.__file__).parent):
        assert str(path).encode() not in content


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "task"), [("causal", "causal-lm"), ("seq2seq", "seq2seq-lm")])
def test_language_models_are_run_on_other_rows_and_lengths(kind, task, kit_folder, tmp_path):
    """Scores of every token are the trained model's, with padding; a decoder is given its inputs from the labels."""
    ids = torch.arange(5, 29).view(4, 6)
    plugins = [HFModel(str(ensure(kit_folder, kind)), task=task), SGD(lr=0.1), ExportTorch(check=False)]
    trainer = Trainer(plugins=plugins, output=tmp_path, steps=2, device="cpu")
    trainer.fit({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    batch = {"input_ids": torch.arange(5, 32).view(3, 9), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    batch["attention_mask"][1, 4:] = 0
    if kind == "seq2seq":
        batch["decoder_input_ids"] = torch.arange(4, 19).view(3, 5)
    model = trainer.run.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            program(tmp_path / "model.pt2")(**batch), model(**batch, use_cache=False).logits, rtol=0.0, atol=1e-5
        )
    assert model.config.use_cache is True  # the run's own configuration


def test_any_module_is_exported_as_evaluated(tmp_path):
    """Dropout is off in the file and on in the run; a check before training and the export leave the weights alone."""
    plugins = [SGD(lr=0.1), ExportTorch()]
    trainer, _ = fit(opened(0.3), plugins, columns(), steps=3, output=tmp_path)
    without, _ = fit(opened(0.3), [SGD(lr=0.1)], columns(), steps=3)
    assert_same_weights(trainer.run.model, without.run.model)
    assert trainer.run.model.training
    model, made = copy.deepcopy(trainer.run.model).eval(), program(tmp_path / "model.pt2")
    for rows in (1, 5, 16):
        features = torch.randn(rows, FEATURES)
        torch.testing.assert_close(made(features=features), model(features)["logits"], rtol=0.0, atol=1e-6)
    trainer.export("torch", tmp_path / "again.pt2")
    assert torch.equal(program(tmp_path / "again.pt2")(features=features), made(features=features))


def test_averages_are_exported(tmp_path):
    """With `ema` the program is that of the averages."""
    trainer, _ = fit(opened(), [SGD(lr=0.5), EMA(decay=0.5), ExportTorch()], columns(), steps=3, output=tmp_path)
    averaged = copy.deepcopy(trainer.run.model)
    averaged.load_state_dict(trainer.run.plugins["ema"].state_dict()["average"])
    features = torch.randn(4, FEATURES)
    made = program(tmp_path / "model.pt2")(features=features)
    torch.testing.assert_close(made, averaged(features)["logits"], rtol=0.0, atol=1e-6)
    assert not torch.allclose(made, trainer.run.model(features)["logits"], atol=1e-3)


def test_dtype_is_that_of_weights_and_inputs(tmp_path):
    """A program in bfloat16 computes what the cast model computes."""
    trainer, _ = fit(opened(), [SGD(lr=0.1), ExportTorch(dtype="bfloat16")], columns(), steps=2, output=tmp_path)
    features = torch.randn(4, FEATURES, dtype=torch.bfloat16)
    wanted = copy.deepcopy(trainer.run.model).to(torch.bfloat16)(features)["logits"]
    torch.testing.assert_close(program(tmp_path / "model.pt2")(features=features), wanted, rtol=0.0, atol=1e-2)
    assert trainer.run.model.first.weight.dtype == torch.float32


def test_a_model_that_needs_labels_says_so_before_training(tmp_path):
    """A model that cannot be called without labels is refused; with `inputs` they are inputs like any other."""
    trainer = Trainer(net(), [SGD(), ExportTorch()], steps=1, output=tmp_path, device="cpu")
    with pytest.raises(
        ConfigError, match=r"export-torch: Net cannot be called with the inputs \['features'\]"
    ) as raised:
        trainer.fit(columns())
    assert "labels" in str(raised.value)
    assert trainer.run.progress.step == 0
    trainer, _ = fit(net(), [SGD(), ExportTorch(inputs=("features", "labels"))], columns(), steps=1, output=tmp_path)
    batch = {name: column[:3] for name, column in columns().items()}
    wanted = trainer.run.model(**batch)["logits"]
    torch.testing.assert_close(program(tmp_path / "model.pt2")(**batch), wanted, rtol=0.0, atol=1e-6)
    with pytest.raises(ConfigError, match=r"the batch has no tensor 'x'[\s\S]*features"):
        fit(net(), [SGD(), ExportTorch(inputs=("x",))], columns(), steps=1, output=tmp_path)


class Branching(Open):
    """A model whose forward asks for a value."""

    def forward(self, features, labels=None):
        return super().forward(features if features.sum() > 0 else -features, labels)


def test_what_torch_cannot_trace_is_told_before_training(tmp_path):
    """The error names plugin and model, quotes torch, says what to do, and comes before the first step."""
    trainer = Trainer(Branching(), [SGD(), ExportTorch()], steps=1, output=tmp_path, device="cpu")
    with pytest.raises(ConfigError, match=r"export-torch: torch.export cannot make a graph of Branching") as raised:
        trainer.fit(columns())
    assert "data-dependent" in str(raised.value)
    assert "export-safetensors" in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 6
    assert trainer.run.progress.step == 0
    trainer = Trainer(Branching(), [SGD(), ExportTorch(check=False)], steps=2, output=tmp_path, device="cpu")
    with pytest.raises(ConfigError, match="cannot make a graph"):
        trainer.fit(columns())
    assert trainer.run.progress.step == 2


class FixedRows(Open):
    """A model that takes eight rows only."""

    def forward(self, features, labels=None):
        return super().forward(features.view(8, FEATURES), labels)


def test_a_program_for_one_number_of_rows_is_told(tmp_path, caplog):
    """Where the model fixes the number of rows the log says of which input."""
    with caplog.at_level(logging.WARNING, "drivetrain"):
        fit(FixedRows(), [SGD(), ExportTorch(check=False)], columns(16), steps=1, output=tmp_path)
    assert "only as many rows as the example: ['features']" in caplog.text


def test_the_example_is_the_first_batch_of_an_evaluation_split():
    """Evaluation rows come first, as they are read; without any it is the first training batch."""
    trainer = Trainer(net(), [SGD(), Loader(5), Evaluate()], steps=1, device="cpu")
    data, dev = columns(), columns(12, seed=8)
    run = trainer.assemble(as_rows(data), {"dev": as_rows(dev)})
    assert torch.equal(batch_of(run)["features"], dev["features"][:5])
    run = Trainer(net(), [SGD(), Loader(5)], steps=1, device="cpu").assemble(as_rows(data))
    first = next(run.micros("train")).batch["features"]
    state = torch.get_rng_state()
    assert torch.equal(batch_of(run)["features"], first)
    assert torch.equal(torch.get_rng_state(), state)


def test_inputs_of_other_batches():
    """Tuples pass by position without their last part, a single row is repeated, and words are no input."""
    x, y = torch.randn(4, 2), torch.arange(4)
    named, by_name = inputs_of((x, y), (), None, "export-torch")
    assert (list(named), by_name) == (["input_0"], False)
    assert list(inputs_of((x, y), ("input_0", "input_1"), None, "export-torch")[0]) == ["input_0", "input_1"]
    batch = {"x": x[:1], "label_ids": y, "start_positions": y, "text": ["a"]}
    named, by_name = inputs_of(batch, (), None, "export-torch")
    assert (list(named), by_name, named["x"].shape) == (["x"], True, (2, 2))
    with pytest.raises(ConfigError, match=r"no tensor that could be an input[\s\S]*text"):
        inputs_of({"text": ["a"], "labels": y}, (), None, "export-torch")
