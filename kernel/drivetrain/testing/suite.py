"""`PluginSuite`: what every plugin of drivetrain promises, as tests."""

from __future__ import annotations

import copy
import json
import multiprocessing
import random
import threading
import time
from collections import Counter
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch

from drivetrain.catalogue import GROUP, Catalogue
from drivetrain.dispatch import Manager
from drivetrain.errors import ConfigError, MissingDependency
from drivetrain.hooks import Hooks
from drivetrain.options import ROLES, option_fields, option_values
from drivetrain.plan import _implementations, check_plugin, kebab
from drivetrain.recipe import Recipe
from drivetrain.testing import probes
from drivetrain.testing.compose import (
    STEPS,
    Composition,
    complete,
    compose_pair,
    example,
    examples,
    first_party,
    owned,
    refusal,
)
from drivetrain.testing.digests import decode, digest, encode
from drivetrain.testing.files import fill

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from drivetrain.state import Run

ROWS_OF_A_STEP = 24
PATIENCE_S = 5.0  # for threads and processes to end


class PluginSuite:
    """Subclass it in a test file, name your plugin, and every promise is tested.

    Attributes:
        plugin: your class (importable from its module), or the name of an installed plugin.
        settings: small options with which it does something within 6 steps; its `example` if None.
        max_extra_calls: how many Python calls the plugin may add to a step.
    """

    plugin: ClassVar[Any]
    settings: ClassVar[dict[str, Any] | None] = None
    max_extra_calls: ClassVar[int] = 400

    # --- what the tests are made with ----------------------------------------------------------------------------

    @property
    def cls(self) -> Any:
        """The plugin's class."""
        return Catalogue().entry(self.plugin).load() if isinstance(self.plugin, str) else self.plugin

    @property
    def name(self) -> str:
        """The plugin's name in a run."""
        if isinstance(self.plugin, str):
            return self.plugin
        value = f"{self.cls.__module__}:{self.cls.__qualname__}"
        catalogue = Catalogue()
        found = [name for name in catalogue.names if catalogue._entries[name][0].value == value]  # noqa: SLF001
        return found[0] if found else kebab(self.cls.__name__)

    def options(self, folder: Path) -> dict[str, Any]:
        """The settings, with the kit's folder filled in."""
        given = getattr(self.cls, "example", {}) if self.settings is None else self.settings
        filled: dict[str, Any] = fill(dict(given), folder)
        return filled

    def make(self, folder: Path, **changed: Any) -> Any:
        """Return an instance."""
        return self.cls(**{**self.options(folder), **changed})

    def composition(self, folder: Path, **changed: Any) -> Composition:
        """Return a run in which the plugin acts."""
        for pretrained in (False, True):
            made = complete({self.name: self.make(folder, **changed)}, folder, pretrained=pretrained)
            try:
                made.trainer(folder / "unused").assemble(**made.data())
            except MissingDependency as error:
                pytest.skip(str(error))
            except ConfigError:
                if pretrained:
                    raise
            else:
                break
        return made

    # --- what it is ----------------------------------------------------------------------------------------------

    def test_declaration(self, kit_folder: Path) -> None:
        """The kernel finds nothing wrong with the plugin, and everything it has is documented."""
        plugin = self.make(kit_folder)
        manager = Manager()
        if hasattr(plugin, "add_hooks"):
            plugin.add_hooks(manager)
        assert check_plugin(self.name, plugin, manager) == []
        assert self.cls.role in ROLES
        assert self.cls.effect in ("observes", "changes")
        assert (self.cls.__doc__ or "").strip(), "the class needs a docstring: its first line is shown in the catalogue"
        silent = [hook for hook, _ in _implementations(plugin) if not getattr(self.cls, hook).__doc__]
        assert not silent, f"these hooks need a docstring that says what they do: {silent}"
        helpless = [name for name, field in option_fields(self.cls).items() if not field.metadata.get("help")]
        assert not helpless, f"these options need option(..., help=...): {helpless}"

    def test_options_round_trip(self, kit_folder: Path) -> None:
        """A recipe written as data gives the plugin the same options as calling its class."""
        direct, given = self.make(kit_folder), self.options(kit_folder)
        point = metadata.EntryPoint("tested", f"{self.cls.__module__}:{self.cls.__qualname__}", GROUP)
        data = json.loads(json.dumps({"run": {"steps": 1}, "plugins": {"tested": given}}))
        trainer = Recipe.from_dict(data).trainer(Catalogue([point]))
        assert option_values(trainer.plugins["tested"]) == option_values(direct)
        plain = {n: v for n, v in option_values(direct).items() if not (isinstance(v, str) and v[:1] in "<*")}
        assert option_values(self.cls(**{**given, **plain})) == option_values(direct)

    def test_building_draws_nothing(self, kit_folder: Path) -> None:
        """Making the plugin leaves the global generators of Python, numpy and torch as they were."""
        self.options(kit_folder)  # writes what the kit lacks
        before = _global_state()
        self.make(kit_folder)
        assert _global_state() == before

    # --- what it does to a run -----------------------------------------------------------------------------------

    def test_neutrality(self, kit_folder: Path, tmp_path: Path) -> None:
        """A plugin that says it observes leaves weights, optimizer and counters bit-identical, and draws nothing."""
        if self.cls.effect != "observes":
            pytest.skip("it declares that it changes the run: tests/compose compares it with a reference")
        composition = self.composition(kit_folder)
        _seed_globals(1)
        changed = composition.fit(tmp_path / "with")
        drawn = _global_state()[:2]
        _seed_globals(1)
        plain = composition.without(self.name).fit(tmp_path / "without")
        parts = ("model", "optimizer", "progress")
        assert digest(changed, *parts) == digest(plain, *parts), f"{self.name} observes, but the run came out different"
        assert drawn == _global_state()[:2], f"{self.name} draws from Python's or numpy's global generator"

    def test_fitting_twice(self, kit_folder: Path, tmp_path: Path) -> None:
        """The same instances give the same run again: nothing of the first is left in them."""
        composition = self.composition(kit_folder)
        first = digest(composition.fit(tmp_path / "first"))
        assert digest(composition.fit(tmp_path / "second")) == first

    def test_state_round_trip(self, kit_folder: Path, tmp_path: Path) -> None:
        """The plugin's state survives being written as JSON and tensors, and loading it gives the same state."""
        composition = self.composition(kit_folder)
        used = composition.plugins[self.name]
        both = [name for name in ("state_dict", "load_state_dict") if hasattr(used, name)]
        assert len(both) != 1, f"{both[0]} needs its counterpart"
        if not both:
            return
        composition.fit(tmp_path / "used")
        text, tensors = encode(used.state_dict())
        other = self.composition(kit_folder)
        other.trainer(tmp_path / "fresh").assemble(**other.data())
        fresh = other.plugins[self.name]
        fresh.load_state_dict(decode(text, tensors))
        again, copies = encode(fresh.state_dict())
        assert again == text
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, copies, strict=True))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_exact_resume(self, kit_folder: Path, tmp_path: Path, workers: int) -> None:
        """Stopped twice in one epoch and gone on with by fresh instances, it ends bit for bit as if never stopped."""

        def build() -> Composition:
            own = "workers" in option_fields(self.cls)
            made = self.composition(kit_folder, **({"workers": workers} if own else {}))
            if workers and not own:
                if "build_batches" in owned(made.plugins.values()):
                    pytest.skip("it makes the batches itself, and has no option `workers`")
                made = made.adding(loader=example("loader", kit_folder, {"workers": workers}))
            return made

        straight = build().fit(tmp_path / "straight")
        state: dict[str, Any] | None = None
        for number, stop in enumerate((1, 2, None)):
            made = build()
            if stop is not None:
                made = made.adding(stop_at=probes.StopAt(stop))
            run = _go_on(made, tmp_path / f"part-{number}", state)
            assert run.progress.step == (stop or STEPS)
            if stop is not None:
                assert run.progress.epoch == 0, "the kit's epoch is too short to stop in it twice"
            state = copy.deepcopy(run.state_dict())
        for part in ("model", "optimizer", "progress", "interval", "counters", "plugins"):
            assert digest(run, part) == digest(straight, part), f"{part} differs after resuming"

    def test_loss_equivalence(self, kit_folder: Path, tmp_path: Path) -> None:
        """The same rows in other micro-batches give the same gradient (law of the loss), to 1e-12 in float64."""
        number = getattr(self.make(kit_folder), "facts", {}).get("accumulation", 3)
        first = self.composition(kit_folder)
        batches = first.trainer(tmp_path / "look").assemble(**first.data()).batches["train"]
        if batches.rows_per_epoch is None:
            pytest.skip("a stream cannot be cut in other ways")
        if getattr(getattr(batches, "fetch", None), "stream", None):
            pytest.skip("its collator draws for each micro-batch, so another cut is another task")
        sizes = [9, 1, *[2] * (number - 3), ROWS_OF_A_STEP - 10 - 2 * max(0, number - 3)][:number]
        sizes[-1] += ROWS_OF_A_STEP - sum(sizes)
        found = []
        for cut in (sizes, [ROWS_OF_A_STEP]):
            kept = probes.Gradients()
            made = self.composition(kit_folder).adding(
                exact=probes.Exact(), ragged=probes.Ragged(tuple(cut)), gradients=kept
            )
            made = made.adding(stop_at=probes.StopAt(1))
            if problems := made.problems():
                pytest.skip(f"the composition does not allow it: {problems[0]}")
            made.fit(tmp_path / str(len(cut)))
            found.append(kept.kept)
        assert found[0].keys() == found[1].keys()
        for name, gradient in found[0].items():
            torch.testing.assert_close(gradient, found[1][name], rtol=1e-12, atol=1e-12, msg=lambda m: f"{name}: {m}")  # noqa: B023

    # --- when things go wrong ------------------------------------------------------------------------------------

    def test_teardown(self, kit_folder: Path, tmp_path: Path) -> None:
        """Whichever hook raises: the error names it, `failed` is heard, wrappers unwind, the plugin is usable again."""
        recorder = probes.Recorder()
        composition = self.composition(kit_folder)
        clean = digest(composition.adding(recorder=recorder).fit(tmp_path / "clean"), "model", "optimizer")
        fired = [name for name in dict.fromkeys(recorder.names) if hasattr(Hooks, name) and name != "add_hooks"]
        first_epoch = recorder.names.index("epoch")
        before = {name for name in recorder.names[:first_epoch] if name != "log"}
        at_rest = _at_rest()
        for hook in fired:
            watch = probes.Watch()
            made = composition.adding({"watch": watch}, saboteur=probes.saboteur(hook))
            with pytest.raises(probes.Sabotage) as caught:
                made.fit(tmp_path / hook)
            notes = getattr(caught.value, "__notes__", [])
            assert any("'saboteur'" in note and repr(hook) in note for note in notes), (hook, notes)
            if hook not in before:
                assert watch.heard == [caught.value], f"`failed` was not heard once when {hook} raised"
                assert watch.unwound
            del caught
            _until(lambda: _no_more_than(at_rest), f"after {hook} raised: {_at_rest()}; before: {at_rest}")
        again = composition.fit(tmp_path / "again")
        assert digest(again, "model", "optimizer") == clean, "the plugin keeps something of a run that failed"

    # --- with others ---------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("other", first_party())
    def test_composes_with(self, other: str, kit_folder: Path, tmp_path: Path) -> None:
        """With each first-party plugin it is refused with a reason, or trains; an observer changes nothing there."""
        if other == self.name:
            pytest.skip("itself")
        both = examples({self.name: self.cls, other: Catalogue().entry(other).load()}, kit_folder)
        pair = {**both, self.name: self.make(kit_folder)}
        outcome = compose_pair(self.name, other, pair, kit_folder, tmp_path)
        if outcome.refused is not None:
            assert (complaint := refusal(outcome.refused, pair, self.name, other)) is None, complaint
            return
        run = outcome.run
        assert run is not None
        assert run.finished
        finite = [bool(p.isfinite().all()) for p in run.model.parameters()]
        assert all(finite)
        if self.cls.effect == "observes" and not _needed(outcome.composition, self.name):
            plain = outcome.composition.without(self.name).fit(tmp_path / "without")
            assert digest(run, "model", "optimizer") == digest(plain, "model", "optimizer")

    def test_cost(self, kit_folder: Path, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
        """The plugin adds no more Python calls to a step than it may (those inside the model do not count)."""
        counts = []
        acting = self.composition(kit_folder)
        spare = self.cls.effect == "observes" and not _needed(acting, self.name)
        plain = acting.without(self.name) if spare else complete({}, kit_folder)
        for number, made in enumerate((acting, plain)):
            counter = probes.CallCounter()
            made.adding({"call-counter": counter}).fit(tmp_path / str(number), steps=12, log_every=100)
            counts.append(counter.per_step)
        record_property("python_calls_per_step", counts[0])
        record_property("python_calls_per_step_without", counts[1])
        assert counts[0] - counts[1] <= self.max_extra_calls, f"{counts[0]} calls a step; without it {counts[1]}"


def _needed(composition: Composition, name: str) -> bool:
    """Return whether the others cannot run without `name`."""
    return bool(composition.without(name).problems())


def _go_on(made: Composition, output: Path, state: dict[str, Any] | None) -> Run:
    """Fit from `state`, as a resumed run does, with the checkpoint in memory."""
    trainer = made.trainer(output)
    run = trainer.assemble(**made.data())
    if state is not None:
        run.load_state_dict(state)
        run.hooks.loaded(run, output)
    run.settings.log_every.start(run)
    run.model.train()
    run.hooks.fit(run)
    return run


def _seed_globals(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global one is what is watched
    torch.default_generator.manual_seed(seed)


def _global_state() -> tuple[Any, Any, bytes]:
    state: Any = np.random.get_state(legacy=True)  # noqa: NPY002 - the global one is what is watched
    return random.getstate(), (*state[:1], state[1].tobytes(), *state[2:]), torch.get_rng_state().numpy().tobytes()


def _at_rest() -> dict[str, Any]:
    """Return what a run may switch on and must switch off."""
    return {
        "autocast": torch.is_autocast_enabled("cpu"),
        "grad": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "processes": len(multiprocessing.active_children()),
    }


def _no_more_than(before: dict[str, Any]) -> bool:
    """Tell whether all is as it was; a thread or process that was still ending then may be gone now."""
    now = _at_rest()
    extra = Counter(now.pop("threads")) - Counter(before["threads"])
    left = now.pop("processes") - before["processes"]
    return not extra and left <= 0 and all(value == before[name] for name, value in now.items())


def _until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
