"""`Trainer`: a list of plugins made into a plan, assembled into a run, and fitted."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import loop
from drivetrain.catalogue import Catalogue
from drivetrain.data import Columns, Fetch
from drivetrain.dispatch import callables
from drivetrain.errors import CheckpointError, ConfigError, PlanError, Problem
from drivetrain.plan import Plan, compose, name_plugins
from drivetrain.rng import global_seeder
from drivetrain.state import Run, Settings
from drivetrain.streams import Iterated

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@attrs.frozen
class Result:
    """How a run ended."""

    steps: int
    epochs: float
    metrics: dict[str, float]
    stopped: str | None
    output: Path | None


class Trainer:
    """Train `model` with a list of plugins.

    Args:
        model: a `torch.nn.Module`, unless a plugin builds it.
        plugins: instances, names from the catalogue, or (label, instance) pairs such as ("checkpoint:best", ...).
        catalogue: where names are looked up (default: the installed entry points).
        settings: output, epochs or steps, seed, device, log_every (see `Settings`).

    Raises:
        ConfigError: a setting is wrong. Problems of the composition are raised by `fit`, shown by `plan`.
    """

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        plugins: Sequence[Any] = (),
        *,
        catalogue: Catalogue | None = None,
        **settings: Any,
    ) -> None:
        """Keep the parts; nothing is built before `fit`."""
        self.model = model
        self.catalogue = catalogue or Catalogue()
        self.settings = self._settings(settings)
        self.plugins = name_plugins(plugins, self.catalogue)
        self.frozen = True  # False leaves hot hooks to pluggy; the parity test needs it
        self.run: Run | None = None

    @staticmethod
    def _settings(values: dict[str, Any]) -> Settings:
        try:
            return Settings(**values)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{error}. Known settings: {', '.join(f.name for f in attrs.fields(Settings))}"
            ) from error

    def plan(self, *, given: Sequence[str] = ()) -> Plan:
        """Return who acts where and in which order, with every problem found; trains nothing."""
        return compose(self.plugins, self.settings, self.catalogue, has_model=self.model is not None, given=given)[0]

    def fit(
        self, train: Any = None, evaluate: Any = None, *, resume: bool | str | Path = False, **settings: Any
    ) -> Result:
        """Train to the end.

        Args:
            train: a map-style or iterable dataset, a list of rows, or a dict of tensors; not needed if a plugin
                brings the data. An iterable needs `steps`, as nobody knows its length.
            evaluate: the same, or a dict of named sets.
            resume: True goes on from the newest valid checkpoint, "auto" does so if there is one, a path names one.
            settings: override those given to `Trainer`, e.g. `epochs=3`.

        Raises:
            PlanError: the plugins cannot be composed; all problems are listed.
            CheckpointError: `resume` asks for a checkpoint that is not there or not valid.
        """
        run = self.assemble(train, evaluate, **settings)
        with _named(run):
            if resume:
                self._resume(run, resume)
            run.settings.log_every.start(run)
            run.model.train()
            run.hooks.fit(run)
        return Result(run.progress.step, run.epochs, dict(run.metrics), run.stopped, self.settings.output)

    def evaluate(self, split: str = "evaluate") -> dict[str, float]:
        """Evaluate a split of the run that was last assembled or fitted."""
        return loop.evaluate(self._assembled(), split)

    def predict(self, split: str = "evaluate") -> Any:
        """Return what the run's `predict` plugin makes of a split; nothing is logged, and the run stays as it was."""
        run = self._assembled()
        if "predict" not in run.plan.hooks:
            raise ConfigError("no plugin of this run predicts: add `predict`")
        return run.hooks.predict(run, split)  # type: ignore[attr-defined]  # the plugin brings the hook

    def export(self, format: str, path: str | Path) -> None:  # noqa: A002
        """Write the model of the run in one of its plugins' formats."""
        run = self._assembled()
        with _named(run):
            exporters = {e.format: e for es in run.hooks.export(run) for e in es}
        if format not in exporters:
            raise ConfigError(f"no plugin of this run exports {format!r}. It has: {sorted(exporters) or 'no exporter'}")
        exporters[format].write(run, Path(path))

    def _assembled(self) -> Run:
        if self.run is None:
            raise ConfigError("nothing is assembled yet: call fit() or assemble() first")
        return self.run

    def _resume(self, run: Run, resume: bool | str | Path) -> None:
        if run.plan.hooks["load"].owner is None:
            raise ConfigError("no plugin of this run can resume: add `checkpoint`, or fit without `resume`")
        found = run.hooks.load(run, None if isinstance(resume, bool) or resume == "auto" else resume)
        if found is not None:
            run.hooks.loaded(run, found)
        elif resume != "auto":
            raise CheckpointError(f"there is no checkpoint to resume in {run.settings.output}")

    def assemble(self, train: Any = None, evaluate: Any = None, **settings: Any) -> Run:
        """Build everything a run needs, without training; `fit` calls it."""
        changed = {} if not settings else {**attrs.asdict(self.settings, recurse=False), **settings}
        if "epochs" in settings or "steps" in settings:
            changed.update({k: settings.get(k) for k in ("epochs", "steps")})
        self.settings = self._settings(changed) if changed else self.settings
        datasets = {k: _as_dataset(v) for k, v in _named_sets(train, evaluate).items() if v is not None}
        plan, manager = compose(
            self.plugins, self.settings, self.catalogue, has_model=self.model is not None, given=list(datasets)
        )
        if plan.problems:
            raise PlanError(plan.problems)
        output = self.settings.output and self.settings.output.absolute()  # wherever the process goes from here on
        in_place = attrs.evolve(self.settings, output=output)
        run = self.run = Run(in_place, plan=plan, plugins=dict(self.plugins), facts=dict(plan.facts))
        run.facts["splits"] = [*run.facts.get("splits", ()), *datasets]
        run.device = _device(self.settings.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            run.rank, run.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        _check_ranks(run)
        if output is not None and run.rank == 0:
            _make_folder(output)
        manager.register(loop.Defaults(run, self.model, datasets), "drivetrain")
        run.hooks = callables(manager, frozen=self.frozen)
        with _named(run):
            _build(run)
        if output is not None and run.rank == 0:
            with _told(output):
                (output / "plan.json").write_text(json.dumps(plan.as_dict(), indent=2) + "\n")
        return run


def _check_ranks(run: Run) -> None:
    """Refuse ranks that would train apart: nobody reduces the gradients, or their plans differ."""
    if run.world_size == 1:
        return
    if not any("data-parallel" in getattr(p, "provides", ()) for p in run.plugins.values()):
        what = f"{run.world_size} ranks, but no plugin provides 'data-parallel': each would train by itself"
        raise PlanError([Problem(what, ", ".join(run.plugins), "add a plugin that reduces gradients over the ranks")])
    digest = hashlib.sha256(json.dumps(run.plan.as_dict(), sort_keys=True).encode()).hexdigest()[:16]
    digests: list[Any] = [None] * run.world_size
    torch.distributed.all_gather_object(digests, digest)
    if len(set(digests)) > 1:
        shown = ", ".join(f"rank {rank}: {of}" for rank, of in enumerate(digests))
        raise PlanError([Problem("the ranks' plans differ", shown, "give every rank the same plugins and options")])


@contextlib.contextmanager
def _named(run: Run) -> Iterator[None]:
    """Name plugin and hook in what is raised."""
    try:
        yield
    except BaseException as error:
        from drivetrain.explain import plugin_frames  # noqa: PLC0415 - loaded when something fails

        for note in plugin_frames(error, run):
            error.add_note(note)
        raise


def _named_sets(train: Any, evaluate: Any) -> dict[str, Any]:
    if isinstance(evaluate, dict) and not any(isinstance(v, torch.Tensor) for v in evaluate.values()):
        return {"train": train, **{f"evaluate/{name}": rows for name, rows in evaluate.items()}}
    return {"train": train, "evaluate": evaluate}


def _as_dataset(data: Any) -> Any:
    if isinstance(data, dict):
        return Columns(data)
    mapped = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if hasattr(data, "open") or (mapped and not isinstance(data, torch.utils.data.IterableDataset)):
        return data
    if not hasattr(data, "__iter__") or iter(data) is data:
        raise ConfigError(
            "data must be map-style (have __len__ and __getitem__), or an iterable that can be started again. "
            f"Received: {type(data).__name__}"
        )
    return Iterated(data)


def _device(name: str) -> torch.device:
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # an unknown name, or none of its kind here
            raise ConfigError(
                f"the device {name!r} cannot be used: {str(error).splitlines()[0]}. Take 'auto', or one there is"
            ) from error
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None else torch.device("cpu")


@contextlib.contextmanager
def _told(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"the run's folder {output} cannot be made: {error.strerror}. Choose another") from error


def _make_folder(output: Path) -> None:
    with _told(output):
        if inside := next((p for p in (output, *output.parents) if (p / "manifest.json").is_file()), None):
            raise ConfigError(f"the run's folder {output} lies inside the checkpoint {inside}. Choose another")
        output.mkdir(parents=True, exist_ok=True)


def _build(run: Run) -> None:
    """Build model, data, optimizer and schedule through their hooks, and tell `assembled`."""
    hooks, seed_global = run.hooks, global_seeder(torch.device("cpu"))
    seed_global(run.seed_for("model"))
    run.model = hooks.build_model(run)
    for split in dict.fromkeys(["train", "evaluate", *run.facts.get("splits", ())]):
        dataset = hooks.build_dataset(run, split)
        if dataset is not None:
            _build_split(run, split, _as_dataset(dataset))
    if "train" not in run.batches:
        raise ConfigError("there is no training data: pass it to fit(), or name a data plugin")
    run.model.to(run.device)
    for index, transform in enumerate(sorted((t for ts in hooks.transforms(run) for t in ts), key=lambda t: t.stage)):
        seed_global(run.seed_for("transform", index))
        run.model = transform.apply(run.model)
    run.optimizer = hooks.build_optimizer(run, hooks.parameter_groups(run))
    run.optimizer.zero_grad()  # of a step that failed, in an earlier run of the same model
    updated = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    run.parameters = tuple(p for p in run.model.parameters() if id(p) in updated)  # in the model's order
    for group in run.optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    run.total_steps = hooks.count_steps(run)
    run.schedule = hooks.build_schedule(run)
    hooks.assembled(run)


def _build_split(run: Run, split: str, dataset: Any) -> None:
    hooks, streamed = run.hooks, hasattr(dataset, "open")
    if not streamed and len(dataset) == 0:
        raise ConfigError(f"the {split} data has no rows")
    run.datasets[split] = dataset
    collate = hooks.build_collator(run, split)
    fetch = Fetch(
        dataset,
        collate,
        hooks.build_count(run, split),
        run.settings.seed,
        split,
        stream=getattr(collate, "stream", None),
        checks=tuple(check for checks in hooks.batch_checks(run, split) for check in checks),
        tolerant=run.plan.hooks["bad_row"].owner != "drivetrain",
    )
    orders = run.plan.hooks["build_sampler"].owner
    if streamed and split == "train" and orders != "drivetrain":
        raise ConfigError(
            [
                Problem(
                    f"{orders}: the training data is a stream, which comes in its own order",
                    type(dataset).__name__,
                    f"shuffle the stream where it is read, or take {orders!r} out; rows with a length can be ordered",
                )
            ]
        )
    batches = hooks.build_batches(run, split, fetch, None if streamed else hooks.build_sampler(run, split))
    if not streamed and len(batches) == 0:
        raise ConfigError(f"the {split} data has {len(dataset)} rows, fewer than one batch, and drop_last is set")
    run.batches[split] = batches
