"""`export-hf`: a folder that transformers loads."""

from __future__ import annotations

import pytest
import torch
from plugin_helpers import Crash, assert_same_weights, columns, fit, net

from drivetrain import ConfigError, Trainer
from drivetrain_plugins import SGD, Evaluate, ExportHF, HFModel, Loader, Pad, Tokenize

LABELS = ("bird", "fish", "other")
ROWS = [
    {"text": "the red bird sings", "label": "bird"},
    {"text": "a blue fish", "label": "fish"},
    {"text": "the green fish swims fast", "label": "fish"},
    {"text": "slow bird", "label": "other"},
]


def train(bert_folder, output, *extra, to=None, **settings):
    """Fine-tune the tiny BERT on four rows and export it."""
    plugins = [HFModel(str(bert_folder), labels=LABELS), Tokenize(), Pad(), Loader(2), SGD(lr=0.1), ExportHF(to=to)]
    trainer = Trainer(plugins=[*plugins, *extra], output=output, **{"steps": 3, "log_every": "1 step", **settings})
    trainer.fit(ROWS)
    return trainer


def logits_of(model, tokenizer):
    batch = tokenizer([row["text"] for row in ROWS], padding=True, return_tensors="pt")
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def loaded(folder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    return AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_folder_is_loaded_back_with_equal_logits(bert_folder, tmp_path):
    """At the end of a run the folder gives transformers the trained model: weights, logits, labels and tokenizer."""
    trainer = train(bert_folder, tmp_path)
    model, tokenizer = loaded(tmp_path / "export-hf")
    assert_same_weights(model, trainer.run.model)
    assert torch.equal(logits_of(model, tokenizer), logits_of(trainer.run.model, trainer.run.processor))
    assert model.config.id2label == dict(enumerate(LABELS))
    first = loaded(bert_folder)[0]
    assert not torch.equal(model.classifier.weight, first.classifier.weight)  # it was trained


def test_export_on_request(bert_folder, tmp_path):
    """`Trainer.export` writes the same folder anywhere, making the folders above it."""
    trainer = train(bert_folder, tmp_path / "run")
    trainer.export("hf", tmp_path / "deep" / "down" / "model")
    model, _ = loaded(tmp_path / "deep/down/model")
    assert_same_weights(model, trainer.run.model)


def test_an_older_export_is_replaced_whole(bert_folder, tmp_path):
    """What stood at the target is gone, file by file, and nothing is left beside it."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "of_another_model.bin").write_text("old")
    trainer = train(bert_folder, tmp_path / "run", to=str(target))
    assert not (target / "of_another_model.bin").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]
    assert_same_weights(loaded(target)[0], trainer.run.model)


def test_an_older_export_stays_when_writing_fails(bert_folder, tmp_path, monkeypatch):
    """A write that fails half-way, as on a full disk, leaves the older export as it was."""
    trainer = train(bert_folder, tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "export-hf").iterdir()}

    def full(folder):
        (folder / "tokenizer.json").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.run.processor, "save_pretrained", full)
    with pytest.raises(ConfigError, match=r"export .*export-hf cannot be written[\s\S]*No space left"):
        trainer.export("hf", tmp_path / "export-hf")
    assert {path.name: path.read_bytes() for path in (tmp_path / "export-hf").iterdir()} == before


def test_a_kill_between_the_renames_loses_nothing(bert_folder, tmp_path, monkeypatch):
    """An older export that a killed process had moved aside is put back before the next attempt."""
    trainer = train(bert_folder, tmp_path)
    target = tmp_path / "export-hf"
    target.rename(tmp_path / ".export-hf.old")  # where a kill leaves it
    monkeypatch.setattr(trainer.run.model, "save_pretrained", lambda folder: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(ConfigError, match="cannot be written"):
        trainer.export("hf", target)
    loaded(target)


def test_other_users_can_read_the_files(bert_folder, tmp_path):
    """Files have the mode that the process's umask gives."""
    train(bert_folder, tmp_path)
    (tmp_path / "plain").touch()
    usual = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "export-hf").iterdir()} == {usual}


def test_a_run_that_fails_exports_nothing(bert_folder, tmp_path):
    """Only a run that ended well leaves an export."""
    with pytest.raises(KeyboardInterrupt):
        train(bert_folder, tmp_path, Crash(2))
    assert not (tmp_path / "export-hf").exists()


def test_it_only_observes(bert_folder, tmp_path):
    """Weights with and without it are bit-identical."""
    shared = [HFModel(str(bert_folder), labels=LABELS), Tokenize(), Pad(), Loader(2), SGD(lr=0.1), Evaluate()]
    with_it = Trainer(plugins=[*shared, ExportHF()], output=tmp_path, steps=3)
    without = Trainer(plugins=shared, steps=3)
    for trainer in (with_it, without):
        trainer.fit(ROWS, evaluate=ROWS)
    assert_same_weights(with_it.run.model, without.run.model)


def test_what_cannot_be_exported_is_refused_before_training(bert_folder, tmp_path):
    """A model that is not transformers', and a run with no place to export to, are refused with what to do."""
    with pytest.raises(
        ConfigError, match=r"export-hf needs a transformers model. Received: Net. Use export-safetensors"
    ):
        fit(net(), [SGD(), ExportHF()], columns(), steps=1, output=tmp_path)
    with pytest.raises(ConfigError, match="export-hf needs a place: give it `to`"):
        train(bert_folder, None)


def test_unknown_format_names_those_there_are(bert_folder, tmp_path):
    """Asking for a format that no plugin writes says which formats the run has."""
    trainer = train(bert_folder, tmp_path)
    with pytest.raises(ConfigError, match=r"no plugin of this run exports 'onnx'. It has: \['hf'\]"):
        trainer.export("onnx", tmp_path / "x")
