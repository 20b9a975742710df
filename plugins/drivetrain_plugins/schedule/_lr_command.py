"""The command `drivetrain lr-find`: which learning rate to begin with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from drivetrain_plugins.schedule._lr_find import Sweep


@click.command("lr-find")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--from", "start", default=1e-7, show_default=True, help="Rate of the first step.")
@click.option("--to", "end", default=1.0, show_default=True, help="Rate of the last step.")
@click.option("--steps", default=100, show_default=True, help="How many steps.")
@click.option("--smoothing", default=0.9, show_default=True, help="Share of the old mean in the mean of the losses.")
@click.option("--diverged", default=4.0, show_default=True, help="End at so many times the smallest smoothed loss.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the losses into this SVG file.")
@click.option("--csv", "table", type=click.Path(path_type=Path, dir_okay=False), help="Write each step into this file.")
@click.option("--without", multiple=True, metavar="NAME", help="Leave a plugin out.")
@click.option("--with", "with_", multiple=True, metavar="NAME", help="Add a plugin, with its default options.")
@click.option(
    "--set", "changes", multiple=True, metavar="PLUGIN.OPTION=VALUE", help="Change an option: sgd.momentum=0."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def command(  # noqa: PLR0917 - click passes them by name
    recipe: Path,
    start: float,
    end: float,
    steps: int,
    smoothing: float,
    diverged: float,
    plot: Path | None,
    table: Path | None,
    without: tuple[str, ...],
    with_: tuple[str, ...],
    changes: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train RECIPE for some steps while the rate rises, and suggest one. Nothing of the run is kept."""
    from drivetrain.recipe import Recipe  # noqa: PLC0415
    from drivetrain_plugins.schedule._lr_find import lr_find  # noqa: PLC0415

    trainer = Recipe.load(recipe, changes, with_, without).trainer()
    sweep = lr_find(trainer, start=start, end=end, steps=steps, smoothing=smoothing, diverged=diverged)
    if os.environ.get("RANK", "0") != "0":
        return
    if plot is not None:
        from drivetrain_plugins.schedule._lr_plot import plot as drawn  # noqa: PLC0415

        _write(plot, drawn(sweep, f"Learning rate range test of {recipe.name}"))
    if table is not None:
        _write(table, sweep.as_csv())
    click.echo(json.dumps(sweep.as_dict()) if as_json else _told(sweep))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.FileError(str(path), error.strerror) from error
    click.echo(f"wrote {path}", err=True)


def _told(sweep: Sweep) -> str:
    lines = [f"{len(sweep.rates)} steps; {sweep.ended}"]
    if sweep.left_out:
        lines.append(f"left out: {', '.join(sweep.left_out)}")
    if sweep.steepest is None and sweep.tenth is None:
        lines.append("the loss does not fall: sweep other rates with --from and --to, or take more --steps")
    if sweep.steepest is not None:
        lines.append(f"steepest descent:       {sweep.steepest:.2e}")
    if sweep.tenth is not None:
        lines.append(f"a tenth of the minimum: {sweep.tenth:.2e}")
    return "\n".join(lines)
