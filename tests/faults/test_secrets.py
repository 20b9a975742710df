"""A secret of a run is in none of its files and in nothing that it says, however the run goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from click.testing import CliRunner

from drivetrain import ConfigError, Recipe, Trainer, hookimpl, option, plugin
from drivetrain.cli import main
from drivetrain.testing.files import ensure, write_kit
from drivetrain_plugins import Hub

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins" / "export"))

from hub_server import Hub as Server

TOKEN = "hf_SecretOfThisTest0123456789"
PARTS = """
from drivetrain.testing.kinds import text_rows


def rows(split):
    return {"train": text_rows(8), "evaluate": text_rows(4, 8)}.get(split)
"""
RECIPE = """
[run]
output = "{output}"
steps = 4
device = "cpu"
log_every = "1 step"
[plugins.hf-model]
path = "{model}"
labels = ["a", "b", "c"]
[plugins.rows]
function = "secret_parts:rows"
[plugins.tokenize]
[plugins.pad]
[plugins.loader]
batch_size = 4
[plugins.adamw]
[plugins.evaluate]
every = "2 steps"
[plugins.checkpoint]
every = "2 steps"
[plugins.jsonl-log]
[plugins.tensorboard]
[plugins.progress]
[plugins.model-card]
[plugins.hub]
repo = "me/m"
token = "env:SOME_TOKEN"
endpoint = "{endpoint}"
when = "all"
allow = ["*"]
deadline_s = 60
[plugins.export-hf]
"""


class Crash:
    """Raises in a hook that holds the plugin with the secret, and says it."""

    @hookimpl
    def step_end(self, step):
        if step.run.progress.step == 3:
            hub, given = step.run.plugins["hub"], dict(step.run.plugins)
            print(hub, given)
            raise RuntimeError(f"with {hub} among the locals")


@pytest.fixture
def online(monkeypatch):
    """Let the library reach the loopback from this process."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def server():
    with Server(TOKEN) as running:
        yield running


@pytest.fixture
def recipe(tmp_path, server):
    """Return a recipe that writes all there is to write, and what its process gets as its environment."""
    kit = tmp_path / "kit"
    kit.mkdir()
    (tmp_path / "secret_parts.py").write_text(PARTS)
    model = ensure(write_kit(kit), "model")
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE.format(output=tmp_path / "run", model=model, endpoint=server.url))
    return file


def spoken(*command, folder):
    """Run a command that knows the token; return its status and all that it said."""
    own = {"SOME_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, **own}, cwd=folder, capture_output=True, check=False, timeout=300
    )
    return done.returncode, (done.stdout + done.stderr).decode()


def assert_silent(server, folder, said):
    """Look through every byte of every file, all that was said, and the bodies of all requests to the hub."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    holding = [str(path.relative_to(folder)) for path in files if TOKEN.encode() in path.read_bytes()]
    assert holding == []
    assert TOKEN not in said
    assert not any(TOKEN.encode() in body for body in server.bodies)
    assert not any(TOKEN.encode() in content for content in server.files("me/m").values())


def test_a_run_by_recipe_tells_nobody(tmp_path, server, recipe):
    """Checkpoints, logs, plan, recipe, export, card and uploads of a whole run hold no byte of the token."""
    status, said = spoken("-m", "drivetrain.cli", "run", str(recipe), folder=tmp_path)
    assert status == 0, said
    assert_silent(server, tmp_path, said)
    written = {path.name for path in (tmp_path / "run").rglob("*")}
    assert {"plan.json", "recipe.json", "log.jsonl", "manifest.json", "README.md", "config.json"} <= written
    assert json.loads((tmp_path / "run/plan.json").read_text())["plugins"]["hub"]["options"]["token"] == "***"
    assert json.loads((tmp_path / "run/recipe.json").read_text())["plugins"]["hub"]["token"] == "env:SOME_TOKEN"
    assert {"README.md", "checkpoints/step-00000004/manifest.json"} <= set(server.files("me/m"))


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.usefixtures("online")
def test_a_run_that_crashes_tells_nobody(tmp_path, server, recipe, capfd):
    """A token given in Python is in no traceback, though it is written with all locals, the plugin among them."""
    plain = Recipe.load(recipe, without=["hub"]).trainer()
    hub = Hub("me/m", token=TOKEN, endpoint=server.url, when="all", allow=["*"])
    plugins = [*plain.plugins.items(), ("hub", hub), Crash()]
    with pytest.raises(RuntimeError, match="among the locals") as error:
        Trainer(plugins=plugins, output=tmp_path / "run", steps=4, device="cpu").fit()
    inner = error.value.__traceback__.tb_next  # without this test, which has the token
    told = traceback.TracebackException(RuntimeError, error.value, inner, capture_locals=True)
    said = "".join([*told.format(), *capfd.readouterr()])
    assert said.count("Hub(repo='me/m'") > 2
    assert_silent(server, tmp_path, said)


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "{recipe}"],
        ["explain", "{recipe}", "--json"],
        ["plugins", "hub"],
        ["explain", "{recipe}", "--set", f"hub.token={TOKEN}"],
        ["explain", "{recipe}", "--set", f"hub.tokn={TOKEN}"],
        ["explain", "{recipe}", "--set", f"hub.token=['{TOKEN}']"],
        ["run", "{recipe}", "--set", f"hub.token={TOKEN}"],
    ],
)
def test_commands_tell_nobody(recipe, monkeypatch, arguments):
    """What is explained, described or refused shows no token: one in the environment, in a recipe or misspelt."""
    monkeypatch.setenv("SOME_TOKEN", TOKEN)
    said = CliRunner().invoke(main, [part.format(recipe=recipe) for part in arguments])
    assert said.exit_code == (2 if "--set" in arguments else 0)
    assert TOKEN not in said.output + str(said.exception)


def test_a_secret_that_is_no_toml_is_not_told(recipe):
    """A token without quotes is an error of syntax; the line is named and not shown."""
    recipe.write_text(recipe.read_text().replace('"env:SOME_TOKEN"', TOKEN))
    with pytest.raises(ConfigError, match="cannot be read") as error:
        Recipe.load(recipe)
    assert TOKEN not in str(error.value)


@plugin(role="control", effect="observes")
class Choosy:
    """Has secrets that it may refuse."""

    key: str | None = option(None, secret=True, choices=["a", None])
    pin: int | None = option(None, secret=True, ge=1000)

    def __attrs_post_init__(self):
        """Refuse a pair of values and show one."""
        if self.pin == 4321:
            raise ValueError(f"not {self.pin}")


def test_a_secret_that_is_refused_is_not_shown():
    """Neither a check of choices nor of bounds shows what it received, and repr leaves secrets out."""
    for options in ({"key": TOKEN}, {"pin": 321}):
        with pytest.raises(ValueError, match=r"Received: \*\*\*") as error:
            Choosy(**options)
        assert str(next(iter(options.values()))) not in str(error.value)
    assert "1234" not in repr(Choosy(pin=1234))
    assert TOKEN not in repr(Hub("me/m", token=TOKEN))
    assert "me/m" in repr(Hub("me/m", token=TOKEN))


def test_a_secret_in_a_plugins_own_message_is_masked(tmp_path, monkeypatch):
    """What a plugin's own check says of a secret from the environment is told without it."""
    monkeypatch.setenv("SOME_PIN", "a")
    recipe = Recipe.from_dict({"folder": str(tmp_path), "plugins": {}})
    monkeypatch.setattr(
        Choosy, "__attrs_post_init__", lambda self: (_ for _ in ()).throw(ValueError(f"not <{self.key}>"))
    )
    assert recipe._make(Choosy, {"key": "env:SOME_PIN"}, ("plugins", "choosy")) is None
    assert "not <***>" in str(recipe.problems[-1])


@pytest.mark.usefixtures("online")
def test_the_wrong_token_is_not_shown(tmp_path, server, recipe, monkeypatch):
    """A hub that refuses a token ends the run before step 0, and the message does not show it."""
    monkeypatch.setenv("SOME_TOKEN", TOKEN)
    server.token, server.repos["me/m"] = "hf_another", {"main": {}}
    said = CliRunner().invoke(main, ["run", str(recipe)])
    assert said.exit_code == 2
    assert "Invalid user token" in said.output
    assert_silent(server, tmp_path, said.output + str(said.exception))
