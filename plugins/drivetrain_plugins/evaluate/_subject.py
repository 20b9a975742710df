"""What the commands look at: a run's newest checkpoint, or exported weights with a recipe; neither is changed."""

from __future__ import annotations

import contextlib
import json
import tempfile
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import CheckpointError, ConfigError, Problem, hookimpl, plugin, require
from drivetrain.cli import STORED
from drivetrain.recipe import Recipe
from drivetrain_plugins.evaluate import _rows_out
from drivetrain_plugins.evaluate.evaluate import Evaluate
from drivetrain_plugins.evaluate.predict import Predict

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from pathlib import Path

    from drivetrain import Run, Trainer

WEIGHTS = "model.safetensors"


# What these do to weights has been done to those of an export: it must not be done again.
IN_EXPORTS = ("warm-start", "lora", "merge-lora", "average-checkpoints")


@attrs.frozen
class Subject:
    """A run that is assembled and holds the weights to look at."""

    run: Run
    source: str  # the checkpoint or the file of the weights
    predict: Predict


class Looking(Evaluate):
    """The evaluation of who does not train: a set that is none of the recipe's may be the only one."""

    @hookimpl(tryfirst=True)
    def assembled(self, run: Run) -> None:
        """Ask for no evaluation set."""
        run.facts["evaluated_sets"] = []


@plugin(role="data", effect="observes")
class Given:
    """Bring sets of rows from files, and the weights of a file, in place of what the recipe brings."""

    sets: dict[str, list[dict[str, Any]]] = attrs.field(factory=dict)
    weights: str | None = None

    @hookimpl(wrapper=True, trylast=True)  # innermost: adapters and averages start from these weights
    def build_model(self, run: Run) -> Generator[None, Any, Any]:
        """Announce the sets, and load the weights.

        Raises:
            ConfigError: the file's names or shapes are not the model's.
        """
        run.facts["splits"] = [*run.facts.get("splits", ()), *self.sets]
        model = yield
        if self.weights is not None:
            library = require("safetensors.torch", plugin="evaluate")
            try:
                library.load_model(model, self.weights, strict=True)
            except Exception as error:
                do = "give the recipe that they were trained with; adapters are merged before an export"
                what = f"the weights in {self.weights} are not those of the recipe's model"
                raise ConfigError([Problem(what, str(error)[:1000], do)]) from error
        return model

    @hookimpl(wrapper=True, trylast=True)  # innermost: what tokenizes and maps rows does so with these, too
    def build_dataset(self, split: str) -> Generator[None, Any, Any]:
        """Return the rows of a set."""
        if split not in self.sets:
            return (yield)
        with contextlib.suppress(Exception):  # another source may not know such a set
            yield
        return self.sets[split]


@contextlib.contextmanager
def opened(
    subject: Path, recipe: Path | None, changes: Sequence[str], files: Mapping[str, Path], columns: Sequence[str] = ()
) -> Iterator[Subject]:
    """Give a run that holds the weights of `subject`; whatever its plugins write goes into a folder that vanishes.

    Args:
        subject: a run's folder; with a recipe, an export's folder or file.
        recipe: says data, model and plugins, where `subject` is no run.
        changes: "adamw.lr=1e-4", as on the command line.
        files: .jsonl or .parquet files by the name of the set that their rows become.
        columns: fields of the data's rows that predictions are to have beside them.

    Raises:
        CheckpointError: there is no run, or no checkpoint in it.
        ConfigError: there are no weights; the recipe or a file cannot be read.
    """
    sets = {name: _rows_out.read_rows(path, "--data") for name, path in files.items()}
    with tempfile.TemporaryDirectory(prefix="drivetrain-look-") as scratch:
        if recipe is None:
            weights, loaded = None, _stored(subject)
        else:
            loaded = Recipe.load(recipe)
            weights = _weights(subject, loaded)
            done = [name for name in loaded.as_dict()["plugins"] if name.partition(":")[0] in IN_EXPORTS]
            loaded.change(without=done)
        named = [name.partition(":")[0] for name in loaded.as_dict()["plugins"]]
        loaded.change([*changes, f"run.output={json.dumps(scratch)}"], [n for n in ("predict",) if n not in named])
        trainer = loaded.trainer()
        predict = _complete(trainer, Given(sets, str(weights) if weights is not None else None), columns)
        run = trainer.assemble()
        source = str(subject) if recipe is not None else _restore(run, subject)
        yield Subject(run, source, predict)


def _stored(folder: Path) -> Recipe:
    """Return the recipe that a run was started with."""
    if not (folder / STORED).is_file():
        do = (
            f"name the output folder of a run that `drivetrain run` started, which holds {STORED}; "
            "or give the weights of an export and a recipe: SUBJECT RECIPE"
        )
        raise CheckpointError(str(Problem(f"{folder} is no run's folder", f"no file {folder / STORED}", do)))
    return Recipe.load(folder / STORED)


def _weights(subject: Path, recipe: Recipe) -> Path | None:
    """Return the file of weights to load; None where the recipe's `hf-model` loads the folder itself.

    Raises:
        ConfigError: there are none.
    """
    tables = recipe.as_dict()["plugins"]
    models = [name for name in tables if name.partition(":")[0] == "hf-model"]
    if models and (subject / "config.json").is_file():
        recipe.change([f"{models[0]}.path={json.dumps(str(subject.absolute()))}", f"{models[0]}.pretrained=true"])
        return None
    file = subject / WEIGHTS if subject.is_dir() else subject
    if file.suffix == ".safetensors" and file.is_file():
        return file.absolute()
    what = f"{subject} holds no weights"
    received = f"no file {file}" + ("" if models else "; the recipe has no hf-model, which reads a folder of export-hf")
    do = f"name a folder of export-hf, a .safetensors file, or a folder with {WEIGHTS}; for a run's folder, no recipe"
    raise ConfigError([Problem(what, received, do)])


def _complete(trainer: Trainer, given: Given, columns: Sequence[str]) -> Predict:
    """Add what the commands need and the recipe does not have; return the plugin that predicts."""
    plugins = trainer.plugins
    if not any("evaluation" in getattr(p, "provides", ()) for p in plugins.values()):
        made: Any = Looking
        plugins["evaluate"] = made()
    predict: Predict = next(p for p in plugins.values() if isinstance(p, Predict))
    predict.to = None  # that is of the end of a run
    predict.columns = list(columns) or predict.columns
    predict.data = {split: file for split, file in predict.data.items() if split not in given.sets}
    trainer.plugins = {"given-data": given, **plugins}  # of wrappers that come last, the first is the innermost
    return predict


def _restore(run: Run, folder: Path) -> str:
    """Load the newest valid checkpoint of the run in `folder`; return its path."""
    if run.plan.hooks["load"].owner is None:
        do = "give an export of the run and a recipe, or train with `checkpoint`"
        raise CheckpointError(str(Problem(f"no plugin of the run in {folder} loads checkpoints", "", do)))
    own = run.settings
    run.settings = attrs.evolve(own, output=folder.absolute())
    try:
        found = run.hooks.load(run, None)
    finally:
        run.settings = own
    if found is None:
        raise CheckpointError(f"there is no checkpoint in {folder}")
    run.hooks.loaded(run, found)
    return str(found)
