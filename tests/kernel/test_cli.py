"""The command line, end to end on a tiny model: what it prints, where, and with which exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata

import click
import pytest
from click.testing import CliRunner

from drivetrain import cli

PARTS = """\
import torch

class Model(torch.nn.Module):
    def __init__(self, fail_at=None):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.calls, self.fail_at = 0, fail_at

    def forward(self, x, y):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyError("the model broke")
        return {"loss": (self.layer(x)[:, 0] - y).square().mean()}

def rows(split):
    if split in ("train", "evaluate"):
        return [{"x": torch.full((3,), i / 8), "y": torch.tensor(i / 8)} for i in range(8)]
"""
RECIPE = """\
[run]
output = "out"
steps = 6
log_every = "2 steps"
device = "cpu"
[plugins.module]
factory = "cli_parts:Model"
[plugins.rows]
function = "cli_parts:rows"
[plugins.loader]
batch_size = 4
[plugins.adamw]
lr = 0.01
[plugins.evaluate]
every = "3 steps"
[plugins.checkpoint]
every = "2 steps"
[plugins.jsonl-log]
[plugins.export-safetensors]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with a recipe that trains, and make it the working directory."""
    (tmp_path / "cli_parts.py").write_text(PARTS)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "cli_parts", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def call(*arguments, status=0):
    """Call the command line in this process and check its exit status; other exceptions are raised."""
    result = CliRunner().invoke(cli.main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


def checkpoints(folder):
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_run_trains_and_stores_its_recipe(folder):
    """`run --json` prints the result as one JSON line on stdout, and the run's folder can rebuild the run."""
    result = call("run", "recipe.toml", "--json", "--set", "run.seed=3")
    (line,) = result.stdout.splitlines()
    got = json.loads(line)
    assert (got["steps"], got["epochs"], got["stopped"], got["output"]) == (6, 3.0, None, "out")
    assert 0 < got["metrics"]["evaluate/loss"] < 10
    stored = json.loads((folder / "out/recipe.json").read_text())
    assert stored["run"]["seed"] == 3
    assert stored["folder"] == str(folder)
    assert list(stored["plugins"]) == list(json.loads((folder / "out/plan.json").read_text())["plugins"])


def test_run_prints_for_people(folder):
    """Without --json the result is a few readable lines."""
    out = call("run", "recipe.toml").stdout
    assert "finished after 6 steps (3 epochs)" in out
    assert "evaluate/loss: " in out
    assert "in out" in out


def test_the_changes_of_the_command_line_arrive(folder):
    """--set, --with and --without change what is run."""
    got = json.loads(
        call("run", "recipe.toml", "--json", "--set", "run.steps=2", "--without", "checkpoint", "--with", "clip").stdout
    )
    assert got["steps"] == 2
    assert "grad_norm" in got["metrics"]
    assert not (folder / "out/checkpoints").exists()


def test_a_run_refuses_the_folder_of_another(folder):
    """Checkpoints of a run are never mixed with those of another; the message names both ways on."""
    call("run", "recipe.toml")
    before = checkpoints(folder / "out")
    stored = (folder / "out/recipe.json").read_bytes()
    err = call("run", "recipe.toml", "--set", "run.seed=5", status=2).stderr
    assert "drivetrain resume out" in err
    assert "--fresh" in err
    assert "step-00000006" in err
    assert checkpoints(folder / "out") == before
    assert (folder / "out/recipe.json").read_bytes() == stored


def test_fresh_moves_the_old_run_aside(folder):
    """--fresh keeps every old run, numbered."""
    call("run", "recipe.toml")
    for number in (1, 2):
        err = call("run", "recipe.toml", "--fresh").stderr
        assert f"out.old-{number}" in err
    assert checkpoints(folder / "out.old-1") == checkpoints(folder / "out.old-2") == checkpoints(folder / "out")
    assert (folder / "out.old-2/recipe.json").exists()


def test_a_wrong_recipe_moves_nothing(folder):
    """--fresh touches the old run only when the new one can start."""
    call("run", "recipe.toml")
    call("run", "recipe.toml", "--fresh", "--set", "adamw.lr=-1", status=2)
    call("run", "recipe.toml", "--fresh", "--with", "sgd", status=2)
    assert not (folder / "out.old-1").exists()


def test_an_interrupted_run_goes_on_to_the_same_weights(folder):
    """Stopped by an error after step 4 and resumed, a run ends with the weights of one that was not stopped."""
    whole = json.loads(call("run", "recipe.toml", "--json", "--set", "run.output=whole").stdout)
    with pytest.raises(KeyError, match="the model broke"):
        call("run", "recipe.toml", "--set", "module.arguments={fail_at = 8}")
    assert checkpoints(folder / "out")[-1] == "step-00000004"
    resumed = json.loads(
        call("resume", "out", "--json", "--set", "module.arguments={}", "--set", "checkpoint.on_change=accept").stdout
    )
    assert resumed["steps"] == 6
    assert resumed["metrics"] == whole["metrics"]
    for name in ("whole", "out"):
        call("export", name, "--format", "safetensors", "--to", f"{name}.safetensors")
    assert (folder / "whole.safetensors").read_bytes() == (folder / "out.safetensors").read_bytes()


def test_run_resume_goes_on_if_there_is_something(folder):
    """`run --resume` starts when there is no checkpoint and goes on when there is one."""
    first = json.loads(call("run", "recipe.toml", "--resume", "--json", "--set", "run.steps=4").stdout)
    assert first["steps"] == 4
    again = json.loads(call("run", "recipe.toml", "--resume", "--json", "--set", "checkpoint.on_change=accept").stdout)
    assert again["steps"] == 6
    assert "contradict" in call("run", "recipe.toml", "--resume", "--fresh", status=2).stderr


def test_a_moved_run_can_be_used(folder):
    """A run's folder may be renamed; resume, evaluate and export take the new name."""
    call("run", "recipe.toml")
    (folder / "out").rename(folder / "moved")
    assert call("resume", "moved").stdout.endswith("in moved\n")
    call("export", "moved", "--format", "safetensors", "--to", "m.safetensors")
    assert not (folder / "out").exists()


def test_evaluate_measures_what_the_run_measured(folder):
    """`evaluate` gives the value that the run logged after its last step, and leaves the run's log alone."""
    ended = json.loads(call("run", "recipe.toml", "--json").stdout)["metrics"]["evaluate/loss"]
    log = (folder / "out/log.jsonl").read_bytes()
    got = json.loads(call("evaluate", "out", "--json").stdout)
    assert got["loss"] == ended
    assert json.loads(call("evaluate", "out", "--split", "train", "--json").stdout)["loss"] > 0
    assert "loss: " in call("evaluate", "out").stdout
    assert (folder / "out/log.jsonl").read_bytes() == log
    assert "there is no split 'dev'" in call("evaluate", "out", "--split", "dev", status=2).stderr


def test_export_knows_the_formats_of_the_run(folder):
    """A format that no plugin of the run writes is refused with those there are."""
    call("run", "recipe.toml")
    err = call("export", "out", "--format", "onnx", "--to", "x", status=2).stderr
    assert "'onnx'" in err
    assert "safetensors" in err


@pytest.mark.parametrize("command", [["resume"], ["evaluate"], ["export", "--format", "safetensors", "--to", "x"]])
def test_what_is_no_run_is_refused(folder, command):
    """Number 28: missing, a file, no recipe, no good checkpoint; each message says which."""
    name, *options = command
    assert "no file missing" in call(name, "missing", *options, status=2).stderr
    assert "recipe.json" in call(name, "recipe.toml", *options, status=2).stderr
    (folder / "empty").mkdir()
    assert "no run's folder" in call(name, "empty", *options, status=2).stderr
    call("run", "recipe.toml", "--set", "checkpoint.at_end=false", "--set", "checkpoint.every='50 steps'")
    assert "no checkpoint" in call(name, "out", *options, status=2).stderr
    (folder / "out/recipe.json").write_text("{")
    assert "recipe.json:1: the recipe cannot be read" in call(name, "out", *options, status=2).stderr


def test_a_checkpoint_of_another_configuration_is_refused(folder):
    """Number 28: what differs is named, and nothing is trained."""
    call("run", "recipe.toml", "--set", "run.steps=2")
    before = (folder / "out/recipe.json").read_bytes()
    for command in (["resume", "out"], ["run", "recipe.toml", "--resume"]):
        assert "weight_decay" in call(*command, "--set", "adamw.weight_decay=0.5", status=2).stderr
        assert (folder / "out/recipe.json").read_bytes() == before


def test_explain_shows_the_plan(folder):
    """`explain` prints every plugin in its place, trains nothing, and exits with 0 when nothing is wrong."""
    out = call("explain", "recipe.toml", "--set", "adamw.lr=0.5").stdout
    assert "lr=0.5" in out
    for hook, owner in (("build_optimizer", "adamw"), ("forward", "drivetrain"), ("save", "checkpoint")):
        assert any(line.split()[:2] == [hook, owner] for line in out.splitlines()), out
    assert not (folder / "out").exists()
    plan = json.loads(call("explain", "recipe.toml", "--json").stdout)
    assert plan["hooks"]["build_optimizer"]["owner"] == "adamw"
    assert plan["problems"] == []


def test_explain_ends_with_the_problems(folder):
    """The plan of what is fine comes first, all problems last, and the exit status is 2."""
    result = call("explain", "recipe.toml", "--set", "adamw.lr=0", "--with", "sgd", "--with", "nothing", status=2)
    assert "sgd" in result.stdout
    tail = result.stdout.partition("2 problem(s):")[2]
    assert "--set adamw.lr: plugin 'adamw', option 'lr'" in tail
    assert "--with nothing: there is no plugin 'nothing'" in tail
    problems = json.loads(call("explain", "recipe.toml", "--with", "sgd", "--json", status=2).stdout)["problems"]
    assert [p["kind"] for p in problems] == ["conflict"]


def test_errors_of_input_have_no_traceback(folder):
    """What drivetrain refuses is one message on stderr, nothing on stdout, exit status 2."""
    result = call("run", "recipe.toml", "--json", "--set", "adamw.lr=fast", status=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: --set adamw.lr: plugin 'adamw', option 'lr'")
    assert "Traceback" not in result.stderr


def test_other_errors_keep_traceback_and_notes(folder):
    """An error in the user's model shows where it happened and in which step."""
    process = subprocess.run(
        [sys.executable, "-m", "drivetrain.cli", "run", "recipe.toml", "--set", "module.arguments={fail_at = 3}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 1
    assert "Traceback" in process.stderr
    assert "cli_parts.py" in process.stderr
    assert "the model broke" in process.stderr
    assert "step 2" in process.stderr


def test_plugins_lists_the_catalogue_without_torch():
    """The list names every entry point with role and summary, and neither torch nor a plugin's module is imported."""
    code = """
import sys, drivetrain.cli
try:
    drivetrain.cli.main(sys.argv[1:])
finally:
    loaded = [m for m in sys.modules if m.partition(".")[0] in ("torch", "numpy", "transformers")
              or m.startswith("drivetrain_plugins.") and m.count(".") > 1]
    print(loaded, file=sys.stderr)
"""
    process = subprocess.run(
        [sys.executable, "-c", code, "plugins", "--json"], capture_output=True, text=True, check=True
    )
    assert process.stderr.strip() == "[]"
    rows = {row["name"]: row for row in json.loads(process.stdout)}
    assert rows.keys() == {p.name for p in metadata.entry_points(group="drivetrain.plugins.v1")}
    assert rows["adamw"]["role"] == "optim"
    assert rows["adamw"]["summary"].startswith("Update with AdamW")
    assert all(row["role"] and row["summary"] and row["distribution"] for row in rows.values())


def test_plugins_prints_a_table():
    """For people the list is a table."""
    out = call("plugins").stdout
    assert "what it does" in out
    assert "checkpoint" in out


def test_one_plugin_is_described():
    """Its options have type, default, bounds and help; its hooks and origin are named."""
    about = json.loads(call("plugins", "adamw", "--json").stdout)
    assert about["options"]["betas"]["type"] == "tuple[float, float]"
    assert about["options"]["betas"]["default"] == "(0.9, 0.999)"
    assert about["options"]["betas"]["allowed"] == ">= 0 and < 1"
    assert about["options"]["betas"]["help"]
    assert about["hooks"] == ["build_optimizer"]
    assert about["class"] == "drivetrain_plugins.optim.adamw:AdamW"
    assert json.loads(call("plugins", "module", "--json").stdout)["options"]["factory"]["default"] == "required"
    out = call("plugins", "checkpoint").stdout
    assert "fit (wrapper)" in out
    assert "'accept'" in out
    assert "'adamw'" in call("plugins", "adamww", status=2).stderr


@click.command()
@click.argument("word")
def echo(word):
    """Echo a word."""
    click.echo(f"echo {word}")


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """Return a function that installs a distribution with commands."""

    def install(name, **commands):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = "".join(f"{command} = {value}\n" for command, value in commands.items())
        (info / "entry_points.txt").write_text(f"[drivetrain.commands.v1]\n{lines}")
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def test_plugins_bring_commands(offered):
    """A command of another distribution is listed by name, imported when it is called, and runs."""
    offered("their-tools", echo=f"{__name__}:echo", broken="no_such_module:command")
    out = call("--help").stdout
    assert "Commands of plugins" in out
    assert "from their-tools 1.0" in out
    assert call("echo", "hello").stdout == "echo hello\n"
    err = call("broken", status=2).stderr
    assert "'broken'" in err
    assert "no_such_module" in err
    assert "reinstall their-tools" in err


def test_two_distributions_cannot_offer_one_command(offered):
    """Which of two would run is not left to chance, and a plugin cannot take over a built-in command."""
    offered("their-tools", echo=f"{__name__}:echo", plugins=f"{__name__}:echo")
    offered("other-tools", echo=f"{__name__}:PARTS")
    err = call("echo", "x", status=2).stderr
    assert "their-tools" in err
    assert "other-tools" in err
    assert json.loads(call("plugins", "--json").stdout)


def test_what_is_no_command_is_refused(offered):
    """An entry point must be a click command."""
    offered("their-tools", parts=f"{__name__}:PARTS")
    assert "no click command" in call("parts", status=2).stderr


def test_an_unknown_command_is_told_the_nearest():
    """A misspelt command gets a hint."""
    assert "did you mean 'explain'?" in call("explian", status=2).stderr
