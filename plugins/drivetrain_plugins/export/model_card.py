"""A model card: what a run knows of the model it made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import ConfigError, hookimpl, option, plugin
from drivetrain_plugins.export import _card
from drivetrain_plugins.export._exporting import NotExportedError
from drivetrain_plugins.export._paths import replace_whole, target

if TYPE_CHECKING:
    from collections.abc import Generator

    import pluggy

    from drivetrain import Run

MAX_ROWS = 24  # of the history of evaluations


@plugin(role="export", effect="observes")
class ModelCard:
    """Write README.md, a model card with metadata, beside the export for transformers at the end of the run.

    It has numbers of this run only, no paths or names of the machine, and asks no network.
    """

    to: str | None = option(None, help="folder; default: that of export-hf, or the run's")
    model_name: str = option("model", help="what the model is called")
    summary: str = option("", help="what the model is for, in your words")
    language: tuple[str, ...] = option((), converter=tuple, help='codes such as "en"')
    license: str | None = option(None, help='an identifier such as "apache-2.0"')
    tags: tuple[str, ...] = option((), converter=tuple, help="words to find it by")
    datasets: tuple[str, ...] = option((), converter=tuple, help="ids of the data on the hub")
    _history: list[dict[str, Any]] = option(factory=list, init=False)
    _every: int = option(1, init=False)  # how many evaluations a row of the history stands for
    _seen: dict[str, int] = option(factory=dict, init=False)  # evaluations by split
    _resumed: int | None = option(None, init=False)  # the step that this process went on from

    @hookimpl
    def add_hooks(self, manager: pluggy.PluginManager) -> None:
        """Bring `exported`, with which an upload asks for the card."""
        manager.add_hookspecs(_card.CardHooks)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Forget the run before, and refuse one with no place for the card."""
        self._history, self._every, self._seen, self._resumed = [], 1, {}, None
        target(run, self.to, "README.md", "model-card")

    @hookimpl
    def loaded(self, run: Run) -> None:
        """Note where the run goes on."""
        self._resumed = run.progress.step

    @hookimpl
    def evaluated(self, run: Run, split: str, metrics: dict[str, float]) -> None:
        """Keep an evaluation: the newest of a set, and of those before every second one where there are many."""
        number = self._seen.get(split, 0)
        row = {"step": run.progress.step, "epoch": float(run.epochs), "split": split, "metrics": dict(metrics)}
        self._history = [r for r in self._history if r["split"] != split or r["number"] % self._every == 0]
        self._history.append({**row, "number": number})
        self._seen[split] = number + 1
        while len(self._history) > MAX_ROWS * len(self._seen):
            self._every *= 2
            newest = {name: count - 1 for name, count in self._seen.items()}
            kept = [r for r in self._history if r["number"] % self._every == 0 or r["number"] == newest[r["split"]]]
            self._history = kept

    @hookimpl(wrapper=True, tryfirst=True)  # outside of all exporters in any list: they replace the folder
    def fit(self, run: Run) -> Generator[None, Any, Any]:
        """Write the card when the run has ended well."""
        result = yield
        if run.rank == 0:
            self._write(run)
        return result

    @hookimpl
    def exported(self, run: Run) -> None:
        """Write it before it is uploaded."""
        self._write(run)

    def state_dict(self) -> dict[str, Any]:
        """Return the evaluations so far."""
        return {"history": self._history, "every": self._every, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with them."""
        self._history, self._every, self._seen = list(state["history"]), state["every"], dict(state["seen"])

    # --- the parts -----------------------------------------------------------------------------------------------

    def _write(self, run: Run) -> None:
        folder = _card.card_folder(run)
        text = self._text(run)
        try:
            replace_whole(folder / "README.md", lambda file: file.write_text(text, encoding="utf-8"))
        except ConfigError as error:
            raise NotExportedError(error.problems) from error

    def _metadata(self, run: Run, pipeline: str | None) -> dict[str, Any]:
        index = _card.results(self._history, pipeline or "other", self.model_name, self.datasets)
        found = {
            "language": list(self.language),
            "license": self.license,
            "library_name": _card.library_of(run),
            "pipeline_tag": pipeline,
            "base_model": _card.base_model(run)[0],
            "datasets": list(self.datasets),
            "tags": ["drivetrain", *self.tags],
            "model-index": [index] if index["results"] else None,
        }
        return {key: value for key, value in found.items() if value}

    def _text(self, run: Run) -> str:
        pipeline = _card.pipeline_of(run)
        parameters = sum(p.numel() for p in run.model.parameters())
        start = f"Trained from {_card.base_model(run)[1]}: {type(run.model).__name__}, {parameters:,} parameters."
        task = f" Task: {pipeline}." if pipeline else ""
        sections = {
            "Evaluation": self._evaluation(),
            "How to load it": _card.how_to_load(run, pipeline),
            "Data": _card.data_table(run),
            "Training": _card.table(["", ""], _card.hyperparameters(run).items()) + self._course(run),
            "Recipe": _card.recipe_table(run),
            "Environment": _card.table(["", ""], _card.environment(run).items()),
        }
        lines = [f"---\n{_card.yaml_text(self._metadata(run, pipeline))}\n---", f"# {self.model_name}"]
        lines += [self.summary] if self.summary else []
        lines += [start + task]
        lines += [f"## {title}\n\n{body}" for title, body in sections.items() if body]
        return "\n\n".join(lines) + "\n"

    def _evaluation(self) -> str:
        if not self._history:
            return ""
        names = sorted({name for row in self._history for name in row["metrics"]}, key=lambda n: (n != "loss", n))
        rows = [
            [row["split"], row["step"], _card.number(row["epoch"]), *(_shown(row["metrics"].get(n)) for n in names)]
            for row in self._history
        ]
        note = f"\n\nOf the evaluations, about every {self._every}th is shown." if self._every > 1 else ""
        return _card.table(["set", "step", "epoch", *names], rows) + note

    def _course(self, run: Run) -> str:
        notes = []
        if run.stopped:
            notes.append(f"The run ended early: {_card.public(' '.join(run.stopped.split()), run)}.")
        if self._resumed is not None:
            notes.append(f"It was interrupted, and went on from step {self._resumed}.")
        if "loss" in run.metrics:
            notes.append(f"The last logged training loss is {_card.number(float(run.metrics['loss']))}.")
        return "".join(f"\n\n{note}" for note in notes)


def _shown(value: float | None) -> str:
    return "" if value is None else _card.number(value)
