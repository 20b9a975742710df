"""`jsonl-log`: every log once, also after a resume, in JSON that anything reads."""

from __future__ import annotations

import json
import math

import pytest
import torch
from plugin_helpers import Crash, assert_same_weights, columns, cpu_run, fit, net

from drivetrain import ConfigError, Settings, Trainer, hookimpl
from drivetrain_plugins import SGD, AdamW, Checkpoint, Clip, Evaluate, JsonlLog


def strict(text):
    """Parse JSON as the standard has it: no NaN, no Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def read(output, name="log.jsonl"):
    return [strict(line) for line in (output / name).read_text(encoding="utf-8").splitlines()]


def drain(wrapper):
    """Let a wrapper finish."""
    with pytest.raises(StopIteration):
        next(wrapper)


def test_each_log_is_a_line_with_its_step(tmp_path):
    """The hooks, called by hand: a line for each log, with numbers as they are and the rest as text."""
    run, plugin = cpu_run(settings=Settings(output=tmp_path)), JsonlLog(name="numbers.jsonl")
    plugin.assembled(run)
    around = plugin.fit(run)
    next(around)
    run.progress.step = 3
    plugin.log(run, {"loss": 0.1, "count": 7})
    plugin.log(run, {"loss": math.nan, "up": math.inf, "down": -math.inf})
    drain(around)
    plugin.log(run, {"late": 1.0})  # after the run there is no file
    assert read(tmp_path, "numbers.jsonl") == [
        {"step": 3, "loss": 0.1, "count": 7},
        {"step": 3, "loss": "nan", "up": "inf", "down": "-inf"},
    ]


def test_other_ranks_write_nothing(tmp_path):
    """Only the first rank writes the file."""
    run, plugin = cpu_run(settings=Settings(output=tmp_path), rank=1, world_size=2), JsonlLog()
    around = plugin.fit(run)
    next(around)
    plugin.log(run, {"loss": 1.0})
    drain(around)
    assert list(tmp_path.iterdir()) == []


def test_file_holds_what_was_logged(tmp_path):
    """A run's file is its logs, bit for bit."""
    plugins = [JsonlLog(), SGD(lr=0.1), Clip(), Evaluate(every="2 steps")]
    _, record = fit(net(), plugins, columns(), columns(8), steps=5, output=tmp_path)
    assert read(tmp_path) == [{"step": step, **metrics} for step, metrics in record.logs]
    assert len(record.logs) == 5 + 3


def test_lines_are_there_while_the_run_lasts(tmp_path):
    """A line can be read as soon as it was logged, also when the process then dies."""
    with pytest.raises(KeyboardInterrupt):
        fit(net(), [JsonlLog(), SGD(), Crash(3)], columns(), steps=5, output=tmp_path)
    assert [row["step"] for row in read(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("tail", ["", '{"step": 5, "lo', '{"step": 5, "loss": 1.0}\n'])
def test_resuming_doubles_and_loses_no_line(tail, tmp_path):
    """After a crash and a resume, the file is that of the uninterrupted run, whatever the crash left at its end."""

    def train(output, crash, **settings):
        plugins = [JsonlLog(), AdamW(lr=0.01), Checkpoint(every="2 steps"), Evaluate(every="2 steps"), crash]
        trainer = Trainer(net(dropout=0.2), plugins, steps=8, output=output, log_every="1 step", device="cpu")
        trainer.fit(columns(), columns(8), **settings)
        return trainer.run.model

    whole = train(tmp_path / "whole", Crash(0))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", Crash(5))
    with (tmp_path / "parts/log.jsonl").open("a") as file:
        file.write(tail)
    resumed = train(tmp_path / "parts", Crash(0), resume=True)
    assert_same_weights(resumed, whole)
    assert (tmp_path / "parts/log.jsonl").read_bytes() == (tmp_path / "whole/log.jsonl").read_bytes()


def test_a_new_run_begins_a_new_file(tmp_path):
    """Without a resume, the lines of an older run are gone."""
    for steps in (4, 2):
        fit(net(), [JsonlLog(), SGD()], columns(), steps=steps, output=tmp_path)
    assert [row["step"] for row in read(tmp_path)] == [1, 2]


def test_numbers_that_are_not_finite_stay_readable(tmp_path):
    """A loss that became NaN is the text "nan", which every JSON reader takes."""

    class Spoil:
        @hookimpl
        def compute_loss(self, micro):
            return micro.outputs["loss"] * math.nan

    fit(net(), [JsonlLog(), SGD(), Spoil()], columns(), steps=1, output=tmp_path)
    assert read(tmp_path)[0]["loss"] == "nan"


def test_tensors_that_plugins_add_are_numbers(tmp_path):
    """A tensor shown through `run.extras` is written as a number."""

    class Add:
        @hookimpl
        def step_end(self, step):
            step.run.extras["scale"] = torch.tensor(0.5)

    fit(net(), [JsonlLog(), SGD(), Add()], columns(), steps=1, output=tmp_path)
    assert read(tmp_path)[0]["scale"] == 0.5


def test_a_run_without_a_folder_is_refused():
    """There is no place for the file, and that is said before the first step."""
    with pytest.raises(ConfigError, match="jsonl-log needs the run's folder"):
        fit(net(), [JsonlLog(), SGD()], columns(), steps=1)
