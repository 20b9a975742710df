"""Several sources mixed by weight."""

from __future__ import annotations

import inspect
import itertools
import logging
from typing import TYPE_CHECKING, Any

from drivetrain import Catalogue, ConfigError, hookimpl, option, plugin
from drivetrain.errors import nearest
from drivetrain.options import option_fields
from drivetrain_plugins.data._mixing import MixedStream, Mixture, Ordered

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain import Run

log = logging.getLogger("drivetrain")
SOURCE = {"plugin": "jsonl", "train": "{kit}/{rows}-train.jsonl"}


def made(name: str, given: Any) -> Any:
    """Return the plugin that a source's table describes, or the one that was given.

    Raises:
        ConfigError: the table names no data plugin, or options that it does not have.
    """
    if not isinstance(given, dict):
        source = given
    elif not isinstance(given.get("plugin"), str):
        raise ConfigError(
            f'mix: the source {name!r} needs plugin = "...", the name of a data plugin. Received: {given}'
        )
    else:
        cls = Catalogue().entry(given["plugin"]).load()
        options = {key: value for key, value in given.items() if key != "plugin"}
        known = option_fields(cls)
        if unknown := [key for key in options if key not in known]:
            hint = nearest(unknown[0], known)
            raise ConfigError(f"mix: the source {name!r}: {given['plugin']!r} has no option {unknown[0]!r}; {hint}")
        try:
            source = cls(**options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"mix: the source {name!r}: {error}. Received: {options}") from error
    hook = getattr(type(source), "build_dataset", None)
    if hook is None or getattr(hook, "drivetrain_impl", {"wrapper": True})["wrapper"]:
        raise ConfigError(
            f"mix: the source {name!r} must be a plugin that brings data. Received: {type(source).__name__}"
        )
    return source


def dataset_of(source: Any, run: Run, split: str) -> Any:
    """Return what a source builds for `split`; a hook takes only the arguments that it names."""
    arguments = {"run": run, "split": split}
    wanted = inspect.signature(source.build_dataset).parameters
    return source.build_dataset(**{name: arguments[name] for name in wanted})


def fields_of(data: Any) -> list[str] | None:
    """Return the names of a dataset's fields; None for a stream, and for rows that are no mappings."""
    if hasattr(data, "open"):
        return None
    names = getattr(data, "column_names", None) or getattr(data, "columns", None)
    if names is None:
        names = data[0].keys() if hasattr(data[0], "keys") else None
    return None if names is None else list(names)


@plugin(
    role="data",
    provides=["data"],
    example={
        "sources": {"one": {**SOURCE, "evaluate": "{kit}/{rows}-dev.jsonl"}, "two": SOURCE},
        "weights": {"one": 3.0},
    },
)
class Mix:
    """Mix the training rows of several sources by weight; each one's evaluation rows are a set of its own.

    The mix of map-style sources is one dataset, whose rows depend on the seed only. As soon as one source is a stream,
    the mix is one.
    """

    sources: dict[str, Any] = option(help='by name: {"plugin" = "jsonl", and its options}; plugins in Python')
    weights: dict[str, float] = option(
        factory=dict, help="by name, 1 for others: shares of the rows; none at all: sizes"
    )
    exhausted: str = option(
        default="all",
        choices=("all", "first"),
        help="end when every source has been seen whole, or with the first that is",
    )
    _made: dict[str, Any] = option(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        """Make the sources, so that what is wrong with one is told before a run.

        Raises:
            ConfigError: a source or a weight is wrong.
        """
        if not self.sources:
            raise ConfigError("mix: there are no sources to mix")
        if unknown := sorted(set(self.weights) - set(self.sources)):
            raise ConfigError(f"mix: there is no source {unknown[0]!r} to weigh; {nearest(unknown[0], self.sources)}")
        for name, weight in self.weights.items():
            if not (isinstance(weight, (int, float)) and 0 < weight < float("inf")):
                raise ConfigError(f"mix: the weight of {name!r} must be a number above 0. Received: {weight!r}")
        self._made = {name: made(name, given) for name, given in self.sources.items()}

    @property
    def facts(self) -> dict[str, Any]:
        """Declare an evaluation set for each source, and for each of its named sets."""
        splits = [f"evaluate/{name}" for name in self._made]
        for name, source in self._made.items():
            own = getattr(source, "facts", {}).get("splits", ())
            splits += [f"evaluate/{name}/{split.removeprefix('evaluate/')}" for split in own]
        return {"splits": splits}

    @hookimpl
    def build_dataset(self, run: Run, split: str) -> Any:
        """Return the mix, or one source's evaluation rows."""
        if split == "train":
            return self._mixed(run)
        name, _, own = split.removeprefix("evaluate").removeprefix("/").partition("/")
        source = self._made.get(name)
        return None if source is None else dataset_of(source, run, f"evaluate/{own}" if own else "evaluate")

    def _mixed(self, run: Run) -> Any:
        data = {name: dataset_of(source, run, "train") for name, source in self._made.items()}
        for name, rows in data.items():
            if rows is None or (not hasattr(rows, "open") and len(rows) == 0):
                raise ConfigError(f"mix: the source {name!r} has no training rows")
        common, seed = _common({name: fields_of(rows) for name, rows in data.items()}), run.settings.seed
        streamed = any(hasattr(rows, "open") for rows in data.values())
        sizes = [1.0 if streamed else float(len(rows)) for rows in data.values()]
        shares = [float(self.weights.get(name, 1.0)) for name in data] if self.weights else sizes
        if not streamed:
            return Mixture(list(data.values()), shares, exhausted=self.exhausted, seed=seed, fields=common)
        streams = [r if hasattr(r, "open") else Ordered(r, seed, i) for i, r in enumerate(data.values())]
        return MixedStream(streams, list(data), shares, self.exhausted, seed, common)


def _common(fields: Mapping[str, list[str] | None]) -> list[str] | None:
    """Return the fields that all sources have, and tell what is left out; None where nothing is, or nobody knows.

    Raises:
        ConfigError: the sources have no field in common.
    """
    known = {name: names for name, names in fields.items() if names is not None}
    every = list(dict.fromkeys(itertools.chain.from_iterable(known.values())))
    common = [field for field in every if all(field in names for names in known.values())]
    told = "; ".join(f"{name}: {', '.join(sorted(names))}" for name, names in known.items())
    if known and not common:
        raise ConfigError(f"mix: the sources have no field in common ({told})")
    if common == every:
        return None
    log.warning("mix: the sources' rows differ (%s); only %s are kept", told, ", ".join(common))
    return common
