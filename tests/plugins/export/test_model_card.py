"""`model-card`: README.md says what the run knows, and nothing else."""

from __future__ import annotations

import itertools
import os
import re
import runpy
import socket
from pathlib import Path

import pytest
import torch
from plugin_helpers import Crash, Record, assert_same_weights, columns, fit, net

from drivetrain import ConfigError, Trainer, hookimpl
from drivetrain_plugins import (
    BF16,
    SGD,
    Accuracy,
    AdamW,
    Checkpoint,
    Evaluate,
    ExportHF,
    ExportSafetensors,
    HFModel,
    Linear,
    Loader,
    ModelCard,
    Pad,
    Tokenize,
)
from drivetrain_plugins.export._card import public, yaml_text

LABELS = ("bird", "fish", "other")
ROWS = [
    {"text": "the red bird sings", "label": "bird"},
    {"text": "a blue fish", "label": "fish"},
    {"text": "the green fish swims fast", "label": "fish"},
    {"text": "slow bird", "label": "other"},
]


def train(bert_folder, output, *extra, steps=4):
    """Fine-tune the tiny BERT on four rows, evaluated on three and two."""
    plugins = [HFModel(str(bert_folder), labels=LABELS), Tokenize(), Pad(), Loader(2), AdamW(lr=1e-5), BF16(), Linear()]
    trainer = Trainer(plugins=[*plugins, Evaluate(every="2 steps"), Accuracy(), *extra], output=output, steps=steps)
    trainer.fit(ROWS, {"seen": ROWS[:3], "other": ROWS[2:]})
    return trainer


def section(text, title):
    return re.search(rf"## {title}\n\n(.*?)(?=\n## |\Z)", text, re.DOTALL)[1]


@pytest.mark.parametrize("first", [True, False])
def test_the_hub_reads_its_metadata_and_results(bert_folder, tmp_path, first):
    """The library loads the card beside the export, in both orders of the list; its results are the run's metrics."""
    from huggingface_hub import ModelCard as Card

    card = ModelCard(language=["en"], license="mit", tags=["birds"], datasets=["me/birds"], model_name="Bird: No. 1")
    trainer = train(bert_folder, tmp_path, *([card, ExportHF()] if first else [ExportHF(), card]))
    data = Card.load(tmp_path / "export-hf" / "README.md").data
    assert (data.language, data.license, data.datasets) == (["en"], "mit", ["me/birds"])
    assert (data.tags, data.library_name, data.pipeline_tag) == (
        ["drivetrain", "birds"], "transformers", "text-classification",
    )  # fmt: skip
    found = {f"evaluate/{r.dataset_name.partition('/')[2]}/{r.metric_type}": r.metric_value for r in data.eval_results}
    measured = {name: value for name, value in trainer.run.metrics.items() if name.startswith("evaluate/")}
    assert found == measured
    assert len(found) == 4


def test_its_numbers_are_the_runs(bert_folder, tmp_path):
    """Rows, steps, rate, precision and versions stand in the card as the run had them."""
    trainer = train(bert_folder, tmp_path, ExportHF(), ModelCard())
    text = (tmp_path / "export-hf" / "README.md").read_text()
    rows = [line for line in section(text, "Data").splitlines() if line.startswith("| ")][2:]
    assert [row.split("|")[1:3] for row in rows] == [
        [" train ", " 4 "], [" evaluate/seen ", " 3 "], [" evaluate/other ", " 2 "],
    ]  # fmt: skip
    training = section(text, "Training")
    said = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", training, re.MULTILINE))
    assert {k: said[k] for k in ("optimizer", "learning rate", "schedule", "precision")} == {
        "optimizer": f"adamw ({type(trainer.run.optimizer).__name__})", "learning rate": "1e-05", "schedule": "linear",
        "precision": "bf16 and weights in float32",
    }  # fmt: skip
    assert (said["optimizer steps"], said["rows seen"], said["rows a batch and rank"]) == ("4", "8", "2")
    assert torch.__version__ in section(text, "Environment")
    assert f"{sum(p.numel() for p in trainer.run.model.parameters()):,} parameters" in text
    assert len(re.findall(r"^\| evaluate/seen \| [24] \|", section(text, "Evaluation"), re.MULTILINE)) == 2


def test_nothing_of_the_machine_is_in_it(bert_folder, tmp_path):
    """No local path, home, user's or machine's name: neither in the recipe's options nor anywhere else."""
    card = tmp_path / "elsewhere"
    train(bert_folder, tmp_path, ExportHF(to=str(tmp_path / "model")), ModelCard(to=str(card)))
    text = (card / "README.md").read_text()
    for part in (str(tmp_path), tmp_path.parts[-1], str(bert_folder), str(Path.cwd()), socket.gethostname()):
        assert part not in text
    assert "(a local path)" in section(text, "Recipe")
    assert "a local checkpoint" in text


def test_its_snippet_loads_the_model(bert_folder, tmp_path, monkeypatch):
    """What the card tells to run gives the trained model and its tokenizer."""
    trainer = train(bert_folder, tmp_path, ExportHF(), ModelCard())
    text = (tmp_path / "export-hf" / "README.md").read_text()
    (tmp_path / "snippet.py").write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    monkeypatch.chdir(tmp_path / "export-hf")
    made = runpy.run_path(str(tmp_path / "snippet.py"))
    assert_same_weights(made["model"], trainer.run.model)
    assert made["processor"]("bird")["input_ids"] == trainer.run.processor("bird")["input_ids"]


def test_any_module_has_a_card(tmp_path):
    """Without an export folder the card stands in the run's, without what is not known."""
    fit(
        net(),
        [SGD(), ExportSafetensors(), ModelCard(summary="Tells three from three.")],
        columns(),
        steps=2,
        output=tmp_path,
    )
    text = (tmp_path / "README.md").read_text()
    assert "Tells three from three." in text
    assert 'load_model(model, "model.safetensors")' in text
    assert "pipeline_tag" not in text
    assert "## Evaluation" not in text


def test_a_resumed_run_tells_the_same_history(tmp_path):
    """After an interruption the card has all evaluations, and says where the run went on."""

    def plugins(*extra):
        return [SGD(lr=0.1), Evaluate(every="1 step"), Checkpoint(every="2 steps"), ModelCard(), *extra]

    whole = fit(net(), plugins(Crash(None)), columns(), columns(), steps=6, output=tmp_path / "whole")[0]
    with pytest.raises(KeyboardInterrupt):
        fit(net(), plugins(Crash(5)), columns(), columns(), steps=6, output=tmp_path / "cut")
    again = Trainer(
        net(), [*plugins(Crash(None)), Record()], output=tmp_path / "cut", steps=6, log_every="1 step", device="cpu"
    )
    again.fit(columns(), columns(), resume=True)
    texts = [(tmp_path / name / "README.md").read_text() for name in ("whole", "cut")]
    assert section(texts[0], "Evaluation") == section(texts[1], "Evaluation")
    assert "went on from step 4" in texts[1]
    assert "went on" not in texts[0]
    assert whole.run.metrics["evaluate/loss"] == again.run.metrics["evaluate/loss"]


def test_its_history_is_bounded():
    """Of a thousand evaluations some are kept: the first, the newest, and evenly spaced ones between."""
    card = ModelCard()
    run = type("Run", (), {"progress": type("P", (), {"step": 0}), "epochs": 0.0})
    for number in range(1000):
        run.progress.step = number
        card.evaluated(run, "evaluate", {"loss": float(number)})
    steps = [row["step"] for row in card._history]
    assert len(steps) <= 25
    assert (steps[0], steps[-1]) == (0, 999)
    assert len({b - a for a, b in itertools.pairwise(steps[:-1])}) == 1


def test_a_run_that_fails_has_no_card(tmp_path):
    """Only a run that ended well is described."""
    with pytest.raises(KeyboardInterrupt):
        fit(net(), [SGD(), ModelCard(), Crash(2)], columns(), steps=4, output=tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_a_run_without_a_folder_is_refused():
    """A card needs a place, and says so before the first step."""
    with pytest.raises(ConfigError, match="model-card needs a place"):
        fit(net(), [SGD(), ModelCard()], columns(), steps=1)


def test_yaml_is_read_back_as_it_was():
    """Strings that YAML takes for something else, small numbers and nested lists are what a YAML reader gets."""
    import yaml

    words = ["no", "1e-5", "null", "a: b", "- x", "# y", '"q"', "line\nbreak", "ä😀", "", "2020-01-01", "{z}"]
    value = {"words": words, "n": [1e-5, 1e20, 0.1, 3, True], "rows": [{"a": {"b": [{"c": 1}]}, "d": []}], "e": {}}
    assert yaml.safe_load(yaml_text(value)) == value


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/home/me/data.jsonl", "(a local path)"),
        ("~/data", "(a local path)"),
        ("file:///data", "(a local path)"),
        ("k=/mnt/x", "(a local path)"),
        ("C:\\data", "(a local path)"),
        ("package:name/model", "package:name/model"),
        ("https://me:word@host.org/x", "https://host.org/x"),
        ("s3://bucket/x", "s3://bucket/x"),
        ("1 epoch", "1 epoch"),
        ([{"a": "/x"}], [{"a": "(a local path)"}]),
    ],
)
def test_what_is_public(given, shown):
    """Local paths and passwords in addresses are masked; ids, addresses and words stay."""
    run = type("Run", (), {"settings": type("S", (), {"output": None})})
    assert public(given, run) == shown


class Stop:
    """Stops the run after its second step."""

    @hookimpl
    def step_end(self, step):
        if step.run.progress.step == 2:
            step.run.request_stop(f"the file {os.sep}home{os.sep}me{os.sep}stop is there")


def test_an_early_end_is_told(tmp_path):
    """Why a run stopped is said, without a path."""
    fit(net(), [SGD(), ModelCard(), Stop()], columns(), steps=4, output=tmp_path)
    assert "The run ended early: (a local path)." in (tmp_path / "README.md").read_text()
