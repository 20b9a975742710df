"""`drivetrain checkpoints`: list, verify, prune, convert and compare, without the run's plugins."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from checkpoint_runs import ROWS, named, steps, trainer
from click.testing import CliRunner

import drivetrain
from drivetrain.cli import main
from drivetrain_plugins import AdamW, Checkpoint, Evaluate
from drivetrain_plugins.checkpoint import _manifest, _saved
from drivetrain_plugins.checkpoint._convert import convert
from drivetrain_plugins.checkpoint._lock import RunLock
from drivetrain_plugins.checkpoint._place import checkpoint_at

ALL = named(1, 2, 3, 4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a run with an evaluation and a checkpoint a step; that of step 3 is a milestone."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    checkpoint = Checkpoint(every="1 step", keep=4, best=1, milestones="3 steps")
    trainer(folder, Evaluate(every="1 step"), checkpoint=checkpoint, steps=4).fit(ROWS, evaluate=ROWS)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """Return a copy of it that a test may change."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def call(*arguments, status=0, stdin=None):
    """Run the command; return what it prints."""
    done = CliRunner().invoke(main, ["checkpoints", *map(str, arguments)], input=stdin)
    assert done.exit_code == status, done.output
    assert "Traceback" not in done.output
    return done.output


def called(*arguments, status=0):
    return json.loads(call(*arguments, "--json", status=status))


def manifest(run, step):
    return json.loads((run / "checkpoints" / named(step)[0] / "manifest.json").read_text())


def seal(run, step, **fields):
    """Change a manifest, with the digest that belongs to it: as a stranger can."""
    content = {k: v for k, v in manifest(run, step).items() if k not in ("sha256", "magic")} | fields
    (run / "checkpoints" / named(step)[0] / "manifest.json").write_bytes(_manifest.seal(content))


def flip(run, step, file="model.safetensors"):
    path = run / "checkpoints" / named(step)[0] / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def losses(run):
    return {step: manifest(run, step)["metrics"]["evaluate/loss"] for step in range(1, 5)}


# --- to list ---------------------------------------------------------------------------------------------------------


def test_the_list_tells_what_manifests_tell(finished):
    """The oldest first: step, position, kind, form, size, ranks, why it is kept, metrics, and the versions once."""
    lines = call(finished).splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["checkpoint", *ALL]
    sizes = [sum(about["size"] for about in manifest(finished, s)["files"].values()) for s in (1, 2, 3, 4)]
    best = min(losses(finished), key=losses(finished).get)
    for line, step, size in zip(lines[1:5], (1, 2, 3, 4), sizes, strict=True):
        kept = ["newest", *(["best"] if step == best else []), *(["milestone"] if step == 3 else [])]
        position = f"{step // 4}      {step * 8} "
        assert position in line, "4 steps are an epoch"
        assert f"run, full  {size / 1000:.4g} kB" in line
        assert ", ".join(kept) in line
        assert f"evaluate/loss={losses(finished)[step]:.6g}" in line
    assert lines[5] == ""
    assert lines[6].startswith(f"written by drivetrain {drivetrain.__version__}, torch {torch.__version__}, ")
    assert lines[7] == "the run keeps the newest 4 and the best 1 by evaluate/loss (min)"


def test_json_has_everything(finished):
    """For programs: exact bytes, metrics, position, versions and reasons."""
    listed = called(finished)
    assert [about["name"] for about in listed] == ALL
    third = manifest(finished, 3)
    assert listed[2] == {
        "name": ALL[2],
        "where": str(finished / "checkpoints" / ALL[2]),
        "damaged": None,
        **{key: third[key] for key in ("step", "position", "kind", "world_size", "schema", "metrics")},
        "form": "full",
        "parts": 0,
        "bytes": sum(about["size"] for about in third["files"].values()),
        "kept_for": listed[2]["kept_for"],
        "versions": {
            **{key: third["environment"][key] for key in ("drivetrain", "torch", "numpy", "python")},
            "states": third["states"],
        },
    }
    assert {"newest", "milestone"} <= set(listed[2]["kept_for"])


def test_metrics_that_are_not_finite(run):
    """A NaN is listed, is best of nothing, and is text in JSON, which has none."""
    seal(run, 4, metrics={"evaluate/loss": {"$float": "nan"}, "low": {"$float": "-inf"}})
    assert "evaluate/loss=nan low=-inf" in call(run)
    listed = CliRunner().invoke(main, ["checkpoints", str(run), "--json"]).output
    assert json.loads(listed, parse_constant=pytest.fail)[3]["metrics"] == {"evaluate/loss": "nan", "low": "-inf"}
    assert "best" not in json.loads(listed)[3]["kept_for"]


def test_what_run_may_be(run, monkeypatch):
    """A run's folder, a folder of checkpoints, one checkpoint, relative or as a file URL: each lists what it names."""
    folder = run / "checkpoints"
    for place in (run, folder, f"{folder}/", f"file://{folder}"):
        assert [about["name"] for about in called(place)] == ALL
    assert [about["name"] for about in called(folder / ALL[1])] == [ALL[1]]
    monkeypatch.chdir(folder)
    assert [about["name"] for about in called(ALL[2])] == [ALL[2]]
    convert(checkpoint_at(folder / ALL[0]), checkpoint_at(folder / "mine"), "sharded", 2)
    assert [about["name"] for about in called(run)] == [ALL[0], "mine", *ALL[1:]]
    shutil.copytree(folder / "mine", folder / ".trash-00000001-0123456789abcdef")  # what a kill leaves
    assert len(called(run)) == 5
    assert "sharded (2 parts)" in call(folder / "mine")


def test_a_store_and_the_run_that_saves_to_it(tmp_path):
    """By the store's URL, by a checkpoint's, and by the run's folder, whose plan says where it saves."""
    url = f"memory://{tmp_path.name}/run"
    checkpoint = Checkpoint(every="2 steps", store=url)
    trainer(tmp_path, checkpoint=checkpoint, steps=4).fit(ROWS)
    for place in (url, f"{url}/", tmp_path):
        assert [about["name"] for about in called(place)] == named(2, 4)
    assert [about["where"] for about in called(f"{url}/{ALL[3]}")] == [f"{url}/{ALL[3]}"]
    assert "0 of 2 damaged" in call(url, "--verify")
    assert "Whether a run saves there cannot be seen" in call(url, "--prune", 1, status=1, stdin="n\n")
    call(url, "--convert", 4, "--to", f"{url}-copy/{ALL[3]}", "--form", "sharded", "--parts", 2)
    assert "~ checkpoint: form was 'full'" in call(url, "--diff", 4, f"{url}-copy/{ALL[3]}")
    call(tmp_path, "--prune", 1, "--yes")
    assert [about["name"] for about in called(url)] == named(4)


def test_a_store_that_is_a_folder(tmp_path):
    """A run whose checkpoints go to another folder is listed by its own, and owned when they are pruned."""
    checkpoint = Checkpoint(every="2 steps", store=str(tmp_path / "elsewhere"))
    trainer(tmp_path / "run", checkpoint=checkpoint, steps=4).fit(ROWS)
    assert [about["name"] for about in called(tmp_path / "run")] == named(2, 4)
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    assert "belongs to another run" in call(tmp_path / "run", "--prune", 1, "--yes", status=2)
    lock.release()
    call(tmp_path / "run", "--prune", 1, "--yes")
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == named(4)


def test_damaged_ones_are_listed_as_such(run):
    """A manifest that is not as written is told with its reason; of the rest only the manifest is read."""
    flip(run, 1)
    (run / "checkpoints" / ALL[1] / "manifest.json").write_text("{}")
    (run / "checkpoints" / ALL[2] / "manifest.json").unlink()
    lines = call(run).splitlines()
    assert [line.split()[:3] for line in lines[1:5]][1:3] == [[ALL[1], "damaged"], [ALL[2], "damaged"]]
    assert "run, full" in lines[1], "that its weights are damaged takes --verify"
    assert f"damaged: {ALL[1]}: manifest.json: expected an object with magic" in lines[-2]
    assert lines[-1] == f"damaged: {ALL[2]}: manifest.json is missing"


def test_nothing_of_a_checkpoint_runs_or_is_needed(run, tmp_path, monkeypatch):
    """Classes that a manifest names are not imported, whether or not they are there, in any mode."""
    (tmp_path / "boom.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = manifest(run, 4)["plugins"]
    other = {"distribution": "never-installed", "version": "9", "effect": "changes", "options": {"x": 1}}
    for name, module in (("boom", "boom:Boom"), ("gone", "no.such.module:Plugin")):
        plugins[name] = {"role": "optim", "class": module, **other}
    seal(run, 4, plugins=plugins)
    assert "gone (never-installed 9) x=1" in call(run, "--diff", 1, 4)
    for mode in ([], ["--verify"], ["--prune", 1, "--yes"], ["--convert", 4, "--to", tmp_path / "copy"]):
        call(run, *mode)
    assert "boom" not in sys.modules
    assert _saved.read(*checkpoint_at(tmp_path / "copy")).manifest["plugins"] == plugins


def test_a_strangers_text_cannot_move_the_cursor(run):
    """Control characters in a manifest are printed as what they are."""
    seal(run, 4, metrics={"\x1b[2J\x9b1m\nloss": 1.0})
    for mode in ([], ["--diff", 3, 4]):
        printed = call(run, *mode)
        assert "\\x1b[2J" in printed
        assert not set(printed) & {"\x1b", "\x9b"}


WRONG = {
    "metrics": [{"loss": "low"}, {"loss": {"$tensor": "state/x"}}, {"loss": [1]}],
    "plugins": [{"adamw": 3}, {"adamw": {"options": {}}}],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in WRONG.items() for v in values])
def test_a_manifest_that_no_save_wrote_is_damaged(run, field, value):
    """With the right digest and fields of the right type, but not what a save writes in them: told, not a traceback."""
    seal(run, 4, **{field: value})
    assert f"damaged: {ALL[3]}: manifest.json: " in call(run)
    assert "manifest.json: " in call(run, "--diff", 3, 4, status=2)
    call(run, "--prune", 1, "--yes")
    assert steps(run) == ALL[2:]


# --- to verify -------------------------------------------------------------------------------------------------------


def test_verify_reads_every_byte(run):
    """All valid: status 0. A flipped bit, a missing file: status 1, with file, what was expected and found."""
    assert call(run, "--verify").splitlines()[-1] == "0 of 4 damaged"
    flip(run, 2)
    (run / "checkpoints" / ALL[3] / "state.json").unlink()
    lines = call(run, "--verify", status=1).splitlines()
    expected = manifest(run, 2)["files"]["model.safetensors"]["sha256"]
    assert f"{ALL[1]}: damaged: model.safetensors: expected sha256 {expected}, found " in lines[1]
    assert lines[3] == f"{ALL[3]}: damaged: state.json is missing"
    assert lines[-1] == "2 of 4 damaged"
    about = called(run, "--verify", status=1)
    assert about["damaged"] == 2
    assert [row["damaged"] is None for row in about["checkpoints"]] == [True, False, True, False]


# --- to prune --------------------------------------------------------------------------------------------------------


def test_prune_keeps_what_retention_keeps(run):
    """The newest, the best by the metric and milestones stay; `--dry-run` says so first and removes nothing."""
    worst = max(losses(run), key=losses(run).get)
    best = ["--best", 1, "--mode", "max"]
    told = called(run, "--prune", 1, *best, "--dry-run")
    assert steps(run) == ALL
    expected = sorted({*named(worst), *named(3, 4)})
    assert (told["kept"], sorted(told["removed"])) == (expected, sorted(set(ALL) - set(expected)))
    assert called(run, "--prune", 1, *best, "--yes") == {**told, "dry_run": False}
    assert steps(run) == expected
    assert "nothing to remove" in call(run, "--prune", 1, *best)


def test_prune_asks(run):
    """Without `--yes` it asks; anything but yes, and no answer at all, leaves everything."""
    for answer in ("n\n", ""):
        assert f"Remove {ALL[0]}, {ALL[1]}: 2 of 4" in call(run, "--prune", 1, status=1, stdin=answer)
        assert steps(run) == ALL
    call(run, "--prune", 1, stdin="y\n")
    assert steps(run) == ALL[2:]


def test_prune_never_counts_on_a_damaged_one(run):
    """The newest has a flipped bit: it stays to be looked at, and the newest valid one is kept in its place."""
    seal(run, 3, milestone=False)
    flip(run, 4)
    printed = call(run, "--prune", 1, "--yes")
    assert f"damaged, stays: {ALL[3]}: model.safetensors: expected sha256" in printed
    assert steps(run) == ALL[2:]
    flip(run, 3)
    assert "is valid, so nothing is removed" in call(run, "--prune", 1, "--yes", status=2)
    assert steps(run) == ALL[2:]


def test_prune_keeps_the_newest_that_can_be_resumed(run):
    """Where later ones hold weights only, the newest from which the run could go on stays."""
    for step in (3, 4):
        seal(run, step, kind="weights", milestone=False)
    call(run, "--prune", 1, "--yes")
    assert steps(run) == named(2, 4)


def test_prune_refuses_while_a_run_owns_the_folder(run):
    """Another process that lives owns the run: nothing goes; a dry run may look; after its end it may go."""
    script = (
        "import sys; from drivetrain_plugins.checkpoint._lock import RunLock\n"
        "lock = RunLock(sys.argv[1]); lock.acquire(); print('owned', flush=True); sys.stdin.read(); lock.release()"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "owned\n"
        for mode in (["--prune", 1, "--yes"], ["--convert", 4, "--to", run / "checkpoints" / ALL[3]]):
            printed = call(run, *mode, status=2)
            assert "belongs to another run" in printed
            assert f"process {owner.pid}" in printed
        assert called(run, "--prune", 1, "--dry-run")["removed"] == ALL[:2]
        assert steps(run) == ALL
    call(run, "--prune", 1, "--yes")
    assert steps(run) == ALL[2:]
    assert not (run / "run.lock").exists()


# --- to convert and to compare ---------------------------------------------------------------------------------------


def test_convert_there_and_back(run, tmp_path):
    """To two parts elsewhere, and in place; the tensors are the same and the run goes on."""
    copy = tmp_path / "elsewhere" / ALL[3]
    printed = call(run, "--convert", 4, "--to", copy, "--form", "sharded", "--parts", 2)
    assert f"wrote {copy}: run, sharded (2 parts), " in printed
    saved = [_saved.read(*checkpoint_at(path)) for path in (run / "checkpoints" / ALL[3], copy)]
    assert str(saved[0].tree) == str(saved[1].tree)
    place = run / "checkpoints" / ALL[3]
    about = called(run, "--convert", ALL[3], "--to", place, "--form", "sharded", "--parts", 2)
    assert (about["form"], about["parts"], about["damaged"]) == ("sharded", 2, None)
    checkpoint = Checkpoint(every="1 step", keep=4)
    result = trainer(run, Evaluate(every="1 step"), checkpoint=checkpoint, steps=5).fit(
        ROWS, evaluate=ROWS, resume=True
    )
    assert result.steps == 5


def test_convert_replaces_nothing(run):
    """A target that is there already is refused, whatever it is, and stays."""
    for target in (run / "checkpoints" / ALL[2], run / "plan.json", run):
        assert "is there already" in call(run, "--convert", 4, "--to", target, status=2)
    assert steps(run) == ALL
    assert "no name for a checkpoint of step 4" in call(run, "--convert", 4, "--to", run / named(9)[0], status=2)
    assert "expected a form" in call(
        run, "--convert", 4, "--to", run / "x", "--form", "sharded", "--parts", 10**6, status=2
    )
    assert not (run / "x").exists()


def test_diff_is_line_by_line(run, tmp_path):
    """Plugins, options, versions, order, environment, settings and metrics; equal manifests differ in nothing."""
    other = trainer(tmp_path / "other", Evaluate(every="2 steps"), optimizer=AdamW(lr=0.02), steps=2)
    other.settings.seed = 4
    other.fit(ROWS, evaluate=ROWS)
    second = tmp_path / "other" / "checkpoints" / ALL[1]
    content = manifest(tmp_path / "other", 2)
    plugins = dict(reversed(content["plugins"].items()))
    plugins["adamw"] = {**plugins["adamw"], "version": "0.0.9"}
    del plugins["evaluate"]
    environment = {**content["environment"], "torch": "9.0"}
    seal(tmp_path / "other", 2, plugins=plugins, environment=environment, world_size=2, states={"adamw": 2})
    lines = call(run, "--diff", ALL[1], second).splitlines()
    for line in (
        "~ checkpoint: world_size was 1, is 2",
        "~ adamw: lr was 0.01, is 0.02",
        f"~ adamw: version was {drivetrain.__version__!r}, is '0.0.9'",
        "~ order: was adamw, checkpoint; is checkpoint, adamw",
        "~ settings: seed was 3, is 4",
        "~ settings: total_steps was 4, is 2",
        "~ states: adamw was 'absent', is 2",
        f"~ environment: torch was {content['environment']['torch']!r}, is '9.0'",
        f"~ metrics: evaluate/loss was {losses(run)[2]!r}, is {content['metrics']['evaluate/loss']!r}",
    ):
        assert line in lines, line
    assert [line for line in lines if line.startswith("- evaluate (drivetrain ") and ") every=" in line]
    assert called(run, "--diff", 2, second)["differences"] == lines
    assert call(run, "--diff", 2, 2) == "the manifests tell the same\n"


# --- what is wrong with the input ------------------------------------------------------------------------------------

USAGE = {
    "two modes": (["--verify", "--prune", 1], "--verify and --prune contradict"),
    "stray": (["--dry-run"], "--dry-run: only with --prune"),
    "stray form": (["--verify", "--form", "full"], "--form: only with --convert"),
    "no target": (["--convert", 4], "--convert needs --to"),
    "parts of one": (["--convert", 4, "--to", "x", "--parts", 2], "--parts: only with --form sharded"),
    "metric of none": (["--prune", 1, "--metric", "x"], "only with --best"),
    "keep none": (["--prune", 0], "not in the range"),
    "unknown": (["--diff", "4", "7"], "there is no checkpoint '7'"),
    "outside": (["--convert", "..", "--to", "x"], "there is no checkpoint '..'"),
    "metric": (["--prune", 1, "--best", 1, "--metric", "evaluate/los"], "did you mean 'evaluate/loss'"),
    "no name": (["--convert", 4, "--to", "memory://x/.."], "expected the path or the URL of a checkpoint"),
}


@pytest.mark.parametrize("wrong", USAGE)
def test_wrong_input_is_one_message(finished, wrong):
    """Options that do not fit, names that are not there: status 2, what was wrong, and nothing done."""
    arguments, text = USAGE[wrong]
    assert text in call(finished, *arguments, status=2)
    assert steps(finished) == ALL


def test_places_that_are_none(finished, tmp_path):
    """A path that is not there, a file, a folder without checkpoints, an unknown store: each is told."""
    assert "there is nothing at" in call(tmp_path / "gone", status=2)
    assert "is no folder" in call(finished / "plan.json", status=2)
    assert f"no checkpoint in {tmp_path}. Give a run" in call(tmp_path, status=2)
    assert "no checkpoint in memory://nobody" in call("memory://nobody", status=2)
    assert "no store is known" in call("nosuch://place", status=2)
    assert "--prune takes a run" in call(finished / "checkpoints" / ALL[0], "--prune", 1, status=2)
