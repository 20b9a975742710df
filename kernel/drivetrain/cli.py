"""The command line: `drivetrain run`, `explain`, `plugins`, `resume`, `export`, and plugins' own commands.

What is wrong with the input is one message on stderr and exit status 2; anything else keeps its traceback and notes.
"""

from __future__ import annotations

import json
import os
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from drivetrain.errors import CheckpointError, ConfigError, DrivetrainError, Problem, RecipeError, nearest
from drivetrain.listing import catalogue_rows, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from drivetrain.recipe import Recipe
    from drivetrain.trainer import Result, Trainer

GROUP = "drivetrain.commands.v1"
STORED = "recipe.json"


class Commands(click.Group):
    """The built-in commands and those that installed plugins offer; the latter are imported when they are called."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; print drivetrain's own errors without a traceback."""
        try:
            return super().invoke(ctx)
        except DrivetrainError as error:
            click.echo("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), err=True)
            ctx.exit(2)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a built-in command, or import the plugin's command of that name.

        Raises:
            ConfigError: two distributions offer it, or it cannot be imported or is no command.
        """
        own = super().get_command(ctx, cmd_name)
        offers = [] if own else [p for p in _offered() if p.name == cmd_name]
        if own or not offers:
            return own
        if len({p.value for p in offers}) > 1:
            who = " and ".join(f"{_distribution(p)} ({p.value})" for p in offers)
            raise ConfigError([Problem(f"two distributions offer command {cmd_name!r}", who, "uninstall one of them")])
        do = f"reinstall {_distribution(offers[0])}"
        try:
            loaded = offers[0].load()
        except Exception as error:
            received = f"{offers[0].value}: {type(error).__name__}: {error}"
            raise ConfigError([Problem(f"command {cmd_name!r} cannot be imported", received, do)]) from error
        if not isinstance(loaded, click.Command):
            raise ConfigError([Problem(f"command {cmd_name!r} is no click command", repr(loaded), do)])
        return loaded

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Say which commands are near an unknown one."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            hint = nearest(name, [*self.commands, *(p.name for p in _offered())])
            ctx.fail(f"there is no command {name!r}: {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands, those of plugins by distribution, without importing them."""
        super().format_commands(ctx, formatter)
        rows = sorted({(p.name, f"from {_distribution(p)}") for p in _offered() if p.name not in self.commands})
        if rows:
            with formatter.section("Commands of plugins"):
                formatter.write_dl(rows)


def _offered() -> Iterable[metadata.EntryPoint]:
    return metadata.entry_points(group=GROUP)


def _distribution(point: metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "?"


def _changes(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that change a recipe."""
    for name, variable, metavar, about in (
        ("--without", "without", "NAME", "Leave a plugin out."),
        ("--with", "with_", "NAME", "Add a plugin, with its default options."),
        ("--set", "changes", "PLUGIN.OPTION=VALUE", "Change an option: adamw.lr=1e-4, run.seed=3."),
    ):
        command = click.option(name, variable, multiple=True, metavar=metavar, help=about)(command)
    return command


def _json_flag(command: Callable[..., None]) -> Callable[..., None]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="drivetrain")
def main() -> None:
    """Train PyTorch models from recipes; a run is a list of plugins."""


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@_changes
@click.option("--resume", is_flag=True, help="Go on from the newest valid checkpoint, if there is one.")
@click.option("--fresh", is_flag=True, help="Move an older run in the same folder aside, to OUTPUT.old-1 and so on.")
@_json_flag
def run(  # noqa: PLR0917 - click passes them by name
    recipe: Path,
    changes: tuple[str, ...],
    with_: tuple[str, ...],
    without: tuple[str, ...],
    resume: bool,
    fresh: bool,
    as_json: bool,
) -> None:
    """Train what RECIPE describes."""
    from drivetrain.recipe import Recipe  # noqa: PLC0415

    if resume and fresh:
        raise click.UsageError("--resume and --fresh contradict each other: give one")
    loaded = Recipe.load(recipe, changes, with_, without)
    if problems := loaded.plan().problems:
        raise RecipeError(problems)
    trainer = loaded.trainer()
    output = trainer.settings.output
    if output is not None and is_first_rank():
        if fresh:
            _move_aside(output)
        elif not resume and _checkpoints(output):
            do = f"go on with `drivetrain resume {output}`, or begin again with --fresh (the old run is moved aside)"
            raise ConfigError(
                [Problem(f"{output} already holds the checkpoints of a run", _checkpoints(output)[-1], do)]
            )
    _report(_fit(loaded, trainer, resume="auto" if resume else False), as_json=as_json)


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@_changes
@_json_flag
def explain(
    recipe: Path, changes: tuple[str, ...], with_: tuple[str, ...], without: tuple[str, ...], as_json: bool
) -> None:
    """Print the plan of RECIPE: which plugin acts where, and everything that is wrong. Trains nothing."""
    from drivetrain.recipe import Recipe  # noqa: PLC0415

    plan = Recipe.load(recipe, changes, with_, without).plan()
    click.echo(json.dumps(plan.as_dict(), indent=2, default=str) if as_json else str(plan))
    if plan.problems:
        click.get_current_context().exit(2)


@main.command()
@click.argument("name", required=False)
@_json_flag
def plugins(name: str | None, as_json: bool) -> None:
    """List the plugins there are, or describe the plugin NAME."""
    from drivetrain.catalogue import Catalogue  # noqa: PLC0415 - imports no torch

    catalogue = Catalogue()
    if name is not None:
        about = describe(catalogue.entry(name))
        click.echo(json.dumps(about, indent=2)) if as_json else _show(about)
        return
    listed, columns = list(catalogue_rows(catalogue)), ["plugin", "role", "distribution", "what it does"]
    rows = [list(row.values())[:4] for row in listed]
    click.echo(json.dumps(listed, indent=2)) if as_json else _table(columns, rows)


@main.command("resume")
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--set", "changes", multiple=True, metavar="PLUGIN.OPTION=VALUE", help="Change an option: run.epochs=5.")
@_json_flag
def resume_run(folder: Path, changes: tuple[str, ...], as_json: bool) -> None:
    """Go on with the run in the folder RUN, from its newest valid checkpoint."""
    recipe, trainer = _stored(folder, changes)
    _report(_fit(recipe, trainer, resume=True), as_json=as_json)


@main.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--format", "format_", required=True, help="A format that a plugin of the run exports.")
@click.option("--to", "path", required=True, type=click.Path(path_type=Path), help="The file or folder to make.")
def export(folder: Path, format_: str, path: Path) -> None:
    """Write the model of RUN's newest valid checkpoint in another format."""
    _restored(folder).export(format_, path)
    click.echo(f"wrote {path}")


# --- runs on disk ----------------------------------------------------------------------------------------------------


def is_first_rank() -> bool:
    """Tell whether this process prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def _checkpoints(output: Path) -> list[str]:
    """Return the names of what look like finished checkpoints in a run's folder, oldest first."""
    folder = output / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((n for n in names if re.fullmatch(r"step-\d+", n)), key=lambda n: int(n[5:]))


def _move_aside(output: Path) -> None:
    if not output.is_dir() or not any(output.iterdir()):
        return
    number = 1
    while (aside := output.with_name(f"{output.name}.old-{number}")).exists():
        number += 1
    output.rename(aside)
    click.echo(f"moved the old run to {aside}", err=True)


def _store(recipe: Recipe, output: Path) -> None:
    """Write the recipe into the run's folder, whole or not at all."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        scratch = output / f"{STORED}.tmp"
        scratch.write_text(json.dumps(recipe.as_dict(), indent=2, default=str) + "\n", encoding="utf-8")
        scratch.replace(output / STORED)
    except OSError as error:
        do = "choose another folder: [run] output = ..., or --set run.output=..."
        received = f"{output}: {error.strerror}"
        raise ConfigError([Problem("the run's folder cannot be written to", received, do)]) from error


def _fit(recipe: Recipe, trainer: Trainer, *, resume: bool | str) -> Result:
    """Train with the recipe stored in the run's folder, so that the run can be rebuilt from its first checkpoint on."""
    output = trainer.settings.output
    if output is None or not is_first_rank():
        return trainer.fit(resume=resume)
    stored, checkpoints = output / STORED, _checkpoints(output)
    before = stored.read_bytes() if stored.is_file() else None
    _store(recipe, output)
    try:
        return trainer.fit(resume=resume)
    except (CheckpointError, ConfigError):
        if before is not None and _checkpoints(output) == checkpoints:  # those there were belong to the old recipe
            stored.write_bytes(before)
        raise


def _stored(folder: Path, changes: tuple[str, ...] = ()) -> tuple[Recipe, Trainer]:
    """Return the recipe that a run was started with, and its trainer."""
    from drivetrain.recipe import Recipe  # noqa: PLC0415

    if not (folder / STORED).is_file():
        do = f"name the output folder of a run that `drivetrain run` started; it holds {STORED}"
        raise CheckpointError(str(Problem(f"{folder} is no run's folder", f"no file {folder / STORED}", do)))
    recipe = Recipe.load(folder / STORED, changes)
    recipe.change([f"run.output={json.dumps(str(folder))}"])  # it may have been moved
    return recipe, recipe.trainer()


def _restored(folder: Path) -> Trainer:
    """Return a trainer whose run is assembled and holds the newest valid checkpoint of `folder`."""
    _, trainer = _stored(folder)
    assembled = trainer.assemble()
    found = assembled.hooks.load(assembled, None)
    if found is None:
        raise CheckpointError(f"there is no checkpoint in {folder}")
    assembled.hooks.loaded(assembled, found)
    click.echo(f"loaded {found}", err=True)
    return trainer


def _report(result: Result, *, as_json: bool) -> None:
    about = {name: getattr(result, name) for name in ("steps", "epochs", "metrics", "stopped", "output")}
    if as_json:
        click.echo(json.dumps(about, default=str))
        return
    ended = f"stopped ({result.stopped})" if result.stopped else "finished"
    click.echo(f"{ended} after {result.steps} steps ({result.epochs:.4g} epochs)")
    click.echo("\n".join(f"  {name}: {value:.6g}" for name, value in sorted(result.metrics.items())))
    if result.output is not None:
        click.echo(f"in {result.output}")


# --- the catalogue ---------------------------------------------------------------------------------------------------


def _show(about: dict[str, Any]) -> None:
    click.echo(f"{about['name']} ({about['role']}, {about['effect']})\n\n{about['about']}\n")
    rows = [[name, *option.values()] for name, option in about["options"].items()]
    if rows:
        _table(["option", "type", "default", "allowed", "what it is"], rows)
    for word in ("hooks", "provides", "requires", "conflicts"):
        if about.get(word):
            click.echo(f"{word}: {', '.join(about[word])}")
    click.echo(f"from: {about['distribution']}, {about['class']}\n      {about['file']}")


def _table(columns: list[str], rows: list[list[str]]) -> None:
    from rich import box  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(*columns, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(text.replace("[", r"\[") for text in row))
    Console().print(table)


if __name__ == "__main__":
    main()
