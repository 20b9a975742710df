"""Every pair of first-party plugins is refused with a reason, or trains to what a hand-written loop gives, bit for bit."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

from drivetrain import Catalogue, MissingDependency
from drivetrain.options import option_values
from drivetrain.testing import BaseOptimizer, Composition, compose_pair, examples, first_party, refusal

sys.path.insert(0, str(Path(__file__).parent))  # for `reference` and `table`, however the tests are collected

import reference
import table

from drivetrain_plugins.schedule._warmup import Warmup

NAMES = first_party()
PAIRS = list(itertools.combinations(NAMES, 2))
# Refusals that can name no plugin.
REASONS = {("pad", "text"): "the model returned no scalar loss"}
_results: dict[str, dict[str, torch.Tensor]] = {}


def expected(composition, folder, run):
    """Return the reference's parameters; runs that differ in observers alone share one."""
    acting = sorted(
        (name, str(option_values(plugin)))
        for name, plugin in composition.plugins.items()
        if plugin.effect != "observes" or name in table.TABLE
    )
    key = f"{acting} {composition.rows} {composition.words}"
    if key not in _results:
        _results[key] = reference.train(**table.arguments(composition, folder, run))
    return _results[key]


def compare(run, composition, folder):
    wanted, limit = (
        expected(composition, folder, run),
        max(map(table.LIMITS.get, composition.plugins, itertools.repeat(0.0))),
    )
    got = dict(run.model.named_parameters())
    assert got.keys() == wanted.keys()
    for name, parameter in got.items():
        assert torch.allclose(parameter, wanted[name], rtol=0.0, atol=limit), (
            f"{name} differs from the hand-written loop by {(parameter - wanted[name]).abs().max():.3g} in a run of "
            f"{', '.join(composition.plugins)}. If a plugin's meaning has changed, change its entry in tests/compose/table.py"
        )


@pytest.mark.parametrize("name", NAMES)
def test_every_plugin_has_an_oracle(name):
    """A plugin says that it observes (and is held to it), or stands in the table as arguments of the reference."""
    effect = Catalogue().entry(name).load().effect
    assert effect == "observes" or name in table.TABLE, (
        f"plugin {name!r} declares effect={effect!r}, so every pair with it is compared with a hand-written loop: say in "
        f"tests/compose/table.py what it means there (arguments of reference.train, which may need a new one), or declare "
        f'effect="observes" if it leaves the weights bit-identical'
    )


def test_table_names_only_plugins():
    """An entry of a plugin that is gone is taken out of the table."""
    assert sorted(table.TABLE.keys() - set(NAMES)) == []


def test_the_oracle_can_tell():
    """Arguments of the reference that change nothing would prove nothing: each entry but `stack` moves the weights."""
    base = reference.train(**table.arguments(Composition({"base-optimizer": BaseOptimizer()}), Path()))

    class Options:
        role = "control"
        factory, batches, lr, weight_decay, betas, eps, momentum, nesterov = (
            "kit_module:build",
            2,
            0.01,
            0.1,
            (0.9, 0.999),
            1e-8,
            0.9,
            False,
        )
        norm, warmup, batch_size, drop_last = 0.1, 2, 16, False

    for name in ("accumulate", "adamw", "bf16", "clip", "constant", "linear", "loader", "module", "sgd"):
        options = Options()
        if name == "linear":
            options.warmup = "0.25"
        options.warmup = Warmup.parse(options.warmup)
        changed = reference.train(**table.arguments(Composition({name: options}), Path()))
        assert any(not torch.equal(base[key], changed[key]) for key in base), name


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=["+".join(pair) for pair in PAIRS])
def test_pair(first, second, kit_folder, tmp_path):
    """The pair is refused with a problem that says why, or its weights equal the hand-written loop's, in either order."""
    for order in ((first, second), (second, first)):
        plugins = examples({name: Catalogue().entry(name).load() for name in order}, kit_folder)
        outcome = compose_pair(*order, plugins, kit_folder, tmp_path / order[0])
        if reason := REASONS.get((first, second)):
            assert reason in str(outcome.refused)
            continue
        if isinstance(outcome.refused, MissingDependency):
            pytest.skip(str(outcome.refused))
        if outcome.refused is not None:
            assert (complaint := refusal(outcome.refused, plugins, first, second)) is None, complaint
            continue
        compare(outcome.run, outcome.composition, kit_folder)
        wrapped = [set(a.wrappers) for a in outcome.run.plan.hooks.values()]
        if not any({first, second} <= both for both in wrapped):
            break  # the order can only matter where both wrap the same hook
