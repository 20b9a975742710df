"""`lr_find` and `drivetrain lr-find`: the loss while the rate rises, what is suggested, and that nothing is kept."""

from __future__ import annotations

import csv
import itertools
import json
import math
import xml.etree.ElementTree as ET

import pytest
import torch
from click.testing import CliRunner
from plugin_helpers import BATCH, columns, net

from drivetrain import ConfigError, Shuffled, Trainer, TrainingError, hookimpl
from drivetrain.cli import main
from drivetrain.rng import derive_seed
from drivetrain_plugins import (
    SGD,
    Accuracy,
    AdamW,
    Checkpoint,
    Evaluate,
    JsonlLog,
    NanGuard,
    ParameterGroups,
    Plateau,
)
from drivetrain_plugins.schedule import lr_find
from drivetrain_plugins.schedule._lr_find import Sweep, _suggestions
from drivetrain_plugins.schedule._lr_plot import plot, ticks

SVG = "{http://www.w3.org/2000/svg}"


def test_sweep_equals_a_loop_by_hand():
    """Rates rise exponentially, losses are those of training with them, and their mean is corrected for its start."""
    data, model = columns(), net(dropout=0.2)
    sweep = lr_find(
        Trainer(model, [SGD(momentum=0.9)], device="cpu"), data, start=1e-4, end=0.1, steps=12, smoothing=0.8
    )
    by_hand = net(dropout=0.2)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=1.0, momentum=0.9, fused=True)
    losses, mean = [], 0.0
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 1e-4 * 1000 ** (step / 11)
        epoch, place = divmod(step, 5)
        picked = Shuffled(40, 0).order(epoch)[BATCH * place : BATCH * (place + 1)]
        torch.manual_seed(derive_seed(0, "step", step, 0))
        loss = by_hand(**{name: column[picked] for name, column in data.items()})["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        mean = 0.8 * mean + 0.2 * loss.item()
        assert sweep.smoothed[step] == pytest.approx(mean / (1 - 0.8 ** (step + 1)))
    assert sweep.losses == pytest.approx(losses, rel=1e-5)
    assert sweep.rates == pytest.approx([1e-4 * 1000 ** (step / 11) for step in range(12)])
    assert sweep.ended == "all 12 steps were taken"


def test_groups_keep_their_proportions():
    """The rate that rises is the first group's; a head with ten times the rate keeps it."""
    seen = []

    class Rates:
        @hookimpl
        def gradients_ready(self, step):
            seen.append([group["lr"] for group in step.run.optimizer.param_groups])

    grouped = ParameterGroups(rules=[{"pattern": "last.*", "name": "head", "lr": 0.5}])
    lr_find(Trainer(net(), [SGD(lr=0.05), grouped, Rates()], device="cpu"), columns(), start=1e-5, end=1e-2, steps=7)
    first = [rates[0] for rates in seen]
    assert first == pytest.approx([1e-5 * 1000 ** (step / 6) for step in range(7)])
    proportions = {round(rate / rates[0], 6) for rates in seen for rate in rates}
    assert proportions in ({1.0, 10.0}, {1.0, 0.1})


def test_it_stops_where_the_loss_diverges():
    """The sweep ends with the first smoothed loss that is above so many times the smallest."""
    sweep = lr_find(Trainer(net(), [SGD()], device="cpu"), columns(), start=1e-3, end=1e6, steps=80, smoothing=0.5)
    assert sweep.ended == "the loss has diverged"
    assert 5 < len(sweep.rates) < 80
    above = [loss > 4 * min(sweep.smoothed[: i + 1]) for i, loss in enumerate(sweep.smoothed)]
    assert above == [False] * (len(above) - 1) + [True]


def test_a_guard_that_raises_ends_the_sweep():
    """Losses up to where a guard raised are read; one that raises at once is heard."""

    class Break:
        def __init__(self, at):
            self.at = at

        @hookimpl(tryfirst=True)
        def gradients_ready(self, step):
            if step.number == self.at:
                step.loss = step.loss * torch.nan

    sweep = lr_find(Trainer(net(), [SGD(), NanGuard(), Break(9)], device="cpu"), columns(), steps=20)
    assert len(sweep.losses) == 9
    assert sweep.ended.startswith("step 9: the loss is not finite")
    with pytest.raises(TrainingError, match="step 2: the loss"):
        lr_find(Trainer(net(), [SGD(), NanGuard(), Break(2)], device="cpu"), columns(), steps=20)


def test_nothing_is_kept(tmp_path):
    """The given model is as it was, no file is written, and the run that follows is that of a fresh trainer."""
    model, before = net(), net().state_dict()
    plugins = [
        AdamW(lr=0.01), Plateau(), Evaluate(every="1 step"), Accuracy(), Checkpoint(every="1 step"), JsonlLog(),
    ]  # fmt: skip
    trainer = Trainer(model, plugins, steps=4, device="cpu", output=tmp_path / "run")
    sweep = lr_find(trainer, columns(), steps=8)
    assert sweep.left_out == ["plateau", "evaluate", "accuracy", "checkpoint", "jsonl-log"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert list(tmp_path.iterdir()) == []
    trainer.fit(columns(), columns(8, seed=9))
    fresh = Trainer(net(), [AdamW(lr=0.01), Plateau(), Evaluate(every="1 step"), Accuracy()], steps=4, device="cpu")
    fresh.fit(columns(), columns(8, seed=9))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.run.model.parameters(), strict=True))


def test_suggestions_are_where_they_should_be():
    """Of a loss whose descent and minimum are known, the steepest point and a tenth of the minimum are found."""
    logs = [-6 + 0.05 * n for n in range(121)]
    losses = [2 - 1 / (1 + math.exp(-4 * (log + 3))) + 10 ** (4 * (log + 1) - 2) for log in logs]
    steepest, tenth = _suggestions([10**log for log in logs], losses)
    assert math.log10(steepest) == pytest.approx(-3, abs=0.06)
    assert math.log10(tenth) == pytest.approx(logs[losses.index(min(losses))] - 1)
    noise = torch.randn(121, generator=torch.Generator().manual_seed(3)).tolist()
    noisy = [loss + 0.02 * each for loss, each in zip(losses, noise, strict=True)]
    assert math.log10(_suggestions([10**log for log in logs], noisy)[0]) == pytest.approx(-3, abs=0.3)
    assert _suggestions([1e-3, 1e-2, 1e-1, 1, 10, 100], [1, 2, 3, 4, 5, 6]) == (None, None)
    assert _suggestions([1e-3, 1e-2], [2, 1]) == (None, None)
    rates = [10.0**n for n in range(-6, 2)]
    assert _suggestions(rates, [3, 3, 2.9, 2, 1.9, 1.8, math.nan, 9]) == (pytest.approx(1e-3), pytest.approx(1e-2))


def drawn(sweep):
    root = ET.fromstring(plot(sweep, "a <title> & more"))
    assert root.tag == f"{SVG}svg"
    texts = ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]
    lines = [line.get("points").split() for line in root.iter(f"{SVG}polyline")]
    return texts, [[tuple(map(float, point.split(","))) for point in line] for line in lines]


def test_the_picture_shows_the_sweep():
    """Every step is a point of both lines within the frame, rates from left to right; axes and suggestions are named."""
    rates = [10 ** (-5 + n / 10) for n in range(41)]
    losses = [2.0 - 0.02 * n if n < 30 else 1.4 * 3.0 ** (n - 30) for n in range(41)]
    smooth = [loss + 0.01 for loss in losses]
    texts, (raw, smoothed) = drawn(Sweep(rates, losses, smooth, 1e-3, 1e-2, "end", []))
    assert len(raw) == len(smoothed) == 41
    assert all(76 <= x <= 696 and 48 <= y <= 376 for x, y in raw + smoothed)
    steps = [b[0] - a[0] for a, b in itertools.pairwise(smoothed)]
    assert steps == pytest.approx([15.5] * 40, abs=0.11)  # a logarithmic axis
    assert [y for _, y in smoothed[:30]] == sorted(y for _, y in smoothed[:30])  # falling losses go down
    assert {"a <title> & more", "learning rate", "loss", "1e-5", "1e-1", "steepest descent: 0.001"} <= set(texts)


def test_a_picture_of_nothing_is_a_picture():
    """A sweep that found nothing, or one rate, is drawn as well."""
    nan = math.nan
    for sweep in (
        Sweep([1e-3], [nan], [nan], None, None, "end", []),
        Sweep([2e-3, 3e-3], [1.0, 1.0], [1.0, 1.0], None, None, "end", []),
    ):
        texts, _ = drawn(sweep)
        assert "loss" in texts


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.93, 1.41, [1, 1.1, 1.2, 1.3, 1.4]), (2, 900, [200, 400, 600, 800])],
)
def test_ticks_are_round_numbers_within(low, high, expected):
    """Ticks are multiples of 1, 2 or 5 times a power of ten, a handful of them."""
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("given", [{"start": 1.0, "end": 0.1}, {"steps": 2}, {"smoothing": 1.0}, {"diverged": 1.0}])
def test_what_cannot_be_is_refused(given):
    """A sweep that does not rise, or ends before it begins, is refused."""
    with pytest.raises(ConfigError, match="lr-find: "):
        lr_find(Trainer(net(), [SGD()], device="cpu"), columns(), **given)


RECIPE = """
[run]
epochs = 3
output = "run"
device = "cpu"

[plugins.module]
factory = "lr_model:Model"

[plugins.rows]
function = "lr_model:rows"

[plugins.sgd]
lr = 0.5

[plugins.linear]
warmup = 0.1

[plugins.checkpoint]
"""
MODEL = """
import torch
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
    def forward(self, x, y):
        return {"loss": torch.nn.functional.mse_loss(self.layer(x)[:, 0], y)}
draws = torch.Generator().manual_seed(1)
X = torch.randn(64, 3, generator=draws)
def rows(split):
    return [{"x": x, "y": x.sum()} for x in X] if split == "train" else None
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "lr_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_command(recipe):
    """`drivetrain lr-find` sweeps a recipe, tells two rates, and writes a picture and a table, and nothing else."""
    before = {path.name for path in recipe.iterdir()}
    sweep = ["lr-find", "recipe.toml", "--from", "1e-4", "--to", "100", "--steps", "60"]
    done = CliRunner().invoke(main, [*sweep, "--plot", "lr.svg", "--csv", "lr.csv"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "steepest descent: " in done.output
    assert "left out: linear, checkpoint" in done.output
    assert {path.name for path in recipe.iterdir()} - before - {"__pycache__"} == {"lr.svg", "lr.csv"}
    rows = list(csv.DictReader((recipe / "lr.csv").read_text().splitlines()))
    assert float(rows[0]["learning_rate"]) == pytest.approx(1e-4)
    texts = "".join(ET.parse(recipe / "lr.svg").getroot().itertext())
    assert "Learning rate range test of recipe.toml" in texts
    assert "steepest descent" in texts
    again = CliRunner().invoke(main, [*sweep, "--json", "--set", "sgd.momentum=0.0"], catch_exceptions=False)
    found = json.loads(again.stdout.splitlines()[-1])
    assert [float(row["loss"]) for row in rows] == found["losses"]
    assert 1e-3 < found["steepest"] < 10


def test_errors_of_the_command_are_one_message(recipe):
    """What is wrong with rates or recipe is told without a traceback, with status 2."""
    done = CliRunner().invoke(main, ["lr-find", "recipe.toml", "--from", "2"])
    assert done.exit_code == 2
    assert "error: lr-find: start must be above 0 and below end" in done.output
