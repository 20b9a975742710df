"""Sharded checkpoints of real runs: saved by two ranks, gone on from by two, by one, and by two again."""

from __future__ import annotations

import json

import elastic_runs
import numpy as np
import pytest

from drivetrain.testing import run_ranks
from drivetrain_plugins.checkpoint import _saved
from drivetrain_plugins.checkpoint._place import checkpoint_at

STEPS = 10  # of 16 rows; 6 an epoch


def rows_of(ranks, first=0):
    """Return the rows of each step over all ranks, in the order of ranks."""
    steps = {}
    for rank in ranks:
        for number, rows in rank["steps"]:
            steps.setdefault(number, []).extend(rows)
    return [steps[number] for number in sorted(steps) if number >= first]


def close(a, b):
    """Tell that two state trees are equal up to the rounding of sums in another order."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            close(a[key], b[key])
    elif isinstance(a, list) and a and not isinstance(a[0], (str, dict)):
        np.testing.assert_allclose(np.array(a, dtype=float), np.array(b, dtype=float), rtol=2e-4, atol=2e-6)
    elif isinstance(a, list):
        for one, other in zip(a, b, strict=True):
            close(one, other)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-6)
    else:
        assert a == b


@pytest.fixture(scope="module", params=["sharded", "replicated"])
def alone(request, tmp_path_factory):
    """Return the folder and the outcome of a run of two ranks that is never interrupted."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    form = {"form": "sharded"} if request.param == "replicated" else {}
    return request.param, form, folder, run_ranks(elastic_runs.fit, folder, STEPS, False, request.param, **form)


def test_every_rank_writes_a_part(alone):
    """A checkpoint has a part of each rank, of which none holds much more than half, and all files are verified."""
    _, _, folder, ranks = alone
    assert [rank["heard"] for rank in ranks] == [["step-00000004", "step-00000008", "step-00000010"]] * 2
    place = folder / "checkpoints" / "step-00000008"
    names = sorted(path.name for path in place.iterdir())
    assert names == ["manifest.json", "part-00000.safetensors", "part-00001.safetensors", "shards.json", "state.json"]
    index = json.loads((place / "shards.json").read_text())
    assert index["model/embed.weight"]["shape"] == [7, 8]
    saved = _saved.read(*checkpoint_at(place))
    assert saved.tree["model"]["embed.weight"].shape == (7, 8)
    assert saved.manifest["world_size"] == 2


@pytest.mark.parametrize("writes", ["checkpoint", "async"])
def test_two_ranks_go_on_bit_for_bit(alone, tmp_path, writes):
    """Stopped after four steps and gone on with, two ranks end with the weights and moments of those left alone."""
    parallel, form, _, left_alone = alone
    options = {"writes": writes, **form}
    run_ranks(elastic_runs.fit, tmp_path / "run", 4, False, parallel, **options)
    resumed = run_ranks(elastic_runs.fit, tmp_path / "run", STEPS, True, parallel, on_change="warn", **options)
    assert [rank["heard"][0] for rank in resumed] == ["loaded step-00000004"] * 2
    assert [rank["ended"] for rank in resumed] == [rank["ended"] for rank in left_alone]
    assert rows_of(resumed) == rows_of(left_alone, first=4)


def test_one_rank_goes_on_and_two_again(alone, tmp_path):
    """With twice the rows for one rank, it takes the same rows in each step, and two ranks go on from what it saved."""
    parallel, form, _, left_alone = alone
    folder = tmp_path / "run"
    run_ranks(elastic_runs.fit, folder, 4, False, parallel, **form)
    one = run_ranks(elastic_runs.fit, folder, 8, True, parallel, 16, world_size=1, **form)
    two = run_ranks(elastic_runs.fit, folder, STEPS, True, parallel, **form)
    assert one[0]["heard"][0] == "loaded step-00000004"
    assert two[0]["heard"][0] == "loaded step-00000008"
    parts = sorted(path.name for path in (folder / "checkpoints" / "step-00000008").iterdir())
    assert ("part-00000.safetensors" if form else "model.safetensors") in parts
    both = [sorted(rows) for rows in rows_of(one) + rows_of(two)]
    assert both == [sorted(rows) for rows in rows_of(left_alone, first=4)]
    if parallel == "sharded":  # there the mean over ranks makes AdamW's moments half as large as one rank's
        close(two[0]["ended"]["progress"], left_alone[0]["ended"]["progress"])
    else:
        close(two[0]["ended"], left_alone[0]["ended"])


def test_full_form_of_sharded_weights(tmp_path):
    """form="full" gathers the shards into the files of one rank, which two ranks go on from bit for bit."""
    left = run_ranks(elastic_runs.fit, tmp_path / "alone", STEPS, False, form="full")
    run_ranks(elastic_runs.fit, tmp_path / "run", 4, False, form="full")
    names = {path.name for path in (tmp_path / "run" / "checkpoints" / "step-00000004").iterdir()}
    assert names == {"manifest.json", "model.safetensors", "state.safetensors", "state.json"}
    resumed = run_ranks(elastic_runs.fit, tmp_path / "run", STEPS, True, form="full", on_change="warn")
    assert [rank["ended"] for rank in resumed] == [rank["ended"] for rank in left]
