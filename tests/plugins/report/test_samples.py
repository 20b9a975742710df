"""Samples of what a model makes: in a file of `jsonl-log` and as text of `tensorboard`."""

from __future__ import annotations

import json

import pytest
from plugin_helpers import Crash, columns, cpu_run, fit, net

from drivetrain import Settings, Trainer, hookimpl
from drivetrain_plugins import SGD, AdamW, Checkpoint, Evaluate, JsonlLog, TensorBoard
from drivetrain_plugins.shared import samples


class Show:
    """A plugin that shows two samples of each evaluation."""

    @hookimpl
    def add_hooks(self, manager):
        manager.add_hookspecs(samples.SampleHooks)

    @hookimpl
    def evaluated(self, run, split, metrics):
        step = run.progress.step
        run.hooks.samples(run, split, [{"input": f"{step}|a", "prediction": "é\nb"}, {"input": "c", "prediction": ""}])


def read(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_each_sample_is_a_line(tmp_path):
    """Step and split stand before what is shown; without samples there is no file."""
    fit(net(), [JsonlLog(), SGD(), Evaluate(), Show()], columns(), columns(8), steps=2, output=tmp_path / "some")
    assert read(tmp_path / "some/samples.jsonl") == [
        {"step": 2, "split": "evaluate", "input": "2|a", "prediction": "é\nb"},
        {"step": 2, "split": "evaluate", "input": "c", "prediction": ""},
    ]
    fit(net(), [JsonlLog(), SGD(), Evaluate()], columns(), columns(8), steps=2, output=tmp_path / "none")
    assert not (tmp_path / "none/samples.jsonl").exists()


def train(output, crash, **settings):
    plugins = [JsonlLog(), TensorBoard(), AdamW(lr=0.01), Checkpoint(every="2 steps"), Evaluate(every="1 step"), Show()]
    trainer = Trainer(net(), [*plugins, crash], steps=7, output=output, log_every="1 step", device="cpu")
    trainer.fit(columns(), columns(8), **settings)


def events_of(folder):
    """Return the events as TensorBoard's application reads them."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), tensor_size_guidance={"text": 0, "scalars": 0})
    events.Reload()
    return events


def losses(folder):
    return [(event.step, event.tensor_proto.float_val[0]) for event in events_of(folder).Tensors("loss")]


def shown(folder):
    """Return [(step, text), ...]."""
    events = events_of(folder)
    (tag,) = events.PluginTagToContent("text")
    assert tag.startswith("evaluate/samples")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(tag)]


@pytest.mark.parametrize("tail", ["", '{"step": 5, "spl'])
def test_resuming_doubles_and_loses_no_sample(tail, tmp_path):
    """After a crash and a resume the file, and what TensorBoard shows, are those of the uninterrupted run."""
    train(tmp_path / "whole", Crash(0))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", Crash(6))
    with (tmp_path / "parts/samples.jsonl").open("a") as file:
        file.write(tail)
    assert (tmp_path / "parts/samples.jsonl").read_text(encoding="utf-8").count('"step": 5') == 2 + bool(tail)
    train(tmp_path / "parts", Crash(0), resume=True)
    parts, whole = ((tmp_path / name / "samples.jsonl").read_bytes() for name in ("parts", "whole"))
    assert parts == whole
    assert [row["step"] for row in read(tmp_path / "whole/samples.jsonl")] == [s for s in range(1, 8) for _ in range(2)]
    assert shown(tmp_path / "parts/tensorboard") == shown(tmp_path / "whole/tensorboard")
    assert losses(tmp_path / "parts/tensorboard") == losses(tmp_path / "whole/tensorboard")


def test_a_new_run_begins_a_new_file(tmp_path):
    """Without a resume, the samples of an older run are gone."""
    plugins = [JsonlLog(), SGD(), Evaluate()]
    fit(net(), [*plugins, Show()], columns(), columns(8), steps=3, output=tmp_path)
    fit(net(), [*plugins, Show()], columns(), columns(8), steps=2, output=tmp_path)
    assert {row["step"] for row in read(tmp_path / "samples.jsonl")} == {2}


def test_text_is_a_table(tmp_path):
    """Each sample is a row of a Markdown table; bars and line ends do not break it."""
    fit(net(), [TensorBoard(), SGD(), Evaluate(), Show()], columns(), columns(8), steps=3, output=tmp_path)
    table = "|input|prediction|\n|---|---|\n|3\\|a|é b|\n|c||"
    assert shown(tmp_path / "tensorboard") == [(3, table)]


@pytest.mark.parametrize("plugin", [JsonlLog, TensorBoard])
def test_outside_of_a_run_nothing_is_written(plugin, tmp_path):
    """An evaluation that is asked for after the run adds nothing to its files."""
    made, run = plugin(), cpu_run(settings=Settings(output=tmp_path))
    made.assembled(run)
    made.samples(run, "evaluate", [{"input": "a"}])
    assert list(tmp_path.iterdir()) == []
