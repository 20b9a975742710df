"""The commands `drivetrain evaluate` and `drivetrain predict`: look at a run or an export, and leave it as it is."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from drivetrain.cli import is_first_rank

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain_plugins.evaluate._subject import Subject

FILE = click.Path(path_type=Path)


def _shared(command: Callable[..., None]) -> Callable[..., None]:
    """Add what both commands take."""
    for add in (
        click.option(
            "--set",
            "changes",
            multiple=True,
            metavar="PLUGIN.OPTION=VALUE",
            help="Change an option: predict.threshold=0.3.",
        ),
        click.argument("recipe", type=FILE, required=False),
        click.argument("subject", type=FILE),
    ):
        command = add(command)
    return command


@click.command("evaluate")
@_shared
@click.option("--split", "splits", multiple=True, help='"train", "evaluate" or "evaluate/NAME".  [default: each set]')
@click.option("--data", multiple=True, type=FILE, help="Measure these rows (.jsonl, .parquet).")
@click.option("--to", type=FILE, metavar="FILE", help="Write the metrics, too, a row a set: .jsonl or .parquet.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def evaluate(  # noqa: PLR0917 - click passes them by name
    subject: Path,
    recipe: Path | None,
    changes: tuple[str, ...],
    splits: tuple[str, ...],
    data: tuple[Path, ...],
    to: Path | None,
    as_json: bool,
) -> None:
    """Measure SUBJECT: the newest valid checkpoint of a run's folder.

    With RECIPE, SUBJECT is an export: a folder of export-hf, or weights in a .safetensors file. Nothing in it changes.
    """
    from drivetrain_plugins.evaluate import _subject  # noqa: PLC0415 - loads torch
    from drivetrain_plugins.evaluate._rows_out import RowsFile  # noqa: PLC0415

    files = {f"evaluate/{path.stem}": path for path in data}
    if len(files) < len(data):
        raise click.UsageError("--data: two files have the same name, which names the set")
    first = is_first_rank()
    with (
        RowsFile(to, "--to") if to is not None and first else contextlib.nullcontext() as file,
        _subject.opened(subject, recipe, changes, files) as found,
    ):
        chosen = _chosen(found, [*splits, *files] or None)
        _told(found)
        measured = {split: found.run.hooks.evaluate(found.run, split) for split in chosen}
        if file is not None:
            about = {"checkpoint": found.source, "step": found.run.progress.step}
            file.write(lambda: [[{"split": split, **about, **metrics} for split, metrics in measured.items()]])
            click.echo(f"wrote {to}", err=True)
    shown = {f"{split}/{name}": value for split, metrics in measured.items() for name, value in metrics.items()}
    if len(measured) == 1:
        (shown,) = measured.values()
    if first:
        click.echo(json.dumps(shown) if as_json else "\n".join(f"{k}: {v:.6g}" for k, v in shown.items()))


@click.command("predict")
@_shared
@click.option("--split", help="The set to predict.  [default: those named predict, else those to evaluate]")
@click.option("--data", type=FILE, help="Predict these rows (.jsonl, .parquet); they need no labels.")
@click.option("--columns", default="", metavar="A,B", help="Fields of the data's rows to copy along.")
@click.option("--to", type=FILE, metavar="FILE", help="Write .jsonl or .parquet; without, JSON lines are printed.")
def predict(  # noqa: PLR0917 - click passes them by name
    subject: Path,
    recipe: Path | None,
    changes: tuple[str, ...],
    split: str | None,
    data: Path | None,
    columns: str,
    to: Path | None,
) -> None:
    """Predict rows with SUBJECT: the newest valid checkpoint of a run's folder.

    With RECIPE, SUBJECT is an export: a folder of export-hf, or weights in a .safetensors file. Nothing in it changes.
    How a row is written is said by the options of the plugin `predict`, of which the recipe may have some.
    """
    from drivetrain_plugins.evaluate import _subject  # noqa: PLC0415 - loads torch
    from drivetrain_plugins.evaluate._rows_out import as_json, checked, probe  # noqa: PLC0415

    if split is not None and data is not None:
        raise click.UsageError("--split and --data contradict each other: the rows of --data are a set of their own")
    if to is not None:
        (probe if is_first_rank() else checked)(to, "--to")
    copied = [name for name in columns.split(",") if name]
    files = {"predict": data} if data is not None else {}
    with _subject.opened(subject, recipe, changes, files, copied) as found:
        wanted = [split] if split is not None else list(files) or found.predict.chosen(found.run)
        chosen = _chosen(found, wanted or None)
        for name in chosen:
            found.predict.check(found.run, name)
        _told(found)
        if to is not None:
            count = found.predict.write(found.run, chosen, to)
            if is_first_rank():
                click.echo(f"wrote {count} rows to {to}", err=True)
            return
        hooks: Any = found.run.hooks
        made = [hooks.predict(found.run, name) for name in chosen]
        for row in found.predict.table(found.run, made) if is_first_rank() else ():
            click.echo(as_json(row))


def _chosen(found: Subject, wanted: Sequence[str] | None) -> list[str]:
    """Return the sets asked for, else those to evaluate.

    Raises:
        ConfigError: there is no such set; those there are, are named.
    """
    from drivetrain import ConfigError, Problem  # noqa: PLC0415
    from drivetrain.errors import nearest  # noqa: PLC0415

    there = list(found.run.batches)
    measured = found.run.facts.get("evaluated_sets") or [split for split in there if split.startswith("evaluate")]
    chosen = list(dict.fromkeys(wanted or measured))
    if not chosen:
        what, do = "there is no set to evaluate", "name one with --split, or a file with --data"
        raise ConfigError([Problem(what, f"sets: {there}", do)])
    if unknown := [split for split in chosen if split not in there]:
        what = f"there is no split {unknown[0]!r}"
        raise ConfigError([Problem(what, f"sets: {there}", nearest(unknown[0], there))])
    return chosen


def _told(found: Subject) -> None:
    if is_first_rank():
        click.echo(f"loaded {found.source}", err=True)
