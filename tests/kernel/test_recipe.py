"""Recipes: strict values, places, changes, and every problem in one error."""

from __future__ import annotations

import importlib
import json
import math
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
import pytest
import torch

from drivetrain import Catalogue, Recipe, RecipeError, Trigger, hookimpl, option, plugin
from drivetrain.options import option_fields

if TYPE_CHECKING:
    from somewhere import Unknown


@plugin(role="optim")
class Fast:
    """An optimizer with bounds."""

    lr: float = option(1e-3, gt=0, lt=1, help="learning rate")
    betas: tuple[float, float] = option((0.9, 0.999), ge=0, lt=1)

    @hookimpl
    def build_optimizer(self, run, groups):
        return torch.optim.SGD([p for g in groups for _, p in g["params"]], lr=self.lr)


@plugin(role="optim")
class Slow:
    """Another optimizer, which needs an option."""

    patience: int = option(ge=1, help="how long to wait")

    @hookimpl
    def build_optimizer(self, run, groups):
        return torch.optim.SGD([p for g in groups for _, p in g["params"]], lr=1.0)


@plugin(role="report")
class Kinds:
    """One option of each kind."""

    number: float = 0.0
    whole: int = 0
    flag: bool = False
    text: str = ""
    file: Path = Path()
    maybe: float | None = None
    either: str | list[str] = ""
    word: Literal["a", "b"] = "a"
    word_or_number: int | Literal["auto"] = "auto"
    numbers: list[float] = attrs.field(factory=list)
    many: tuple[int, ...] = ()
    pairs: dict[str, tuple[int, int]] = attrs.field(factory=dict)
    table: dict[str, Any] = attrs.field(factory=dict)
    anything: Any = None
    unknown: Unknown | None = None
    call: type | None = None
    when: Trigger = option("1 epoch", converter=Trigger.parse)
    token: str | None = option(None, secret=True)


@plugin(role="report")
class Guarded:
    """A secret with a validator that tells too much, and a constructor that refuses."""

    token: str = option("right", secret=True, choices=["right"])
    low: int = 0
    high: int = 1

    def __attrs_post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")


def points(**values: str) -> Catalogue:
    found = {"fast": "Fast", "slow": "Slow", "kinds": "Kinds", "guarded": "Guarded"}
    found = {name: f"{__name__}:{cls}" for name, cls in found.items()} | values
    return Catalogue([EntryPoint(name, value, "drivetrain.plugins.v1") for name, value in found.items()])


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(folder: Path, text: str, catalogue: Catalogue | None = None, **changes: Any):
    """Return (line or flag, problem) for everything that is wrong."""
    path = written(folder, text)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, **changes).trainer(catalogue or points())
    return [(p.where.replace(f"{path}:", ""), p) for p in caught.value.problems]


def test_a_recipe_becomes_a_trainer(tmp_path):
    """Tables become plugins with their options, in the order of the file, and [run] the settings."""
    text = (
        '[run]\nepochs = 2\nseed = 7\noutput = "out"\n[plugins.kinds]\nnumber = 3\n[plugins.fast]\nbetas = [0, 0.5]\n'
    )
    trainer = Recipe.load(written(tmp_path, text)).trainer(points())
    assert list(trainer.plugins) == ["kinds", "fast"]
    assert trainer.plugins["fast"].betas == (0.0, 0.5)
    assert type(trainer.plugins["kinds"].number) is float
    assert (trainer.settings.epochs, trainer.settings.seed, trainer.settings.output) == (2, 7, Path("out"))


@pytest.mark.parametrize(
    ("toml", "value"),
    [
        ("number = 1", 1.0), ("number = 1e-4", 1e-4), ("whole = 3", 3), ("flag = true", True), ('text = "a"', "a"),
        ('file = "a/b"', Path("a/b")), ("maybe = 2", 2.0), ('either = ["a"]', ["a"]), ('either = "a"', "a"),
        ('word = "b"', "b"), ("word_or_number = 3", 3), ('word_or_number = "auto"', "auto"),
        ("numbers = [1, 2.5]", [1.0, 2.5]), ("many = [1, 2]", (1, 2)), ("pairs = {a = [1, 2]}", {"a": (1, 2)}),
        ("table = {a = {b = true}}", {"a": {"b": True}}), ("anything = [1]", [1]), ('unknown = "x"', "x"),
    ],
)  # fmt: skip
def test_a_value_arrives_as_the_type_that_is_asked_for(tmp_path, toml, value):
    """A TOML value becomes the option's type, exactly (1 becomes 1.0 for a float, a list a tuple)."""
    made = Recipe.load(written(tmp_path, f"[plugins.kinds]\n{toml}\n")).trainer(points()).plugins["kinds"]
    got = getattr(made, toml.partition(" ")[0])
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    "toml",
    [
        'number = "1e-4"', "number = true", "number = nan", "number = inf", "number = [1]", "whole = 1.0", "whole = true",
        'flag = "true"', "flag = 1", "text = 3", "text = 1979-05-27", "file = 3", "maybe = true", "maybe = nan",
        "either = [3]", "either = 3", 'word = "c"', "word = 3", "word_or_number = true", 'word_or_number = "x"',
        'numbers = "12"', "numbers = 3", 'numbers = ["1"]', "numbers = [nan]", "many = [1, true]",
        "pairs = {a = [1]}", "pairs = {a = [1, 2, 3]}", "pairs = {a = 3}", "table = []", 'when = "often"', "when = true",
        'call = "os:system"',
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_at_its_line(tmp_path, toml):
    """Nothing is converted on a guess: the problem names plugin, option, value and line."""
    ((line, problem),) = problems_of(tmp_path, f"[plugins.kinds]\n\n{toml}\n")
    assert line == "3"
    assert f"plugin 'kinds', option '{toml.partition(' ')[0]}'" in problem.what
    assert problem.received
    assert "allowed: " in problem.do


def test_a_number_in_quotes_is_told_to_drop_them(tmp_path):
    """The commonest mistake has its own hint."""
    ((_, problem),) = problems_of(tmp_path, '[plugins.fast]\nlr = "1e-4"\n')
    assert "must be float, not str" in problem.what
    assert "without quotes: lr = 1e-4" in problem.do
    assert "> 0 and < 1" in problem.do


def test_everything_wrong_is_in_one_error(tmp_path):
    """Unknown tables, keys, plugins, wrong types, bounds, missing options, broken plugins and flags come together."""
    text = """\
[run]
epochs = 1
steps = 5
sed = 3
[plugins.fast]
lr = 2.0
betas = [0.9]
momentun = 0.1
[plugins.slow]
[plugins.fsat]
[plugins.broken]
x = 1
[plugins.no-module]
[[plugins.kinds]]
[optimiser]
lr = 1
"""
    broken = points(**{"broken": f"{__name__}:missing", "no-module": "no.such.module:Thing"})
    found = problems_of(tmp_path, text, broken, set=["fastt.lr=1", "fast"], without=["kind"], with_=["tensorbord"])
    got = {(where, p.kind): p for where, p in found}
    assert sorted(got) == sorted([
        ("1", "invalid"), ("4", "unknown"), ("6", "invalid"), ("7", "invalid"), ("8", "unknown"), ("9", "missing"),
        ("10", "unknown"), ("11", "invalid"), ("13", "invalid"), ("14", "invalid"), ("15", "unknown"),
        ("--set fastt.lr", "unknown"), ("--set fast", "invalid"),
        ("--without kind", "unknown"), ("--with tensorbord", "unknown"),
    ])  # fmt: skip
    assert len(found) == 15
    assert "contradict" in got["1", "invalid"].what
    assert "'seed'" in got["4", "unknown"].do
    assert got["6", "invalid"].received == "2.0"
    assert "'fast'" in got["10", "unknown"].do
    assert "AttributeError" in got["11", "invalid"].received
    assert "no.such.module:Thing" in got["13", "invalid"].received
    assert "[plugins.optimiser]" in got["15", "unknown"].do
    assert "'fast'" in got["--set fastt.lr", "unknown"].do
    assert "not PLUGIN.OPTION=VALUE" in got["--set fast", "invalid"].what
    assert "'kinds'" in got["--without kind", "unknown"].do


def test_conflicts_among_the_sound_plugins_are_told_as_well(tmp_path):
    """A bad option elsewhere does not hide that two plugins own one operation; what is only missing is not told yet."""
    text = "[run]\nseed = -1\n[plugins.fast]\n[plugins.slow]\npatience = 3\n"
    found = problems_of(tmp_path, text)
    assert [(line, p.kind) for line, p in found] == [("2", "invalid"), ("4", "conflict")]
    assert "build_optimizer" in found[1][1].what


def test_the_plan_of_a_recipe_tells_where_a_conflict_stands(tmp_path):
    """`plan` raises nothing: it holds the problems, with the line of the plugin that is one too many."""
    text = "[run]\nsteps = 1\n[plugins.fast]\n[plugins.slow]\npatience = 3\n"
    plan = Recipe.load(written(tmp_path, text)).plan(points())
    assert list(plan.plugins) == ["fast", "slow"]
    assert [(p.kind, p.where.rpartition(":")[2]) for p in plan.problems if p.kind == "conflict"] == [("conflict", "4")]


def test_a_validator_that_refuses_is_asked_for_every_option(tmp_path):
    """Two options out of bounds are two problems, not the first only."""
    found = problems_of(tmp_path, "[plugins.fast]\nlr = -1\nbetas = [0.9, 1.0]\n")
    assert [line for line, _ in found] == ["2", "3"]
    assert all("number" in p.what for _, p in found)


def test_a_constructor_that_refuses_is_a_problem(tmp_path):
    """What a plugin checks across its options is reported at its table."""
    ((line, problem),) = problems_of(tmp_path, "[plugins.guarded]\nlow = 3\n")
    assert line == "1"
    assert "low 3 is above high 1" in problem.what


def test_places_are_found_past_strings_arrays_and_comments(tmp_path):
    """A line that looks like a table or key inside a string, array or comment is none."""
    text = '''\
# [plugins.fast]
[plugins.kinds]  # x = 1
text = """
[plugins.fast]
whole = "no"
\\""" number = true
"""
numbers = [  # ]
  1,
  2,
]
whole = "3"
  [plugins."fast:second"]
  betas = [
    0.9,
    "a",
  ]
'''
    assert [line for line, _ in problems_of(tmp_path, text)] == ["12", "14"]


def test_dotted_keys_and_inline_tables_have_places(tmp_path):
    """TOML's other ways to write a table are options too, each at its line."""
    text = "run = {seed = -1}\nplugins.fast.lr = 2\nplugins.kinds = {whole = 'x', number = 'y'}\n"
    assert [line for line, _ in problems_of(tmp_path, text)] == ["1", "2", "3", "3"]


def test_set_takes_toml_values_and_plain_strings(tmp_path):
    """`--set` values are TOML where they can be; the rest are strings; tables inside plugins can be reached."""
    path = written(tmp_path, "[plugins.kinds]\n[plugins.kinds.table]\na = 1\n")
    changes = [
        "kinds.number=1e-4", "kinds.flag=true", "kinds.text=plain words = yes", "kinds.numbers=[1, 2]", "run.seed=3",
        "kinds.table.a={b = [1]}", 'kinds.file="x y"', "kinds.when=5 steps", "run.steps=4",
    ]  # fmt: skip
    trainer = Recipe.load(path, set=changes).trainer(points())
    made = trainer.plugins["kinds"]
    assert (made.number, made.flag, made.text, made.numbers) == (1e-4, True, "plain words = yes", [1.0, 2.0])
    assert (made.table, made.file, str(made.when)) == ({"a": {"b": [1]}}, Path("x y"), "5 steps")
    assert (trainer.settings.seed, trainer.settings.steps) == (3, 4)


def test_a_set_value_cannot_smuggle_in_other_keys(tmp_path):
    """A value with a line break stays one string."""
    path = written(tmp_path, "[plugins.kinds]\n")
    made = Recipe.load(path, set=["kinds.text=1\nflag = true"]).trainer(points()).plugins["kinds"]
    assert (made.text, made.flag) == ("1\nflag = true", False)


def test_a_bad_value_from_set_is_reported_as_such(tmp_path):
    """The place of a value given on the command line is the flag, not a line of the file."""
    ((where, problem),) = problems_of(tmp_path, "[plugins.fast]\nlr = 0.1\n", set=["fast.lr=fast"])
    assert where == "--set fast.lr"
    assert problem.received == "'fast'"


def test_with_and_without_change_the_list(tmp_path):
    """`with_` adds at the end and leaves what is there alone; `without` takes out, a label included."""
    path = written(tmp_path, '[plugins."fast:a"]\n[plugins.kinds]\nwhole = 3\n')
    recipe = Recipe.load(path, with_=["fast", "kinds"], without=["fast:a"], set=["fast.lr=0.5"])
    trainer = recipe.trainer(points())
    assert list(trainer.plugins) == ["kinds", "fast"]
    assert (trainer.plugins["kinds"].whole, trainer.plugins["fast"].lr) == (3, 0.5)


def test_a_secret_is_taken_from_the_environment_or_a_file(tmp_path, monkeypatch):
    """A secret option resolves env:NAME and file:PATH (beside the recipe), and the recipe keeps only the reference."""
    monkeypatch.setenv("KINDS_TOKEN", "sesame")
    recipe = Recipe.load(written(tmp_path, '[plugins.kinds]\ntoken = "env:KINDS_TOKEN"\n'))
    assert recipe.trainer(points()).plugins["kinds"].token == "sesame"
    assert "sesame" not in json.dumps(recipe.as_dict())
    (tmp_path / "token.txt").write_text("from file\n")
    path = written(tmp_path, '[plugins.kinds]\ntoken = "file:token.txt"\n')
    assert Recipe.load(path).trainer(points()).plugins["kinds"].token == "from file"


@pytest.mark.parametrize("value", ["hunter2", "env:NO_SUCH_VARIABLE", "file:no-such-file", "env:"])
def test_a_secret_that_cannot_be_taken_is_a_problem(tmp_path, value):
    """An inline secret is refused, and not printed; a reference to nothing is refused."""
    ((line, problem),) = problems_of(tmp_path, f'[plugins.kinds]\ntoken = "{value}"\n')
    assert line == "2"
    assert "hunter2" not in str(problem)
    if value == "hunter2":
        assert '"env:NAME"' in problem.what


def test_a_secret_is_not_shown_when_a_validator_tells_it(tmp_path, monkeypatch):
    """A validator's own message is scrubbed of the value it quotes."""
    monkeypatch.setenv("GUARDED_TOKEN", "sesame")
    ((_, problem),) = problems_of(tmp_path, '[plugins.guarded]\ntoken = "env:GUARDED_TOKEN"\n')
    assert "sesame" not in str(problem)
    assert "***" in problem.what


def test_only_the_plugins_named_are_imported(tmp_path):
    """A recipe imports the modules of its own plugins and of no other in the catalogue."""
    for name in ("recipe_used_module", "recipe_unused_module"):
        (tmp_path / f"{name}.py").write_text(
            "from drivetrain import plugin\n@plugin(role='report')\nclass P:\n    'P.'\n"
        )
    catalogue = points(used="recipe_used_module:P", unused="recipe_unused_module:P")
    trainer = Recipe.load(written(tmp_path, "[plugins.used]\n")).trainer(catalogue)
    assert type(trainer.plugins["used"]).__module__ == "recipe_used_module"
    assert "recipe_unused_module" not in sys.modules


def test_the_recipes_folder_can_be_imported_from(tmp_path):
    """A module beside the recipe is importable once the trainer is made, and from as_dict as well."""
    (tmp_path / "rows_beside_the_recipe.py").write_text("def load():\n    return [1]\n")
    recipe = Recipe.load(written(tmp_path, "[plugins.kinds]\n"))
    Recipe.from_dict(recipe.as_dict()).trainer(points())
    assert importlib.import_module("rows_beside_the_recipe").load() == [1]


def test_a_recipe_survives_json(tmp_path):
    """as_dict, JSON and back gives the same plugins and settings, changes included."""
    text = '[run]\nepochs = 1.5\nlog_every = "10 steps"\n[plugins.kinds]\nnumbers = [1]\nwhen = "2 epochs"\n[plugins.fast]\n'
    recipe = Recipe.load(written(tmp_path, text), set=["fast.lr=0.25"])
    again = Recipe.from_dict(json.loads(json.dumps(recipe.as_dict())))
    one, two = recipe.trainer(points()), again.trainer(points())
    assert list(one.plugins) == list(two.plugins)
    for name, made in one.plugins.items():
        for field in option_fields(type(made)).values():
            assert str(getattr(made, field.name)) == str(getattr(two.plugins[name], field.name))
    for field in option_fields(type(one.settings)):
        assert str(getattr(one.settings, field)) == str(getattr(two.settings, field))
    assert (two.settings.epochs, str(two.settings.log_every)) == (1.5, "10 steps")


def test_a_stored_recipe_with_json_values_is_checked_as_strictly(tmp_path):
    """JSON has null, NaN and duplicate keys, and they come through no other door."""
    path = tmp_path / "recipe.json"
    path.write_text('{"plugins": {"kinds": {"maybe": null, "number": NaN, "whole": null}}, "foldr": 1}')
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path).trainer(points())
    whats = [p.what for p in caught.value.problems]
    assert len(whats) == 3
    assert any("'number'" in w for w in whats)
    assert any("'whole'" in w for w in whats)


def test_trainer_can_be_asked_twice(tmp_path):
    """Resolving keeps no problem of the time before."""
    recipe = Recipe.load(written(tmp_path, "[plugins.fast]\nlr = 2\n"))
    for _ in range(2):
        with pytest.raises(RecipeError) as caught:
            recipe.trainer(points())
        assert len(caught.value.problems) == 1
    recipe.change(["fast.lr=0.5"])
    assert math.isclose(recipe.trainer(points()).plugins["fast"].lr, 0.5)
