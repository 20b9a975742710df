"""`drivetrain evaluate` and `drivetrain predict`: what they print and write, and that they change nothing they look at."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from drivetrain.cli import main
from drivetrain.testing.files import ensure, write_kit
from drivetrain.testing.kinds import kit_rows
from drivetrain_plugins.evaluate._rows_out import RowsFile, read_rows

NAMES = ("river", "engine", "melody")
RECIPE = """\
[run]
output = "{folder}/out"
steps = 4
log_every = "2 steps"
device = "cpu"
[plugins.hf-model]
path = "{folder}/model"
labels = ["river", "engine", "melody"]
[plugins.jsonl]
train = "{folder}/text-train.jsonl"
evaluate = "{folder}/text-dev.jsonl"
[plugins.tokenize]
[plugins.pad]
[plugins.loader]
batch_size = 4
[plugins.adamw]
lr = 0.01
[plugins.ema]
decay = 0.5
[plugins.accuracy]
[plugins.evaluate]
[plugins.checkpoint]
every = "2 steps"
[plugins.jsonl-log]
[plugins.export-hf]
[plugins.export-safetensors]
"""
MODULE = """\
[run]
output = "{folder}/plain"
steps = 2
device = "cpu"
[plugins.module]
factory = "kit_module:build"
[plugins.rows]
function = "kit_module:rows"
arguments = {{kind = "tensors"}}
[plugins.sgd]
[plugins.ema]
[plugins.checkpoint]
[plugins.export-safetensors]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a trained text model, a trained plain module, their recipes and unlabelled rows."""
    folder = write_kit(tmp_path_factory.mktemp("look"))
    for part in ("model", "text-train.jsonl", "text-dev.jsonl"):
        ensure(folder, part)
    rows = [{"text": row["text"], "key": f"k{n}"} for n, row in enumerate(kit_rows("text", 7, start=500))]
    for suffix in (".jsonl", ".parquet"):
        with RowsFile(folder / f"new{suffix}") as file:
            file.write(lambda: [rows])
    path = [*sys.path]
    for name, text in (("recipe", RECIPE), ("module", MODULE)):
        (folder / f"{name}.toml").write_text(text.format(folder=folder))
        call("run", folder / f"{name}.toml")
    yield folder
    sys.path[:] = path
    sys.modules.pop("kit_module", None)


def call(*arguments, status=0):
    """Call the command line in this process and check its exit status; other exceptions are raised."""
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def by_hand(folder, texts):
    """Return the class and its probability of each text, with transformers alone, from the run's export."""
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "out/export-hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "out/export-hf")
    with torch.no_grad():
        odds = [model(**tokenizer(text, return_tensors="pt")).logits[0].double().softmax(0) for text in texts]
    return [(int(o.argmax()), float(o.max())) for o in odds]


def test_evaluate_prints_what_the_run_logged(folder):
    """The metrics of the last evaluation come out again, for people and for programs; the folder stays as it is."""
    before = contents(folder / "out")
    lines = [json.loads(line) for line in (folder / "out/log.jsonl").read_text().splitlines()]
    logged = next(line for line in reversed(lines) if "evaluate/loss" in line)
    result = call("evaluate", folder / "out", "--json")
    got = json.loads(result.stdout)
    assert got == {name: logged[f"evaluate/{name}"] for name in ("loss", "accuracy")}
    assert "step-00000004" in result.stderr
    people = call("evaluate", folder / "out").stdout.splitlines()
    assert people == [f"{name}: {value:.6g}" for name, value in got.items()]
    assert contents(folder / "out") == before


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_evaluate_several_sets_into_a_file(folder, tmp_path, suffix):
    """Sets of the data and files are measured each by its name, and a row each is written."""
    with RowsFile(tmp_path / f"mine{suffix}") as file:
        file.write(lambda: [kit_rows("text", 12, start=1000)])
    given = ["--split", "evaluate", "--split", "train", "--data", tmp_path / f"mine{suffix}"]
    got = json.loads(call("evaluate", folder / "out", *given, "--to", tmp_path / f"m{suffix}", "--json").stdout)
    assert set(got) == {f"{s}/{name}" for s in ("evaluate", "train", "evaluate/mine") for name in ("loss", "accuracy")}
    assert got["evaluate/mine/loss"] == got["evaluate/loss"] != got["train/loss"]  # the same rows
    rows = read_rows(tmp_path / f"m{suffix}", "test")
    assert [row["split"] for row in rows] == ["evaluate", "train", "evaluate/mine"]
    for row in rows:
        assert (row["loss"], row["step"]) == (got[f"{row['split']}/loss"], 4)
        assert row["checkpoint"].endswith("step-00000004")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_predict_rows_without_labels(folder, tmp_path, suffix):
    """Unlabelled rows of a file give what the exported model gives one by one, and the run's folder stays as it is."""
    before = contents(folder / "out")
    to = tmp_path / f"out{suffix}"
    call("predict", folder / "out", "--data", folder / f"new{suffix}", "--columns", "key,text", "--to", to)
    data, written = read_rows(folder / "new.jsonl", "test"), read_rows(to, "test")
    wanted = by_hand(folder, [row["text"] for row in data])
    for number, (row, given, (best, probability)) in enumerate(zip(written, data, wanted, strict=True)):
        assert row == {
            "row": number, **given, "prediction": NAMES[best], "prediction_id": best,
            "probability": pytest.approx(probability, abs=1e-5),
        }  # fmt: skip
    assert contents(folder / "out") == before
    assert [p.name for p in tmp_path.iterdir()] == [to.name]


def test_predict_prints_json_lines(folder):
    """Without --to the rows of the evaluation set are printed."""
    rows = [json.loads(line) for line in call("predict", folder / "out").stdout.splitlines()]
    wanted = by_hand(folder, [row["text"] for row in kit_rows("text", 12, start=1000)])
    assert [(row["row"], row["prediction_id"]) for row in rows] == [(n, best) for n, (best, _) in enumerate(wanted)]


def test_an_export_with_a_recipe(folder):
    """A folder of export-hf, the folder's weights alone and a weights file give what the run's checkpoint gives."""
    before = contents(folder)
    from_run = json.loads(call("evaluate", folder / "out", "--json").stdout)
    recipe = folder / "recipe.toml"
    for subject in (folder / "out/export-hf", folder / "out/model.safetensors"):
        got = json.loads(call("evaluate", subject, recipe, "--json").stdout)
        assert got == pytest.approx(from_run, rel=1e-6)
        rows = call("predict", subject, recipe, "--data", folder / "new.jsonl").stdout.splitlines()
        assert len(rows) == 7
    assert contents(folder) == before


def test_a_module_without_evaluation(folder):
    """Where the recipe evaluates nothing, the commands bring what is needed; averages start from the weights given."""
    from kit_module import build

    before = contents(folder / "plain")
    rows = [json.loads(line) for line in call("predict", folder / "plain", "--split", "evaluate").stdout.splitlines()]
    assert len(rows) == 12
    weights, recipe = folder / "plain/model.safetensors", folder / "module.toml"
    model = build().eval()
    model.load_state_dict(load_file(weights), strict=False)
    data = kit_rows("tensors", 12, start=1000)
    with torch.no_grad():
        logits = model(data["x"])["logits"]
        loss = torch.nn.functional.cross_entropy(logits, data["labels"]).item()
    raw = call("predict", weights, recipe, "--split", "evaluate", "--set", "predict.kind=logits").stdout.splitlines()
    np.testing.assert_allclose([json.loads(line)["logits"] for line in raw], logits, atol=1e-6)
    found = [json.loads(line) for line in call("predict", weights, recipe).stdout.splitlines()]
    np.testing.assert_allclose([r["probability"] for r in found], logits.softmax(1).max(1).values, atol=1e-6)
    assert json.loads(call("evaluate", weights, recipe, "--json").stdout)["loss"] == pytest.approx(loss, rel=1e-6)
    assert contents(folder / "plain") == before


def test_what_cannot_be_looked_at_is_refused(folder, tmp_path):
    """Each message says what was received and what to do, and nothing is left behind."""
    run, recipe = folder / "out", folder / "recipe.toml"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnothing\n')
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    for arguments, said in (
        (["evaluate", tmp_path / "empty"], "give the weights of an export and a recipe"),
        (["evaluate", tmp_path / "empty", recipe], "holds no weights"),
        (["evaluate", tmp_path / "other.safetensors", recipe], "are not those of the recipe's model"),
        (["evaluate", run, "--split", "evalaute"], "did you mean 'evaluate'"),
        (["predict", run, "--split", "dev"], "sets: ['train', 'evaluate']"),
        (["predict", run, "--to", tmp_path / "out.csv"], ".jsonl, .parquet"),
        (["evaluate", run, "--to", tmp_path / "out.txt"], ".jsonl, .parquet"),
        (["predict", run, "--to", tmp_path / "file/out.jsonl"], "cannot be written"),
        (["evaluate", run, "--to", tmp_path / "file/out.jsonl"], "cannot be written"),
        (["predict", run, "--data", tmp_path / "bad.jsonl"], "line 2 is no JSON object"),
        (["predict", run, "--data", tmp_path / "gone.parquet"], "gone.parquet"),
        (["predict", run, "--columns", "key"], "no column 'key'"),
        (["predict", run, "--split", "evaluate", "--data", folder / "new.jsonl"], "contradict"),
    ):
        assert said in call(*arguments, status=2).stderr, arguments
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "empty", "file", "other.safetensors"]


def test_an_export_is_measured_with_its_own_weights(folder, tmp_path):
    """What a recipe's warm-start or adapters did is in the export: it is not done again over its weights."""
    other = tmp_path / "other.safetensors"
    weights = load_file(folder / "plain" / "model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in weights.items()}, other)
    text = (folder / "module.toml").read_text()
    (tmp_path / "warm.toml").write_text(f'{text}\n[plugins.warm-start]\npath = "{other}"\nstrict = false\n')
    export = folder / "plain" / "model.safetensors"
    first = json.loads(call("evaluate", export, folder / "module.toml", "--json").stdout)
    assert json.loads(call("evaluate", export, tmp_path / "warm.toml", "--json").stdout) == first
