"""Every pair of first-party plugins is refused with a reason, or trains to what a hand-written loop gives, bit for bit.

Plugins that observe meet each other plugin in groups: one run with all of a group shows what each pair would. Where it is
refused or differs, the group is halved, down to the pairs. `pytest -m slow tests/compose/test_pairs.py` runs those pairs alone.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

from drivetrain import Catalogue, DrivetrainError, MissingDependency
from drivetrain.options import option_values
from drivetrain.testing import BaseOptimizer, Composition, complete, compose_pair, examples, first_party, refusal
from drivetrain.testing.compose import owned

sys.path.insert(0, str(Path(__file__).parent))  # for `reference` and `table`, however the tests are collected

import reference
import table

from drivetrain_plugins.schedule._warmup import Warmup

NAMES = first_party()
GROUP = 8


def grouped():
    """Return the observers in groups whose members need the same beside them, and of which none keeps another out."""
    groups = []
    for name in NAMES:
        cls = Catalogue().entry(name).load()
        own_words = [word for word in ("provides", "requires", "conflicts") if isinstance(getattr(cls, word), property)]
        if cls.effect != "observes" or own_words:  # which depend on its options
            continue
        found = (
            group for group in groups if len(group) < GROUP and not any(apart(cls, name, *one) for one in group.items())
        )
        group = next(found, None)
        if group is None:
            groups.append(group := {})
        group[name] = cls
    return [list(group) for group in groups]


def apart(cls, name, other, other_cls):
    """Tell whether two plugins need different runs, own the same operation or say that they conflict."""
    if (cls.rows, cls.companions) != (other_cls.rows, other_cls.companions):
        return True
    words, others = {name, *cls.provides}, {other, *other_cls.provides}
    both_own = owned([object.__new__(cls)]) & owned([object.__new__(other_cls)])
    return bool(both_own or words & set(other_cls.conflicts) or others & set(cls.conflicts))


GROUPS = grouped()
IN_GROUPS = {name for members in GROUPS for name in members}
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


def check_pair(first, second, kit_folder, tmp_path):
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
        if not both_wrap(outcome.run, first, [second]):
            break  # the order can only matter where both wrap the same hook


def both_wrap(run, name, others):
    return any(name in acting.wrappers and set(others) & set(acting.wrappers) for acting in run.plan.hooks.values())


def together(names, folder, output):
    """Return the run of these plugins and its composition, or None where they cannot be composed."""
    plugins = examples({name: Catalogue().entry(name).load() for name in names}, folder)
    for pretrained in (False, True):
        composition = complete(plugins, folder, pretrained=pretrained)
        try:
            return composition.fit(output / str(pretrained)), composition
        except DrivetrainError:
            continue
    return None


def check_group(name, members, folder, output):
    """Train `name` with all of the others, first and last in the list; where that fails, with halves of them, then by pairs."""
    if len(members) == 1:
        check_pair(*sorted((name, *members)), folder, output)
        return
    for number, order in enumerate(([name, *members], [*reversed(members), name])):
        made = together(order, folder, output / str(number))
        try:
            if made is not None:
                compare(*made, folder)
        except AssertionError:
            made = None
        if made is None:
            half = len(members) // 2
            check_group(name, members[:half], folder, output / "first")
            check_group(name, members[half:], folder, output / "second")
            return
        if not both_wrap(made[0], name, members):
            break


ALONE = [pair for pair in PAIRS if not IN_GROUPS & set(pair)]
SHOWN = [pair for pair in PAIRS if IN_GROUPS & set(pair)]


@pytest.mark.parametrize(("first", "second"), ALONE, ids=["+".join(pair) for pair in ALONE])
def test_pair(first, second, kit_folder, tmp_path):
    """The pair is refused with a problem that says why, or its weights equal the hand-written loop's, in either order."""
    check_pair(first, second, kit_folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), SHOWN, ids=["+".join(pair) for pair in SHOWN])
def test_pair_with_an_observer(first, second, kit_folder, tmp_path):
    """The pairs that groups show, one by one."""
    check_pair(first, second, kit_folder, tmp_path)


@pytest.mark.parametrize("group", range(len(GROUPS)))
@pytest.mark.parametrize("name", NAMES)
def test_with_observers(name, group, kit_folder, tmp_path):
    """Beside a group of observers a plugin's weights equal the hand-written loop's; whoever it cannot be with is refused."""
    members = [member for member in GROUPS[group] if member != name]
    if members:
        check_group(name, members, kit_folder, tmp_path)


def test_every_pair_is_shown():
    """Pairs and groups leave no pair of first-party plugins out."""
    shown = {frozenset(pair) for pair in ALONE}
    shown |= {frozenset((name, member)) for name in NAMES for members in GROUPS for member in members}
    assert [pair for pair in PAIRS if frozenset(pair) not in shown] == []
