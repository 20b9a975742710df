"""The README: every block of it is run, parsed or compared with what it came from."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING

import click
import pytest
from readme_parts import MARKS, PARTS, README, blocks, recipe_of, written

import drivetrain
import drivetrain_plugins
from drivetrain import Recipe
from drivetrain.cli import main

if TYPE_CHECKING:
    from pathlib import Path

ROOT = README.parent
TEXT = README.read_text(encoding="utf-8")
BLOCKS = blocks(TEXT)
TOPICS = ROOT / "examples" / "topics"
SMALL = {"steps=150": "steps=2", 'rows("train")': 'rows("train")[:64]', 'rows("evaluate")': 'rows("evaluate")[:16]'}


def of(language: str) -> list[str]:
    """Return the blocks of one language."""
    return [text for name, text in BLOCKS if name == language]


def run(folder: Path, *command: str) -> str:
    """Run a command in `folder`, where the README's Python files are; fail with its output."""
    environment = {**os.environ, "PYTHONPATH": str(TOPICS), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder, env=environment, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the README's Python blocks: those that name their file under that name."""
    for number, block in enumerate(of("python")):
        named = re.match(r"# (\w+\.py)\n", block)
        (tmp_path / (named[1] if named else f"block_{number}.py")).write_text(block, encoding="utf-8")
    return tmp_path


def test_every_block_has_a_known_language():
    """No block escapes: each language has its test below."""
    assert {language for language, _ in BLOCKS} <= {"bash", "console", "python", "toml", "json", "text"}
    assert len(of("python")) == 4
    made = [f"```text\n{block}```" for block in of("text")]
    assert made == [part for name in ("explain", "loop") for part in [written(TEXT, name)]]


@pytest.mark.parametrize("part", PARTS)
def test_made_parts_are_fresh(part: str):
    """The table, the loop and the plan are what the code says; make them again with `readme_parts.py --write`."""
    begin, end = (mark.format(part) for mark in MARKS)
    assert TEXT.count(begin) == TEXT.count(end) == 1
    assert written(TEXT, part) == PARTS[part](TEXT), "run: python tests/packaging/readme_parts.py --write"


def test_same_run_in_python(folder: Path):
    """The Python block is the topics recipe: the same plugins with the same options; and it runs (two steps of it)."""
    block = next(
        path for path in sorted(folder.glob("block_*.py")) if "topics_data" in path.read_text(encoding="utf-8")
    )
    text = block.read_text(encoding="utf-8")
    for long, short in SMALL.items():
        assert long in text
        text = text.replace(long, short)
    block.write_text(text, encoding="utf-8")
    printed = run(folder, block.name)
    assert 0 <= float(printed.splitlines()[-1]) <= 1
    of_python = json.loads((folder / "runs" / "topics" / "plan.json").read_text(encoding="utf-8"))
    of_recipe = Recipe.load(TOPICS / "recipe.toml").plan().as_dict()
    assert of_recipe["plugins"].pop("rows")
    assert of_python["plugins"] == json.loads(json.dumps(of_recipe["plugins"]))
    assert list(of_python["plugins"]) == list(of_recipe["plugins"])
    assert {**of_python["settings"], "steps": 150, "output": None} == {**of_recipe["settings"], "output": None}
    assert (folder / "runs" / "topics" / "export-hf" / "model.safetensors").is_file()


def test_own_plugin(folder: Path):
    """The plugin of the README trains: the block that uses it prints its steps and a finite loss."""
    block = next(path for path in folder.glob("block_*.py") if "GradientJitter" in path.read_text(encoding="utf-8"))
    steps, loss = run(folder, block.name).split()
    assert int(steps) == 40
    assert 0 < float(loss) < 1


def test_own_test(folder: Path):
    """The test file of the README passes for the plugin of the README."""
    printed = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "test_gradient_jitter.py")
    assert re.search(r"\d\d passed", printed)
    assert "failed" not in printed


def test_own_plugin_is_twenty_lines():
    """The plugin is as short as the README says."""
    plugin = next(block for block in of("python") if block.startswith("# gradient_jitter.py"))
    assert len([line for line in plugin.splitlines()[1:] if line.strip()]) <= 20


def test_own_rows(folder: Path):
    """The README's recipe trains on files with rows as the README shows them."""
    row = json.loads(of("json")[0])
    other = {"text": "It works well, and I like it.", "label": "praise"}
    rows = "".join(json.dumps(r) + "\n" for r in [row, other] * 8)
    for name in ("train.jsonl", "dev.jsonl"):
        (folder / name).write_text(rows, encoding="utf-8")
    (folder / "recipe.toml").write_text(recipe_of(TEXT), encoding="utf-8")
    printed = run(folder, "-c", "import drivetrain.cli as c; c.main()", "run", "recipe.toml", "--without", "checkpoint")
    assert "finished after 3 steps (3 epochs)" in printed
    assert "evaluate/accuracy" in printed


def test_other_toml_is_an_entry_point_or_plugins(tmp_path, monkeypatch):
    """Entry points name the README's class, and plugins fit into the example's recipe as they stand."""
    monkeypatch.setenv("HF_TOKEN", "a token")  # that a part names
    others = [tomllib.loads(block) for block in of("toml") if block != recipe_of(TEXT)]
    parts = [part for part in others if "plugins" in part]
    assert [part for part in others if part not in parts] == [
        {"project": {"entry-points": {"drivetrain.plugins.v1": {"gradient-jitter": "gradient_jitter:GradientJitter"}}}}
    ]
    assert parts
    for part in parts:
        recipe = Recipe.load(TOPICS / "recipe.toml", without=["checkpoint"]).as_dict()
        recipe["plugins"].update(part["plugins"])
        (tmp_path / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
        assert Recipe.load(tmp_path / "recipe.json").plan().problems == []


def test_continuous_integration_runs_the_commands():
    """Every command in a `bash` block stands in `.ci/run` as it is."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = [part.strip() for block in of("bash") for line in block.splitlines() for part in line.split("&&")]
    assert len(commands) == 19
    for command in commands:
        assert re.search(rf"^\s*{re.escape(command)}( .*)?$", script, flags=re.MULTILINE), command
    assert "pip install -c constraints.txt -e '.[examples]' && drivetrain run examples/topics/recipe.toml" in TEXT
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in TEXT


def test_other_commands_exist():
    """Every other command line is one that the command line's parser takes."""
    lines = [line.removeprefix("$ ") for block in of("console") for line in block.splitlines()]
    assert len(lines) >= 7
    for line in lines:
        program, name, *arguments = shlex.split(line)
        assert program == "drivetrain"
        command = main.get_command(click.Context(main), name)  # those of plugins, too
        with click.Context(command) as context:
            command.parse_args(context, arguments)


def test_what_does_not_work_is_said_where_the_readme_says():
    """Every message that the README quotes stands in the sources."""
    sources = "".join(p.read_text(encoding="utf-8") for f in ("kernel", "plugins") for p in (ROOT / f).rglob("*.py"))
    table = TEXT.partition("## What does not work")[2].partition("\n## ")[0]
    quoted = re.findall(r'\| [^|]*"([^"|]+)" \|$', table, flags=re.MULTILINE)
    assert len(quoted) == table.count('" |') >= 4
    assert [message for message in quoted if message not in sources] == []


def test_public_names():
    """Every public name can be imported, is documented, and stands in `__all__`."""
    for package in (drivetrain, drivetrain_plugins):
        assert sorted(package.__all__) == sorted(set(package.__all__))
        for name in package.__all__:
            value = getattr(package, name)
            assert name.startswith("__") or (value.__doc__ or "").strip(), name
