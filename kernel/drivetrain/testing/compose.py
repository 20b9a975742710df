"""Small compositions: a run in which given plugins can act, completed with what they need.

What a plugin needs is read from what it declares: who requires a word gets the first-party plugin that provides it,
who reads text gets a tokenizer, a padding collator and a model that takes tokens. So a new plugin needs no entry here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain.catalogue import Catalogue
from drivetrain.errors import ConfigError, DrivetrainError, PlanError, Problem
from drivetrain.hooks import Hooks
from drivetrain.plan import _implementations
from drivetrain.testing.carriers import tiny_module
from drivetrain.testing.files import DEV_ROWS, TRAIN_ROWS, fill
from drivetrain.testing.kinds import WRITTEN, kit_rows
from drivetrain.testing.probes import BaseOptimizer
from drivetrain.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from drivetrain.state import Run

STEPS, SEED, WORDS = 6, 7, 6
FIRST = {"collate": 0, "order": 2}  # whose companions are taken first: any padding serves an order
PREFERRED = {"padding": "pad", "data": "jsonl"}  # of the plugins that provide a word
RAGGED = ("tokens", "targets", "flags", "copies", "text-targets", "text-flags")  # kinds that any padding collator takes


def first_party(catalogue: Catalogue | None = None) -> list[str]:
    """Return the names of the plugins that come with drivetrain."""
    catalogue = catalogue or Catalogue()
    return [name for name in catalogue.names if catalogue.entry(name).distribution == "drivetrain"]


def example(plugin: type | str, folder: Path, settings: Mapping[str, Any] | None = None, rows: str = "text") -> Any:
    """Return an instance of a plugin with its example settings, or with `settings`; sources read `rows`."""
    made: Any = Catalogue().entry(plugin).load() if isinstance(plugin, str) else plugin
    given = getattr(made, "example", {}) if settings is None else settings
    return made(**fill(dict(given), folder, rows))


def examples(classes: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return instances of plugins that are to act together, by name: each as the others' `companions` want it."""
    kind = written_kind(classes.values(), tokenized="tokenize" in classes) or "text"
    return {name: example(cls, folder, settings(name, cls, classes.values()), kind) for name, cls in classes.items()}


def kinds(plugins: Iterable[Any]) -> list[str]:
    """Return the kinds of rows that plugins (or classes) say they take, the collator's first."""
    ordered = sorted(plugins, key=lambda plugin: getattr(plugin, "role", "") != "collate")
    return list(dict.fromkeys(kind for kind in (getattr(plugin, "rows", None) for plugin in ordered) if kind))


def written_kind(plugins: Iterable[Any], *, tokenized: bool) -> str | None:
    """Return the kind of rows that a source must give: before the tokenizer, where there is one."""
    found = [kind for kind in kinds(plugins) if kind != "text"] or kinds(plugins)
    return None if not found else WRITTEN.get(found[0], found[0]) if tokenized else found[0]


def settings(name: str, plugin: Any, beside: Iterable[Any]) -> dict[str, Any]:
    """Return the settings with which `plugin` acts beside others: its example, or what their `companions` say."""
    wanted = companions(beside)
    given = wanted.get(name, getattr(plugin, "example", {}))
    return {**given, **wanted.get(f"{name}?", {})}


def companions(plugins: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """Return which plugins these need beside them, with their settings; the collator's word goes first.

    "NAME?" stands for settings of a plugin that is not needed, but is to have them where it is there.
    """
    ordered = sorted(plugins, key=lambda plugin: FIRST.get(getattr(plugin, "role", ""), 1))
    found: dict[str, dict[str, Any]] = {}
    for plugin in ordered:
        for name, settings in getattr(plugin, "companions", {}).items():
            found[name] = {**settings, **found.get(name, {})}
    return found


def owned(plugins: Iterable[Any]) -> set[str]:
    """Return the operations that `plugins` own."""
    return {
        hook
        for plugin in plugins
        for hook, options in _implementations(plugin)
        if not options["wrapper"] and getattr(getattr(Hooks, hook, None), "drivetrain_kind", "") == "operation"
    }


def _words(plugins: Mapping[str, Any], which: str) -> set[str]:
    own = {name.partition(":")[0] for name in plugins} if which == "provides" else set()
    return own | {word for plugin in plugins.values() for word in getattr(plugin, which, ())}


@attrs.define
class Composition:
    """Plugins by name, the model and the data for them; ready to be fitted any number of times."""

    plugins: dict[str, Any]
    rows: str = "tensors"  # the kind that is given to `fit`, or "" where a plugin brings rows
    words: int | None = None  # sentences of exactly so many words, for a collator that cannot pad

    def without(self, *names: str) -> Composition:
        """Return the same composition with plugins taken out."""
        return attrs.evolve(self, plugins={n: p for n, p in self.plugins.items() if n not in names})

    def adding(self, first: Mapping[str, Any] | None = None, **last: Any) -> Composition:
        """Return the same composition with plugins before and after the others ("_" in a name stands for "-")."""
        after = {name.replace("_", "-"): plugin for name, plugin in last.items()}
        return attrs.evolve(self, plugins={**(first or {}), **self.plugins, **after})

    def data(self) -> dict[str, Any]:
        """Return the arguments of `fit` that are data."""
        if not self.rows:
            return {}
        train = kit_rows(self.rows, TRAIN_ROWS, words=self.words)
        dev = kit_rows(self.rows, DEV_ROWS, start=1000, words=self.words)
        return {"train": train, "evaluate": dev if "evaluate" in owned(self.plugins.values()) else None}

    def trainer(self, output: Path | None = None, **settings: Any) -> Trainer:
        """Return a trainer with a fresh model."""
        model = None if "build_model" in owned(self.plugins.values()) else tiny_module()
        settings = {"steps": STEPS, "seed": SEED, "log_every": 2, "device": "cpu", **settings}
        return Trainer(model, list(self.plugins.items()), output=output, **settings)

    def problems(self, **settings: Any) -> list[Problem]:
        """Return what the plan says against it."""
        given = [split for split, rows in self.data().items() if rows is not None]
        return self.trainer(**settings).plan(given=given).problems

    def fit(self, output: Path | None = None, **settings: Any) -> Run:
        """Train from the start and return the run."""
        trainer = self.trainer(output, **settings)
        trainer.fit(**self.data())
        run = trainer.run
        assert run is not None
        return run


def complete(  # noqa: C901 - one rule after the other
    plugins: Mapping[str, Any], folder: Path, *, catalogue: Catalogue | None = None, pretrained: bool = False
) -> Composition:
    """Return a composition in which `plugins` can act, where there is one; the others come after them.

    Args:
        plugins: instances by name.
        folder: the kit's (fixture `kit_dir`).
        catalogue: where the others are found.
        pretrained: take the plugin that provides "processor" for the model, whether it is required or not.
    """
    catalogue, named = catalogue or Catalogue(), dict(plugins)
    offered = {name: catalogue.entry(name).load() for name in first_party(catalogue)}
    wanted, tokenized = companions(plugins.values()), "tokenize" in plugins
    needed = [word for word in wanted if not word.endswith("?")]
    kind = written_kind(plugins.values(), tokenized=tokenized)

    def add(name: str | None) -> None:
        if name is not None and name not in named:
            given = settings(name, offered[name], plugins.values())
            made = example(offered[name], folder, given, kind or "text")
            if not owned([made]) & owned(named.values()):
                named[name] = made

    def provider(word: str) -> str | None:
        found = [n for n, cls in offered.items() if word in (n, *_declared(cls, "provides"))]
        return next((name for name in (PREFERRED.get(word), word, *found) if name in found), None)

    for name in needed:
        add(name)
    padded = "build_collator" not in owned(named.values()) or "padding" in _words(named, "provides")
    sentences = kind in (None, "text") and "data" in _words(named, "provides") and padded
    if pretrained or sentences:
        add(provider("processor"))
    if sentences and "processor" in _words(named, "provides"):
        add("tokenize")
    if kind in RAGGED and "data" in _words(named, "provides"):
        add("pad")
    tried: set[str] = set()
    while missing := _words(named, "requires") - _words(named, "provides") - tried:
        for word in sorted(missing):
            add(provider(word))
        tried |= missing
    if "build_optimizer" not in owned(named.values()):
        named["base-optimizer"] = BaseOptimizer()
    provided = _words(named, "provides")
    words = None if "padding" in provided else WORDS
    if "data" in provided:
        return Composition(named, "", words)
    given = kind or ("text" if "tokenize" in named else "tokens" if "processor" in provided else "tensors")
    return Composition(named, given, words)


def _declared(cls: type, which: str) -> tuple[str, ...]:
    words = getattr(cls, which, ())
    return () if isinstance(words, property) else tuple(words)


@attrs.define
class Outcome:
    """What became of a composition: a finished run, or a refusal."""

    composition: Composition
    run: Run | None = None
    refused: DrivetrainError | None = None


def compose_pair(first: str, second: str, plugins: Mapping[str, Any], folder: Path, output: Path) -> Outcome:
    """Train with two plugins, in this order, and say how it ended.

    Args:
        first: the name of one of `plugins`.
        second: the name of the other.
        plugins: instances by name.
        folder: the kit's.
        output: an empty folder for the run.
    """
    pair = {first: plugins[first], second: plugins[second]}
    refused: DrivetrainError | None = None
    # Plugins that take different kinds of rows meet in rows that are bad for one of them, and it says so.
    collates = any(getattr(plugin, "role", "") == "collate" for plugin in pair.values())
    refusals: Any = DrivetrainError if len(kinds(pair.values())) > 1 or collates else ConfigError
    for pretrained in (False, True):  # some plugins take only a model of the kind that "processor" stands for
        composition = complete(pair, folder, pretrained=pretrained)
        try:
            return Outcome(composition, run=composition.fit(output / str(pretrained)))
        except refusals as error:
            refused = refused or error
            if isinstance(error, PlanError):
                break
    return Outcome(composition, refused=refused)


def refusal(error: DrivetrainError, plugins: Mapping[str, Any], first: str, second: str) -> str | None:
    """Return what is wrong with the refusal of two of `plugins`, or None if it says why.

    It does where one problem names both, or names one of them and what it lacks, or what a companion of one lacks.
    """
    names = [first, second, *companions([plugins[first], plugins[second]])]
    for problem in getattr(error, "problems", [Problem(str(error), kind="rows")]):
        text = str(problem)
        named = [name for name in names if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)]
        if len(named) >= 2 or (named and (problem.kind == "missing" or problem.received or "Received" in text)):  # noqa: PLR2004
            return None
    return f"the refusal names neither both of {first!r} and {second!r} nor what one of them lacks:\n{error}"
