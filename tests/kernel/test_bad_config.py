"""Bad configurations, by their number in the list of bad inputs: each gets the right error, before anything is built."""

from __future__ import annotations

import textwrap

import attrs
import pytest

from drivetrain import ConfigError, Recipe, RecipeError

GOOD = """\
[run]
steps = 2
device = "cpu"
output = "{folder}/out"
[plugins.module]
factory = "bad_config_parts:Model"
[plugins.rows]
function = "bad_config_parts:rows"
[plugins.loader]
batch_size = 4
[plugins.adamw]
lr = 0.01
"""
PARTS = """\
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, x, y):
        return {"loss": (self.layer(x)[:, 0] - y).square().mean()}

def rows(split):
    if split == "train":
        return [{"x": torch.full((3,), float(i)), "y": torch.tensor(float(i))} for i in range(8)]
"""


@attrs.frozen
class Case:
    """A number of the list, what makes the good recipe bad, and what the error must say."""

    number: str
    says: tuple[str, ...]
    text: str | bytes = ""
    change: tuple[str, str] | None = None  # replace the first by the second in the good recipe
    more: str = ""  # lines at the end of it
    line: int | None = None
    set: tuple[str, ...] = ()
    error: type[ConfigError] = RecipeError
    name: str = "recipe.toml"
    problems: int = 1


LR, STEPS = ("lr = 0.01", "lr = {}"), ("steps = 2", "steps = {}")


def lr(number: str, value: str, *says: str) -> Case:
    return Case(number, ("'adamw'", "'lr'", *says), change=(LR[0], f"lr = {value}"), line=12)


def run(number: str, setting: str, *says: str, line: int = 2) -> Case:
    key = setting.partition(" ")[0]
    return Case(number, (f"'{key}'", *says), change=(STEPS[0], f"{setting}"), line=line)


def more(number: str, lines: str, line: int, *says: str) -> Case:
    return Case(number, says, more=lines, line=line)


CASES = [
    Case("1", ("empty",), b""),
    Case("1", ("empty",), b" \n\t\n"),
    Case("2", ("TOML",), "- a\n- b\n", line=1),
    Case("2", ("TOML",), "3\n", line=1),
    Case("2", ("list", "TOML"), "[]", name="recipe.json"),
    Case("2", ("int", "TOML"), "3", name="recipe.json"),
    Case("2", ("run must be a table", "3", "[run]"), "run = 3\n", line=1),
    Case("2", ("plugins must be a table", "'adamw'"), "plugins = 'adamw'\n", line=1),
    Case("2", ("plugins.adamw must be a table", "0.1"), "[plugins]\nadamw = 0.1\n", line=2),
    Case("3", ("TOML",), "[run]\nsteps = 1\n---\n[run]\n", line=3),
    Case("5", ("nclosed array",), "[plugins.adamw]\nbetas = [0.9, 0.99\n[plugins.clip]\n"),
    Case("5", ("TOML",), "[plugins.adamw\nlr = 1\n", line=1),
    Case("6", ("byte order mark",), b"\xef\xbb\xbf[run]\nsteps = 1\n"),
    Case("6", ("UTF-16", "UTF-8"), "[run]\nsteps = 1\n".encode("utf-16")),
    Case("6", ("UTF-16", "UTF-8"), "[run]\n".encode("utf-16-le")),
    Case("6", ("UTF-8",), b"[run]\noutput = '\xff'\n"),
    Case("7", ("NUL",), b"[run]\nsteps = \x001\n"),
    Case("8", ("overwrite",), "[run]\nseed = 1\nseed = 2\n", line=3),
    more("9", "weigth_decay = 0.1", 13, "'adamw' has no option 'weigth_decay'", "0.1", "'weight_decay'"),
    run("9", "step = 3", "[run] has no option", "'steps'"),
    Case("9", ("unknown table 'plugin'", "'plugins'"), more="[plugin.clip]\nnorm = 1.0", line=13),
    Case("9", ("unknown table 'folder'",), 'folder = "elsewhere"\n'),
    lr("10", '"1e-4"', "'1e-4'", "must be float, not str", "without quotes: lr = 1e-4"),
    lr("11", '"fast"', "'fast'", "must be float, not str", "> 0"),
    lr("12", "-0.1", "-0.1", "> 0"),
    lr("13", "nan", "nan", "float"),
    lr("13", "inf", "inf", "float"),
    lr("13", "-inf", "-inf", "float"),
    lr("13", "1e999", "inf", "float"),
    lr("14", "true", "True", "must be float, not bool"),
    run("15", "steps = 0", "0", ">= 1"),
    run("15", "steps = -1", "-1", ">= 1"),
    run("15", "steps = 3.5", "3.5", "int"),
    run("15", f"steps = {10**30}", str(10**30)),
    run("15", "epochs = 0", "0", "> 0"),
    Case("16", ("no length", "epochs or steps"), change=("steps = 2", "")),
    Case("16", ("contradict", "epochs=1", "steps=2"), change=("steps = 2", "steps = 2\nepochs = 1"), line=1),
    Case("17", ("'loader'", "'batch_size'", "0", ">= 1"), change=("batch_size = 4", "batch_size = 0"), line=10),
    more("18", "[plugins.accumulate]\nbatches = 0", 14, "'accumulate'", "'batches'", "0", ">= 1"),
    Case("19", ("warm-up", "'linear'", "5", "2 steps"), more="[plugins.linear]\nwarmup = 5", error=ConfigError),
    more("20", "betas = [0.9, 0.99, 0.999]", 13, "'betas'", "[0.9, 0.99, 0.999]", "tuple[float, float]"),
    more("20", "betas = [0.9, 1.0]", 13, "'betas'", "1.0", "< 1"),
    more("20", "betas = 0.9", 13, "'betas'", "0.9", "tuple[float, float]"),
    more("22", "[plugins.adamwv]", 13, "no plugin 'adamwv'", "'adamw'"),
    more("22", '[plugins."adamwv:b"]', 13, "no plugin 'adamwv:b'", "'adamw'"),
    more("22", "[plugins.zzz]", 13, "no plugin 'zzz'", "known: ", "adamw", "checkpoint"),
    Case("23", ("twice", "adamw"), more="[plugins.adamw]", line=13),
    more("23", "[[plugins.clip]]\n[[plugins.clip]]", 13, "plugins.clip must be a table", "label", "checkpoint:best"),
    Case("24", ("'build_optimizer'", "adamw and sgd"), more="[plugins.sgd]", line=13),
    Case("24", ("two plugins own", "checkpoint and checkpoint:best"), more='[plugins.checkpoint]\n[plugins."checkpoint:best"]', line=14, problems=2),
    Case("24", ("'accuracy' requires",), more="[plugins.accuracy]", line=13),
    more("25", "weight_decay = [0.1]", 13, "'weight_decay'", "[0.1]", "must be float, not list"),
    more("25", "fused = 1", 13, "'fused'", "1", "bool | None"),
    Case("25", ("'module'", "'factory'", "3", "str"), change=('factory = "bad_config_parts:Model"', "factory = 3"), line=6),
    Case("25", ("'module' needs option 'factory'",), change=('factory = "bad_config_parts:Model"', ""), line=5),
    Case("26", ("folder", "exists"), change=("{folder}/out", "{folder}/bad_config_parts.py"), error=ConfigError),
    Case("26", ("folder", "ot a directory"), change=("{folder}/out", "{folder}/bad_config_parts.py/a"), error=ConfigError),
    Case("26", ("'output'", "''"), change=("{folder}/out", ""), line=4),
    Case("26", ("'output'", "folder"), change=("{folder}/out", r"a\u0000b"), line=4),
    Case("26", ("'output'", "3"), change=('"{folder}/out"', "3"), line=4),
    Case("27", ("'output'", "$NO_SUCH/out", "not expanded"), change=("{folder}/out", "$NO_SUCH/out"), line=4),
    more("29", "[plugins.checkpoint]\nkeep = 0", 14, "'checkpoint'", "'keep'", "0", ">= 1"),
    more("31", '[plugins.evaluate]\nevery = "never"', 14, "'every'", "'never'", "steps"),
    more("31", '[plugins.evaluate]\nevery = "0 steps"', 14, "'every'", "positive"),
    more("31", '[plugins.evaluate]\nevery = "2 stepps"', 14, "'every'", "'steps'"),
    run("32", "seed = -1", "-1", ">= 0"),
    run("32", f"seed = {2**63}", str(2**63)),
    run("32", 'seed = "7"', "'7'", "int", "without quotes"),
    run("32", "seed = 7.0", "7.0", "int"),
    Case("33", ("'workers'", "-1", ">= 0"), change=("batch_size = 4", "workers = -1"), line=10),
    Case("33", ("'workers'", "100000", "<= 256"), change=("batch_size = 4", "workers = 100000"), line=10),
    Case("35", ("TOML",), "[run]\nseed = !!python/object:os.system 'id'\n", line=2),
    Case("35", ("recursion",), "a = " + "[" * 100_000),
    Case("35", ("recursion",), '{"a": ' + "[" * 100_000, name="recipe.json"),
    Case("35", ("larger than",), b"# " + b"x" * 50_000_000),
    Case("37", ("--set adamw.lr", "not PLUGIN.OPTION=VALUE"), set=("adamw.lr",)),
    Case("37", ("--set adamw..lr", "not PLUGIN.OPTION=VALUE"), set=("adamw..lr=1",)),
    Case("37", ("--set adamw", "not PLUGIN.OPTION=VALUE"), set=("adamw=1",)),
    Case("37", ("--set run", "not PLUGIN.OPTION=VALUE"), set=("run=1",)),
    Case("37", ("not PLUGIN.OPTION=VALUE",), set=("=1",)),
    Case("37", ("not PLUGIN.OPTION=VALUE",), set=("",)),
    Case("37", ("'adamw.betas'", "a list is set as a whole"), more="betas = [0.9, 0.9]", set=("adamw.betas.5=1",)),
    Case("37", ("no table 'adamwv'", "'adamw'"), set=("adamwv.lr=1",)),
    Case("37", ("'lrr'", "'lr'", "--set adamw.lrr"), set=("adamw.lrr=1",)),
    Case("37", ("'lr'", "''", "--set adamw.lr"), set=("adamw.lr=",)),
    Case("38", ("unknown table 'include'", "'recipe.toml'"), 'include = "recipe.toml"\n', line=1),
    Case("39", ("'output'", "s3://bucket/run", "local folder"), change=("{folder}/out", "s3://bucket/run"), line=4),
    Case("40", ("device 'gpuu'",), change=('device = "cpu"', 'device = "gpuu"'), error=ConfigError),
    Case("40", ("'device'", "3", "str"), change=('device = "cpu"', "device = 3"), line=3),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "bad_config_parts.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_good_recipe_trains(folder):
    """Every case below is this recipe with one mistake; without it, it trains."""
    path = folder / "recipe.toml"
    path.write_text(GOOD.replace("{folder}", str(folder)))
    assert Recipe.load(path).trainer().fit().steps == 2


def train(path, changes):
    recipe = Recipe.load(path, set=changes)
    if problems := recipe.plan().problems:
        raise RecipeError(problems)
    recipe.trainer().fit()


@pytest.mark.parametrize("case", CASES, ids=[f"{c.number}-{i}" for i, c in enumerate(CASES)])
def test_a_bad_configuration_gets_the_right_error(folder, case):
    """The error is drivetrain's own, names file and line, value and what is allowed, and nothing was made on disk."""
    text = case.text or (GOOD.replace(*case.change) if case.change else GOOD) + case.more + "\n"
    raw = text if isinstance(text, bytes) else text.replace("{folder}", str(folder)).encode()
    path = folder / case.name
    path.write_bytes(b"" if case.number == "1" and not case.text else raw)
    before = sorted(p.name for p in folder.iterdir() if p.name != "__pycache__")
    with pytest.raises(ConfigError) as caught:
        train(path, case.set)
    assert type(caught.value) is case.error
    problem = caught.value.problems[0]
    assert all(word in str(problem) for word in case.says), f"{problem}"
    if case.line is not None:
        assert problem.where.startswith(f"{path}:{case.line}")
    elif case.error is RecipeError:
        assert str(path) in problem.where or problem.where.startswith("--set")
    after = sorted(p.name for p in folder.iterdir() if p.name not in ("__pycache__", "out"))
    assert after == before
    assert len(caught.value.problems) == case.problems
    assert len(str(caught.value)) < 2000


def test_a_file_that_cannot_be_opened(tmp_path):
    """Number 28 for recipes: missing, or a folder."""
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(RecipeError, match="cannot be read"):
            Recipe.load(path)


def test_tabs_are_fine(folder):
    """Number 4: what YAML refuses, TOML allows."""
    path = folder / "recipe.toml"
    path.write_text(textwrap.indent(GOOD.replace("{folder}", str(folder)), "\t"))
    assert Recipe.load(path).trainer().settings.steps == 2


def test_the_home_is_expanded(folder, monkeypatch):
    """Number 27: "~" is the home folder, not a folder of that name."""
    monkeypatch.setenv("HOME", str(folder / "home"))
    path = folder / "recipe.toml"
    path.write_text(GOOD.replace("{folder}/out", "~/runs/../out"))
    assert Recipe.load(path).trainer().settings.output == folder / "home/runs/../out"
