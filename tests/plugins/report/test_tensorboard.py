"""`tensorboard`: event files, read back by TensorBoard's own reader."""

from __future__ import annotations

import numpy as np
import pytest
from plugin_helpers import Crash, columns, cpu_run, fit, net

from drivetrain import ConfigError, Settings, Trainer
from drivetrain_plugins import SGD, AdamW, Checkpoint, Clip, Evaluate, TensorBoard


def read(folder):
    """Return {tag: [(step, value), ...]} as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def expected(logs):
    """Return the same from what a run logged; scalars are stored as float32."""
    shown = {}
    for step, metrics in logs:
        for name, value in metrics.items():
            shown.setdefault(name, []).append((step, float(np.float32(value))))
    return shown


def test_hooks_by_hand_write_scalars(tmp_path):
    """The hooks, called by hand: numbers logged inside the run are scalars at their step; later ones are not."""
    run, plugin = cpu_run(settings=Settings(output=tmp_path)), TensorBoard(folder="events")
    plugin.assembled(run)
    around = plugin.fit(run)
    next(around)
    run.progress.step = 4
    plugin.log(run, {"loss": 0.25, "evaluate/loss": 3})
    with pytest.raises(StopIteration):
        next(around)
    plugin.log(run, {"loss": 9.0})
    assert read(tmp_path / "events") == {"loss": [(4, 0.25)], "evaluate/loss": [(4, 3.0)]}


def test_other_ranks_write_nothing(tmp_path):
    """Only the first rank writes."""
    run, plugin = cpu_run(settings=Settings(output=tmp_path), rank=1, world_size=2), TensorBoard()
    around = plugin.fit(run)
    next(around)
    plugin.log(run, {"loss": 1.0})
    with pytest.raises(StopIteration):
        next(around)
    assert list(tmp_path.iterdir()) == []


def test_scalars_are_what_was_logged(tmp_path):
    """Every number of a run is there at its step: losses, rates, norms, evaluations."""
    plugins = [TensorBoard(), SGD(lr=0.1), Clip(), Evaluate(every="2 steps", at_start=True)]
    _, record = fit(net(), plugins, columns(), columns(8), steps=5, output=tmp_path)
    shown = read(tmp_path / "tensorboard")
    assert shown == expected(record.logs)
    assert set(shown) == {"loss", "learning_rate", "epoch", "grad_norm", "evaluate/loss"}


def test_resuming_hides_the_points_after_the_checkpoint(tmp_path):
    """After a crash and a resume within one second, TensorBoard shows each step once, as uninterrupted."""

    def train(output, crash, **settings):
        plugins = [TensorBoard(), AdamW(lr=0.01), Checkpoint(every="2 steps"), crash]
        trainer = Trainer(net(dropout=0.2), plugins, steps=7, output=output, log_every="1 step", device="cpu")
        trainer.fit(columns(), **settings)

    train(tmp_path / "whole", Crash(0))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", Crash(5))
    assert [step for step, _ in read(tmp_path / "parts/tensorboard")["loss"]] == [1, 2, 3, 4, 5]
    train(tmp_path / "parts", Crash(0), resume=True)
    assert len(list((tmp_path / "parts/tensorboard").iterdir())) == 2
    assert read(tmp_path / "parts/tensorboard") == read(tmp_path / "whole/tensorboard")


def test_a_run_without_a_folder_is_refused():
    """There is no place for the files, and that is said before the first step."""
    with pytest.raises(ConfigError, match="tensorboard needs the run's folder"):
        fit(net(), [TensorBoard(), SGD()], columns(), steps=1)
