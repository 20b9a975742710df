"""`curriculum`: easy rows first, less so in every epoch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from order_helpers import sampler_of, skewed, table

from drivetrain import ConfigError, DataError
from drivetrain_plugins.order.curriculum import Curriculum
from drivetrain_plugins.shared.table import Table

ROWS = 400


def correlation(values, order):
    """Return Spearman's rank correlation of difficulty and place."""
    ranks = np.argsort(np.argsort(values[order], kind="stable"), kind="stable")
    return np.corrcoef(ranks, np.arange(len(values)))[0, 1]


def test_easy_rows_come_first():
    """Without noise, the first epoch goes from the shortest row to the longest; equal ones come in random order."""
    lengths, data = skewed(ROWS), table(ROWS)
    orders = [sampler_of(Curriculum(noise=0), data, seed=seed).order(0).numpy() for seed in (0, 1)]
    for order in orders:
        assert (np.diff(lengths[order]) >= 0).all()
    assert (orders[0] != orders[1]).any()


def test_order_fades_to_random():
    """Place follows difficulty less in every epoch, and not at all from `epochs` on."""
    lengths, sampler = skewed(ROWS), sampler_of(Curriculum(epochs=4), table(ROWS))
    found = [correlation(lengths, sampler.order(epoch).numpy()) for epoch in range(7)]
    assert found[0] > 0.97
    assert all(a - b > 0.02 for a, b in itertools.pairwise(found[:5]))
    assert max(map(abs, found[4:])) < 0.15


def test_order_is_the_documented_formula():
    """Rows are sorted by (1 - c) r + c u with c = noise + (1 - noise) e / epochs."""
    lengths, sampler = skewed(ROWS), sampler_of(Curriculum(epochs=4, noise=0.2), table(ROWS))
    from drivetrain.rng import generator

    for epoch, chance in ((0, 0.2), (1, 0.4), (3, 0.8), (4, 1.0), (9, 1.0)):
        drawn = torch.rand(ROWS, generator=generator(0, "curriculum", epoch), dtype=torch.float64).numpy()
        share = np.array([(lengths < length).mean() for length in lengths])
        keys = ((1 - chance) * share + chance * drawn)[sampler.order(epoch).numpy()]
        assert (np.diff(keys) >= -1e-15).all()


def test_a_field_of_numbers_is_the_difficulty():
    """A column with a number a row is taken for the difficulty itself."""
    difficulty = np.random.default_rng(0).random(30)
    sampler = sampler_of(Curriculum(field="difficulty", noise=0), Table({"difficulty": difficulty}))
    assert sampler.order(0).tolist() == np.argsort(difficulty).tolist()


def tens(row):
    """Return how difficult a row of the tests is."""
    return -row["number"] % 10


def nothing(row):
    """Return no number."""


def missing(row):
    """Return what a failed measurement gives."""
    return float("nan")


def test_a_function_tells_the_difficulty():
    """An importable function of a row is asked for every row."""
    rows = [{"number": number} for number in range(30)]
    order = sampler_of(Curriculum(function="test_curriculum:tens", noise=0), rows).order(0).tolist()
    assert [-n % 10 for n in order] == sorted(-n % 10 for n in range(30))


@pytest.mark.parametrize(
    ("function", "error", "told"),
    [
        ("test_curriculum:nothing", ConfigError, "curriculum: test_curriculum:nothing must return a number"),
        ("test_curriculum:missing", DataError, "curriculum: train row 0: a difficulty must be a number"),
        ("test_curriculum:ten", ConfigError, "has no 'ten'"),
    ],
)
def test_what_is_no_difficulty_is_told(function, error, told):
    """A function that is not there, or returns no number, is an error before step 0."""
    with pytest.raises(error, match=told):
        sampler_of(Curriculum(function=function), [{"number": 1}])


def test_evaluations_come_as_they_are():
    """No curriculum for what is measured."""
    assert sampler_of(Curriculum(), table(20), split="evaluate").order(0).tolist() == list(range(20))
