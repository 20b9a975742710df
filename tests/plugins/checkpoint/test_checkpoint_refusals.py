"""Which runs a checkpoint is not for, and how that is said."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoint_runs import ROWS, Odd, named, steps, trainer
from PIL import Image

from drivetrain import CheckpointError, ConfigError, Iterated, option, plugin
from drivetrain.data import Fetch, count_labels, stack
from drivetrain_plugins import Checkpoint, Clip
from drivetrain_plugins.checkpoint._sample import sample_of


@plugin(role="control")
class Tilt:
    """A plugin that would change the run."""

    angle: float = option(1.0)


@plugin(role="report", effect="observes")
class Watch:
    """A plugin that would not."""

    often: int = option(1)


CHANGES = {
    "added": ([], [Tilt()], r"\+ tilt .*angle=1.0"),
    "removed": ([Tilt()], [], "- tilt .*angle=1.0"),
    "option": ([Tilt(angle=1.0)], [Tilt(angle=2.0)], "~ tilt: angle was 1.0, is 2.0"),
    "order": ([Tilt(), Clip()], [Clip(), Tilt()], "~ order: was adamw, tilt, clip; is adamw, clip, tilt"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_plugin_list_is_an_error_with_a_diff(tmp_path, change):
    """Adding, removing, changing or reordering plugins that change training is refused, line by line."""
    before, after, line = CHANGES[change]
    trainer(tmp_path, *before, steps=2).fit(ROWS)
    with pytest.raises(CheckpointError, match=line):
        trainer(tmp_path, *after, steps=4).fit(ROWS, resume=True)


def test_changes_can_be_allowed(tmp_path, caplog):
    """on_change="warn" tells the diff and goes on; "accept" goes on in silence; observers never count."""
    trainer(tmp_path, Watch(often=1), steps=2).fit(ROWS)
    for policy, told in (("warn", 1), ("accept", 0)):
        caplog.clear()
        checkpoint = Checkpoint(every=9, on_change=policy, at_end=False)
        result = trainer(tmp_path, Tilt(), checkpoint=checkpoint, steps=3).fit(ROWS, resume=True)
        assert result.steps == 3
        assert len([r for r in caplog.records if "+ tilt" in r.getMessage()]) == told
    caplog.clear()
    for own in ([], [Watch(often=2)], [("second", Watch()), Odd()]):
        trainer(tmp_path, *own, checkpoint=Checkpoint(every=9, keep=7, at_end=False), steps=3).fit(ROWS, resume=True)
    assert not caplog.records


def test_another_seed_data_or_model_is_refused(tmp_path):
    """Another seed, other data, an untied model or another shape is refused, and each is named."""
    trainer(tmp_path, steps=2).fit(ROWS)
    other = trainer(tmp_path, steps=4)
    other.settings.seed = 4
    with pytest.raises(CheckpointError, match="seed was 3, is 4"):
        other.fit(ROWS, resume=True)
    with pytest.raises(CheckpointError, match="rows_per_epoch was 32, is 16"):
        trainer(tmp_path, steps=4).fit({"x": ROWS["x"][:16]}, resume=True)
    with pytest.raises(CheckpointError, match=r"two.weight was tied to one.weight, is not tied"):
        trainer(tmp_path, tied=False, steps=4).fit(ROWS, resume=True)
    wider = trainer(tmp_path, steps=4)
    wider.model.register_buffer("count", torch.zeros(2, dtype=torch.int64))
    with pytest.raises(CheckpointError, match=r"step-00000002: state.json does not fit this run: .*'count'"):
        wider.fit(ROWS, resume=True)


def test_a_fresh_run_does_not_mix_with_an_old_one(tmp_path):
    """Starting from the beginning in a folder with checkpoints is refused before step 0 and changes nothing."""
    trainer(tmp_path, steps=4).fit(ROWS)
    with pytest.raises(CheckpointError, match=r"starts from the beginning.*\n?.*step-00000004"):
        trainer(tmp_path, steps=2).fit(ROWS)
    assert steps(tmp_path) == named(2, 4)


def test_nothing_to_resume(tmp_path):
    """resume=True without a checkpoint is an error, "auto" starts; a path that is none is named."""
    with pytest.raises(CheckpointError, match="no checkpoint to resume"):
        trainer(tmp_path, steps=2).fit(ROWS, resume=True)
    with pytest.raises(CheckpointError, match=r"nowhere: manifest.json is missing"):
        trainer(tmp_path, steps=2).fit(ROWS, resume=tmp_path / "nowhere")
    assert trainer(tmp_path, steps=2).fit(ROWS, resume="auto").steps == 2


def test_saving_needs_a_folder_before_step_0(tmp_path):
    """A run without an output folder, or with one that is a file, fails before it trains."""
    made = trainer(None, steps=2)
    with pytest.raises(ConfigError, match="saving needs the run's folder"):
        made.fit(ROWS)
    (tmp_path / "checkpoints").write_text("a file")
    made = trainer(tmp_path, steps=2)
    with pytest.raises(CheckpointError, match="cannot be written to"):
        made.fit(ROWS)
    assert made.run.progress.step == 0


def test_another_machine_is_told(tmp_path, caplog):
    """A checkpoint from another torch or another CPU is taken, with a warning that bits may differ."""
    from drivetrain_plugins.checkpoint import _manifest

    trainer(tmp_path, steps=2).fit(ROWS)
    path = tmp_path / "checkpoints" / "step-00000002" / "manifest.json"
    content = json.loads(path.read_text())
    content["environment"] |= {"torch": "2.12.0", "cpu_capability": "NEON"}
    content = {k: v for k, v in content.items() if k not in ("sha256", "magic", "schema")}
    path.write_bytes(_manifest.seal(content))
    trainer(tmp_path, steps=2).fit(ROWS, resume=True)
    (message,) = [r.getMessage() for r in caplog.records]
    assert "not promised" in message
    assert "torch was '2.12.0'" in message
    assert "cpu_capability was 'NEON'" in message


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": 2.5}, {"every": "5 fortnights"}, {"on_change": "maybe"}])
def test_bad_options_are_refused(options):
    """An option out of range is refused when the plugin is made."""
    with pytest.raises(ValueError, match=r"keep|whole|fortnights|on_change"):
        Checkpoint(**options)


def test_other_rows_of_the_same_number_are_refused(tmp_path):
    """Where the rows are others, or in another order, it is said, though they are as many."""
    trainer(tmp_path, steps=2).fit(ROWS)
    for rows in (ROWS["x"] + 1, ROWS["x"].flip(0), ROWS["x"].double().float().index_fill(0, torch.tensor([0]), 9)):
        with pytest.raises(CheckpointError, match="the training rows are as many as before, but not the same"):
            trainer(tmp_path, steps=4).fit({"x": rows}, resume=True)
    assert trainer(tmp_path, steps=4).fit({"x": ROWS["x"].clone()}, resume=True).steps == 4


class Pictures(torch.utils.data.Dataset):
    """Rows of every kind, drawn from the global generators as an augmentation draws; row `bad` cannot be read."""

    def __init__(self, mean=0.0, bad=None):
        self.mean, self.bad = mean, bad

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == self.bad:
            raise OSError("gone")
        picture = Image.fromarray(np.full((2, 2), index, np.uint8))
        drawn = torch.randn(3) + random.random() + np.random.rand() + self.mean  # noqa: NPY002 - as augmentations do
        return {"x": drawn, "picture": picture, "more": [(1, "a"), None, {"y": np.arange(index)}]}


def test_the_digest_tells_contents_and_nothing_else():
    """Rows that are drawn are drawn alike each time; a value, a picture or a bad row makes another digest or none."""

    def digest(data):
        batches = SimpleNamespace(fetch=Fetch(data, stack, count_labels, 3, "train"))
        return sample_of(SimpleNamespace(batches={"train": batches}))

    assert digest(Pictures()) == digest(Pictures()) != digest(Pictures(mean=1.0))
    assert digest(Pictures(bad=39)) is None
    assert digest(Iterated([1, 2])) is None
    assert digest([object()]) == digest([object()]), "what has no content to tell counts as its type"
