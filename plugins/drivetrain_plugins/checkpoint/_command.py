"""The command `drivetrain checkpoints`: list, verify, prune, convert and compare what a run has saved.

Exit status 1: a checkpoint is damaged, or the question whether to remove was answered with no; 2: the input is wrong.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from collections.abc import Iterable

    from drivetrain_plugins.checkpoint._retention import Retention
    from drivetrain_plugins.checkpoint._survey import Place, Row

OPTIONS = {  # of each mode
    "verify": (),
    "prune": ("best", "metric", "mode", "yes", "dry_run"),
    "convert": ("to", "form", "parts"),
    "diff": (),
}


@click.command("checkpoints")
@click.argument("place", metavar="RUN")
@click.option("--verify", is_flag=True, help="Read every byte, and say what is damaged; exit status 1 if any is.")
@click.option("--prune", type=click.IntRange(min=1), metavar="KEEP", help="Remove all but the newest KEEP.")
@click.option(
    "--best", type=click.IntRange(min=0), default=0, metavar="N", help="With --prune: keep so many of the best, too."
)
@click.option("--metric", default="evaluate/loss", metavar="NAME", show_default=True, help="With --best: what is best.")
@click.option(
    "--mode",
    type=click.Choice(["min", "max"]),
    default="min",
    show_default=True,
    help="With --best: a small or a large value.",
)
@click.option("--yes", is_flag=True, help="With --prune: do not ask.")
@click.option("--dry-run", is_flag=True, help="With --prune: say what would go, and remove nothing.")
@click.option("--convert", metavar="NAME", help="Write the checkpoint NAME again, in another form.")
@click.option("--to", metavar="PATH", help="With --convert: the checkpoint to write, a path or a URL.")
@click.option(
    "--form", type=click.Choice(["full", "sharded"]), default="full", show_default=True, help="With --convert."
)
@click.option(
    "--parts",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    show_default=True,
    help="With --form sharded: into how many files.",
)
@click.option("--diff", nargs=2, metavar="A B", help="Say what differs between the manifests of two checkpoints.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.pass_context
def command(ctx: click.Context, /, place: str, *, as_json: bool, **options: Any) -> None:
    """List the checkpoints of RUN, the oldest first.

    RUN is a run's folder, a folder of checkpoints, one checkpoint, or the URL that a run saves to. A checkpoint in it
    is named as in the list, or by its step; others by path or URL. The plugins of the run need not be installed.
    """
    mode = _mode(ctx)
    from drivetrain_plugins.checkpoint import _survey  # noqa: PLC0415 - loads torch

    found = _survey.find(place)
    if mode is None:
        about, text = _list(found)
    elif mode == "verify":
        about, text = _verify(found)
    elif mode == "prune":
        about, text = _prune(found, **{k: options[k] for k in ("prune", *OPTIONS["prune"])})
    elif mode == "convert":
        about, text = _convert(found, **{k: options[k] for k in ("convert", *OPTIONS["convert"])})
    else:
        about, text = _diff(found, *options["diff"])
    click.echo(json.dumps(about, indent=2) if as_json else "\n".join(map(_plain, text)))
    if mode == "verify" and about["damaged"]:
        ctx.exit(1)


def _mode(ctx: click.Context) -> str | None:
    """Return which of the modes is asked for; None: to list."""
    given = [k for k in ctx.params if ctx.get_parameter_source(k) is not ParameterSource.DEFAULT]
    modes = [mode for mode in OPTIONS if mode in given]
    if len(modes) > 1:
        raise click.UsageError(f"{' and '.join(_option(m) for m in modes)} contradict each other: give one")
    mode = modes[0] if modes else None
    for owner, names in OPTIONS.items():
        if owner != mode and (stray := [_option(n) for n in names if n in given]):
            raise click.UsageError(f"{', '.join(stray)}: only with {_option(owner)}")
    if mode == "convert" and not ctx.params["to"]:
        raise click.UsageError("--convert needs --to PATH: which checkpoint to write")
    if ctx.params["parts"] > 1 and ctx.params["form"] != "sharded":
        raise click.UsageError("--parts: only with --form sharded")
    if mode == "prune" and {"metric", "mode"} & set(given) and not ctx.params["best"]:
        raise click.UsageError("--metric, --mode: only with --best")
    return mode


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _plain(text: str) -> str:
    """Return text of which nothing moves the cursor or colours the screen: what stands in a checkpoint is anyone's."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


# --- the modes: each returns what is printed, for programs and for people ---------------------------------------------


def _list(place: Place) -> tuple[Any, list[str]]:
    from drivetrain_plugins.checkpoint._survey import survey  # noqa: PLC0415 - loads torch

    rows, rule = survey(place)
    head = ["checkpoint", "step", "epoch", "rows", "holds", "size", "ranks", "kept for", "metrics"]
    lines = _columns([head, *(_cells(row) for row in rows)])
    lines += ["", *_versions(rows), *([_kept(rule)] if rule else [])]
    lines += [f"damaged: {row.name}: {row.damaged}" for row in rows if row.damaged is not None]
    return [row.as_dict() for row in rows], lines


def _verify(place: Place) -> tuple[Any, list[str]]:
    from drivetrain_plugins.checkpoint._survey import damage, survey  # noqa: PLC0415 - loads torch

    about, lines = [], []
    for row in survey(place)[0]:
        wrong = row.damaged or damage(place.shelf, row.name)
        about.append({"name": row.name, "where": row.where, "bytes": row.size, "damaged": wrong})
        lines.append(f"{row.name}: damaged: {wrong}" if wrong else f"{row.name}: valid, {_bytes(row.size)}")
    damaged = sum(row["damaged"] is not None for row in about)
    lines.append(f"{damaged} of {len(about)} damaged")
    return {"checkpoints": about, "damaged": damaged}, lines


def _prune(
    place: Place, *, prune: int, best: int, metric: str, mode: str, yes: bool, dry_run: bool
) -> tuple[Any, list[str]]:
    from drivetrain import ConfigError  # noqa: PLC0415
    from drivetrain_plugins.checkpoint import _survey  # noqa: PLC0415 - loads torch
    from drivetrain_plugins.checkpoint._retention import Retention  # noqa: PLC0415

    if place.alone:
        raise ConfigError(
            f"--prune takes a run or a folder of checkpoints. Received: {place.shelf.where(place.names[0])}"
        )
    with _survey.owned(None if dry_run else place.run):
        found = _survey.prunable(place, Retention(prune, best, metric, mode == "max"))
        lines = [f"damaged, stays: {name}: {why}" for name, why in found.damaged.items()]
        if found.go and not dry_run:
            if not yes:
                told = f"{len(found.go)} of {len(place.names)} checkpoints in {place.shelf.where('')}"
                unseen = "" if place.run else " Whether a run saves there cannot be seen from here."
                click.confirm(_plain(f"Remove {', '.join(found.go)}: {told}?{unseen}"), abort=True, err=True)
            _survey.remove(place.shelf, found.go)
    verb = "would be removed" if dry_run else "removed"
    lines += [f"{verb}: {name}" for name in found.go] or ["nothing to remove"]
    lines.append(f"kept: {', '.join(found.stay)}")
    removed = {"dry_run": dry_run, "removed": found.go, "kept": found.stay, "damaged": found.damaged}
    return removed, lines


def _convert(place: Place, *, convert: str, to: str, form: str, parts: int) -> tuple[Any, list[str]]:
    from drivetrain import ConfigError  # noqa: PLC0415
    from drivetrain_plugins.checkpoint import _convert as conversion  # noqa: PLC0415 - loads torch
    from drivetrain_plugins.checkpoint import _survey  # noqa: PLC0415
    from drivetrain_plugins.checkpoint._place import checkpoint_at  # noqa: PLC0415

    source, target = place.named(convert), checkpoint_at(to)
    where = target[0].where(target[1])
    if where != source[0].where(source[1]) and _survey.exists(*target):
        raise ConfigError(
            f"--to names a checkpoint to write, and this is there already; choose another. Received: {where}"
        )
    with _survey.owned(_survey.run_of(target[0])):
        try:
            conversion.convert(source, target, form, parts)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    written = _survey.survey(_survey.Place(target[0], [target[1]], alone=True))[0]
    holds, size = _cells(written[0])[4:6]
    return written[0].as_dict(), [f"wrote {where}: {holds}, {size}"]


def _diff(place: Place, first: str, second: str) -> tuple[Any, list[str]]:
    from drivetrain_plugins.checkpoint._compare import between  # noqa: PLC0415 - loads torch
    from drivetrain_plugins.checkpoint._survey import described  # noqa: PLC0415

    places = [place.named(name) for name in (first, second)]
    lines = between(*(described(*at) for at in places))
    about = {"was": str(places[0][0].where(places[0][1])), "is": str(places[1][0].where(places[1][1]))}
    return {**about, "differences": lines}, lines or ["the manifests tell the same"]


# --- how it looks ----------------------------------------------------------------------------------------------------


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cells(row: Row) -> list[str]:
    from drivetrain_plugins.checkpoint._compare import form_of  # noqa: PLC0415 - loads torch

    if row.manifest is None or row.entry is None:
        return [row.name, "", "", "", "damaged", "", "", "", ""]
    position = row.manifest["position"]
    counters = [str(position.get(k, "")) for k in ("epoch", "rows")]
    metrics = " ".join(f"{k}={v:.6g}" for k, v in sorted(row.entry.metrics.items()))
    holds = f"{row.manifest['kind']}, {form_of(row.manifest)}"
    ranks = str(row.manifest["world_size"])
    return [row.name, str(row.entry.step), *counters, holds, _bytes(row.size), ranks, ", ".join(row.kept_for), metrics]


def _versions(rows: Iterable[Row]) -> list[str]:
    """Say which versions wrote the checkpoints, those of the same ones together."""
    found: dict[str, list[str]] = {}
    for about in (row.as_dict() for row in rows if row.damaged is None):
        versions = dict(about["versions"])
        states = [f"{name} {version}" for name, version in versions.pop("states").items() if version > 1]
        text = ", ".join([*(f"{k} {v}" for k, v in versions.items()), f"schema {about['schema']}"])
        found.setdefault(text + (f"; states: {', '.join(states)}" if states else ""), []).append(about["name"])
    if len(found) == 1:
        return [f"written by {next(iter(found))}"]
    return [f"written by {text}: {', '.join(names)}" for text, names in found.items()]


def _kept(rule: Retention) -> str:
    best = f" and the best {rule.best} by {rule.metric} ({'max' if rule.maximize else 'min'})" if rule.best else ""
    return f"the run keeps the newest {rule.keep}{best}"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:  # noqa: PLR2004
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
